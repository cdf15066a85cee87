"""Running part of a network: resume at a block with the outputs of those before it given, and stop behind one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class _Stopped(Exception):  # noqa: N818 - not an error
    pass


@contextmanager
def resumed(module: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """While the context lasts, the named blocks return ``outputs[name]`` at once instead of running."""
    blocks = {name: module.get_submodule(name) for name in outputs}
    overridden: dict[str, Any] = {name: block.__dict__.get("forward") for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            block.forward = _returning(outputs[name])
        yield
    finally:
        for name, block in blocks.items():
            del block.forward
            if overridden[name] is not None:
                block.forward = overridden[name]


def _returning(output: Any) -> Any:
    def forward(*_: Any, **__: Any) -> Any:
        return output

    return forward


def run_until(module: nn.Module, inputs: Mapping[str, Tensor], block: str) -> Any:
    """Run ``module`` on ``inputs`` up to the end of ``block`` and return that block's output."""
    result: list[Any] = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        result.append(output)
        raise _Stopped

    handle = module.get_submodule(block).register_forward_hook(stop)
    try:
        module(**inputs)
    except _Stopped:
        return result[0]
    finally:
        handle.remove()
    raise RuntimeError(f"block {block} did not run")


@contextmanager
def recorded_outputs(module: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Collect the outputs of the named modules, as they are, while the context lasts.

    Tensors from a module that runs several times are put one behind the other along the first axis.
    """
    seen: dict[str, Any] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = behind(seen.get(name), output)

        return hook

    handles = [module.get_submodule(n).register_forward_hook(record(n)) for n in dict.fromkeys(names)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_inputs(module: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Collect the first input of each of the named modules while the context lasts; of several runs as for outputs."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = behind(seen.get(name), args[0] if args else next(iter(kwargs.values())))

        return hook

    each = dict.fromkeys(names)
    handles = [module.get_submodule(n).register_forward_pre_hook(record(n), with_kwargs=True) for n in each]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def behind(before: Any, now: Any) -> Any:
    """``now`` behind what there was ``before``, if both are tensors of one shape but for the first axis."""
    if isinstance(before, Tensor) and isinstance(now, Tensor) and before.shape[1:] == now.shape[1:] and now.dim():
        return torch.cat([before, now])
    return now


def hollow_out(outputs: dict[str, Any]) -> None:
    """Keep no more of outputs for `resumed` than their shapes, in place: enough where blocks are only skipped."""
    for name, output in outputs.items():
        outputs[name] = _hollow(output)


def _hollow(output: Any) -> Any:
    """NaN of the same shapes, in no memory."""

    def each(tensor: Tensor) -> Tensor:
        return tensor.new_full((), float("nan") if tensor.is_floating_point() else 0).expand(tensor.shape)

    return tree_map_only(Tensor, each, output)
