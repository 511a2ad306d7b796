"""The command `python -m i2v_core batch`."""
