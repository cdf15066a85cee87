"""Latency breakdowns of a dense and a pruned network, and the bottlenecks of the pruned one."""
