"""The prunable groups of a module: found, masked, sliced and verified."""
