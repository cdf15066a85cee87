"""Which units to keep under a budget."""
