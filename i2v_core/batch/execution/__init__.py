"""Running jobs on one device: the stage pipeline, batching, weights and video writing."""
