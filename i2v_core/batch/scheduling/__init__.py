"""Which job each device runs next: policy, estimates, and the queue as people see it."""
