"""Derivatives through modules that cut them off: without gradients, on detached tensors, or in checkpoints.

Such a module computes the same numbers with and without a graph. While `restore_gradients` is active, all its
operations keep a graph; while `plain_checkpoints` is active, so do checkpoints. Computations outside torch, or without
a derivative, cannot be restored.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from optin_deploy.nn.batches import PyTree, TorchFunction

# Functions that return a tensor without its graph, and functions that leave torch, which refuse a tensor with a graph.
_CUTS = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_LEAVES = (Tensor.numpy, Tensor.__array__)
_SWITCH = torch._C._set_grad_enabled
# Generators of torch.utils.checkpoint, in its versions, that run a part without a graph and run it again later.
_GENERATORS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


@contextmanager
def restore_gradients(module: nn.Module) -> Iterator[None]:
    """Keep a graph of everything that ``module`` computes with gradients on, while the context lasts."""
    with _active(module, _Restoring):
        yield


@contextmanager
def watch_cuts(module: nn.Module) -> Iterator[list[bool]]:
    """Record, while the context lasts, whether ``module`` detaches a tensor from its graph.

    The list stays empty if it never does.
    """
    found: list[bool] = []
    with _active(module, lambda: _Watching(found)):
        yield found


@contextmanager
def _active(module: nn.Module, make: Callable[[], TorchFunctionMode]) -> Iterator[None]:
    """Activate a mode in every forward pass of ``module`` with gradients on, and nowhere else."""
    modes: list[TorchFunctionMode | None] = []

    def enter(*_: object) -> None:
        modes.append(make() if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() else None)
        if modes[-1] is not None:
            modes[-1].__enter__()

    def leave(*_: object) -> None:
        mode = modes.pop()
        if mode is not None:
            mode.__exit__(None, None, None)

    handles = (
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Restoring(TorchFunctionMode):
    def __torch_function__(
        self, func: TorchFunction, types: object, args: Sequence[PyTree] = (), kwargs: PyTree = None
    ) -> PyTree:
        if func is _SWITCH:
            return func(*args)
        if func in _LEAVES:
            return func(args[0].detach(), *args[1:], **(kwargs or {}))
        with torch.inference_mode(False), torch.enable_grad():
            if func in _CUTS and args[0].requires_grad:
                return args[0].view_as(args[0])
            if func is Tensor.requires_grad_ and not args[0].is_leaf:
                return args[0]
            given = (args, kwargs or {})
            if not _in_place(func):
                given = tree_map_only(Tensor, _with_graph, given)
            return func(*given[0], **given[1])


class _Watching(TorchFunctionMode):
    def __init__(self, found: list[bool]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: TorchFunction, types: object, args: Sequence[PyTree] = (), kwargs: PyTree = None
    ) -> PyTree:
        cut = func in _CUTS or func in _LEAVES or not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        given = func(*args, **(kwargs or {}))
        if cut and not self.found and func is not _SWITCH:
            # Shapes and types have no derivative anyway.
            numbers = func in _LEAVES or any(
                isinstance(t, Tensor) and t.is_floating_point() for t in tree_leaves(given)
            )
            tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            if numbers and any(t.requires_grad for t in tensors):
                self.found.append(True)
        return given


def _with_graph(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor made in inference mode, such as a table of positions: autograd cannot save those."""
    return tensor.clone() if tensor.is_inference() else tensor


def _in_place(func: TorchFunction) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Let checkpoints run their function once, with its graph: hooks are removed before a second run."""
    torch_module = torch.utils.checkpoint
    before = {name: getattr(torch_module, name) for name in _GENERATORS if hasattr(torch_module, name)}

    def once(*_: object, **__: object) -> Iterator[None]:
        yield

    def run(function: TorchFunction, _: bool, *args: PyTree) -> PyTree:
        return function(*args)

    try:
        for name in before:
            setattr(torch_module, name, once)
        torch_module.CheckpointFunction.apply = staticmethod(run)
        yield
    finally:
        del torch_module.CheckpointFunction.apply
        for name, generator in before.items():
            setattr(torch_module, name, generator)
