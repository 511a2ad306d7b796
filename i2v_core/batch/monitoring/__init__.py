"""What a batch reports: events, metrics, suspected leaks, tables and pictures."""
