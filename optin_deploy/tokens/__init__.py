"""Merge tokens between blocks: which ones, how many, and what that costs."""
