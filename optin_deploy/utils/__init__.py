"""Files, paths, progress, signals and number formatting."""
