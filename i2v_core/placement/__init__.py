"""Where weights are and in what precision."""
