"""The bundled demo model: a small I2VGen-XL, trained from nothing on clips drawn here.

Run as ``python -m training.demo_model``; every stage is one module.
"""
