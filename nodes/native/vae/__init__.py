"""Core's autoencoders within a budget: exact decode and encode, a few rows of a few frames at a time."""
