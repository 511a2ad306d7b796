"""From a request and a budget to a plan."""
