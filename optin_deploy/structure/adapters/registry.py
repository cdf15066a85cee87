"""The registry of adapters: functions that recognise one type of module and describe its units.

An adapter takes ``(name, module, parent's name, parent)`` and returns a `Group`, a `LeftDense` for a module that it
knows but cannot prune, or None for any other module. Registering it makes the module type prunable everywhere. If
several adapters describe the same layers, the one registered last is used:

    @adapter
    def my_ffn(name, module, parent_name, parent):
        if not isinstance(module, MyFeedForward):
            return None
        return Group(name=name, kind="neuron", units=module.up.out_features, ...)
"""

from collections.abc import Callable

from torch import nn

from optin_deploy.structure.groups import Group, LeftDense

Adapter = Callable[[str, nn.Module, str, nn.Module], Group | LeftDense | None]

ADAPTERS: list[Adapter] = []


def adapter(function: Adapter) -> Adapter:
    """Register an adapter (a decorator)."""
    ADAPTERS.append(function)
    return function


def general_adapter(function: Adapter) -> Adapter:
    """Register an adapter that is tried after all others (a decorator)."""
    ADAPTERS.insert(0, function)
    return function


def supported() -> list[str]:
    """Return the first line of every adapter's docstring, which says what it recognises."""
    return [(function.__doc__ or function.__name__).strip().splitlines()[0] for function in ADAPTERS]
