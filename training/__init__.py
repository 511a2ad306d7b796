"""Training of the models that the pack ships."""
