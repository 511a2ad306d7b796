"""Reports of a batch: events, metrics, suspected leaks, tables and pictures."""
