"""Closed-form compensation: refit the remaining weights so that the pruned network follows the dense one."""
