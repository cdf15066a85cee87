"""From a name, a path or a module to a `Network`, and checkpoints of pruned networks."""
