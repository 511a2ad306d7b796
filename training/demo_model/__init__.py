"""Training of the bundled demo model: a small I2VGen-XL, trained from scratch on synthetic clips.

Run as ``python -m training.demo_model``; every component has a module of its own.
"""
