"""Run part of a network: replay stored outputs of blocks, and stop after a block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from optin_deploy.nn.batches import PyTree
from optin_deploy.nn.hooks import forward_hooks


class _Stopped(Exception):  # noqa: N818 - not an error
    pass


@contextmanager
def replay_blocks(module: nn.Module, outputs: Mapping[str, PyTree]) -> Iterator[None]:
    """Let the named blocks return ``outputs[name]`` instead of running while the context lasts."""
    blocks = {name: module.get_submodule(name) for name in outputs}
    overridden: dict[str, Callable[..., PyTree] | None] = {
        name: block.__dict__.get("forward") for name, block in blocks.items()
    }
    try:
        for name, block in blocks.items():
            block.forward = _returning(outputs[name])
        yield
    finally:
        for name, block in blocks.items():
            del block.forward
            if (forward := overridden[name]) is not None:
                block.forward = forward


def _returning(output: PyTree) -> Callable[..., PyTree]:
    def forward(*_: object, **__: object) -> PyTree:
        return output

    return forward


def forward_until(module: nn.Module, inputs: Mapping[str, Tensor], block: str) -> PyTree:
    """Run ``module`` on ``inputs`` up to the end of ``block`` and return that block's output."""
    result: list[PyTree] = []

    def stop(_: str, __: nn.Module, ___: object, output: object) -> None:
        result.append(output)
        raise _Stopped

    try:
        with forward_hooks(module, [block], after=stop):
            module(**inputs)
    except _Stopped:
        return result[0]
    raise RuntimeError(f"block {block} did not run")


@contextmanager
def record_outputs(module: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, PyTree]]:
    """Collect the outputs of the named modules, as they are, while the context lasts.

    Tensors of a module that runs several times are concatenated along the first axis.
    """
    seen: dict[str, PyTree] = {}

    def record(name: str, _: nn.Module, __: object, output: object) -> None:
        seen[name] = cat_batch(seen.get(name), output)

    with forward_hooks(module, names, after=record):
        yield seen


@contextmanager
def record_inputs(module: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collect the first input of each named module while the context lasts; several runs are concatenated."""
    seen: dict[str, Tensor] = {}

    def record(name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen[name] = cat_batch(seen.get(name), args[0] if args else next(iter(kwargs.values())))

    with forward_hooks(module, names, before=record):
        yield seen


def cat_batch(before: PyTree, now: PyTree) -> PyTree:
    """Return ``now`` appended to ``before`` if both are tensors that differ in the first axis only, else ``now``."""
    if isinstance(before, Tensor) and isinstance(now, Tensor) and before.shape[1:] == now.shape[1:] and now.dim():
        return torch.cat([before, now])
    return now


def keep_shapes_only(outputs: dict[str, PyTree]) -> None:
    """Replace stored outputs by zero-stride tensors of the same shape, in place: enough for blocks that are skipped."""
    for name, output in outputs.items():
        outputs[name] = _hollow(output)


def _hollow(output: PyTree) -> PyTree:
    """Return NaN (or zero) of the same shapes, without the memory."""

    def hollow(tensor: Tensor) -> Tensor:
        return tensor.new_full((), float("nan") if tensor.is_floating_point() else 0).expand(tensor.shape)

    return tree_map_only(Tensor, hollow, output)
