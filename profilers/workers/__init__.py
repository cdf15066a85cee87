"""Isolated processes that measure one case each."""
