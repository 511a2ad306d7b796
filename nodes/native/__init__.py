"""Models that core's own loaders load, run within a budget of memory: one file a model, and what they share."""
