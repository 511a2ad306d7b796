"""Engines that run a queue: on this machine's devices, or on a Ray cluster."""
