"""Jobs: their specifications, the list files that name them, and the queue on disk with its leases."""
