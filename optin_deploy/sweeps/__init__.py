"""Runs of one network at several budgets, and which of them none of the others beats."""
