"""The options of a run and of a sweep, validated, and reading them from YAML."""
