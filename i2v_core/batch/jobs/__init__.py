"""Jobs: what one asks for, the files that list them, and the queue on disk with its leases."""
