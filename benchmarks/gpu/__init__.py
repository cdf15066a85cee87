"""Every GPU figure in calls of under ten minutes: see ``benchmarks/gpu.sh``."""
