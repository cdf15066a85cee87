"""Checks and adaptations of a module before it is pruned."""
