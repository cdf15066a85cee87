"""Adapters: each recognises one type of module and describes its units."""
