"""Which job each device runs next: the policy, estimates, and the queue as people see it."""
