"""Devices that jobs run on, and the admission of their stages by free memory."""
