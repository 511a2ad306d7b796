"""Planning: from a request and a budget to a plan, or to a refusal with suggestions."""
