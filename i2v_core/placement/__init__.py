"""Placement of weights: on which device, in what precision, and when they are loaded."""
