"""Budgets in measured milliseconds: what the sizes of a block cost in a runtime, and plans that meet a latency."""
