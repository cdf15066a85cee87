"""Scores of heads, neurons and channels: one file for each criterion."""
