"""Many videos unattended: a list of jobs, a queue on disk, and an engine that runs it by what memory allows."""
