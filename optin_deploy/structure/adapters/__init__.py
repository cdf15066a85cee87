"""Adapters: each recognises one type of module and describes its units."""

# Importing a file registers its adapters, in this order whichever file is imported first.
from optin_deploy.structure.adapters import feed_forward, timm_attention, torch_attention, transformers_attention

__all__ = ["feed_forward", "timm_attention", "torch_attention", "transformers_attention"]
