"""Helpers on torch modules. They know nothing of pruning."""
