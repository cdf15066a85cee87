"""Statistics of batch norms, taken anew."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from optin_deploy.distributed.ranks import ranks_of

Batches = Sequence[Mapping[str, Tensor]]
_Norm = nn.modules.batchnorm._BatchNorm
_InstanceNorm = nn.modules.instancenorm._InstanceNorm


@torch.no_grad()
def reestimate(module: nn.Module, batches: Batches) -> None:
    """Set the statistics of batch norms to those of their inputs on ``batches``, in place.

    Instance norms with running statistics are included. Removed units change the inputs of later norms, if nothing
    compensates for them. All batches have the same weight. Batches with one value per channel have no variance; they
    count, together, only if there are no others, as after a projection without inputs, which returns its bias. Without
    batches nothing changes.
    """
    norms = [m for m in module.modules() if isinstance(m, _Norm) and m.track_running_stats]
    instances = [m for m in module.modules() if isinstance(m, _InstanceNorm) and m.track_running_stats]
    if not (norms or instances) or not batches:
        return
    if ranks_of(batches).main:
        with ExitStack() as stack:
            for norm in instances:
                stack.callback(norm.register_forward_pre_hook(_averaging()).remove)
            _run(module, norms, batches)
    every: list[nn.Module] = [*norms, *instances]
    for module_with_statistics in every:
        for buffer in module_with_statistics.buffers(recurse=False):
            buffer.copy_(ranks_of(batches).broadcast(buffer.clone, buffer))


def _run(module: nn.Module, norms: Sequence[_Norm], batches: Batches) -> None:
    momenta = [norm.momentum for norm in norms]
    single: list[list[Tensor]] = [[] for _ in norms]
    try:
        with ExitStack() as stack:
            for norm, values in zip(norms, single, strict=True):
                norm.reset_running_stats()
                # The mean over all batches, in place of one that forgets.
                norm.momentum = None
                stack.callback(norm.register_forward_pre_hook(_set_apart(values)).remove)
            for batch in batches:
                module(**batch)
        for norm, values in zip(norms, single, strict=True):
            if values and not norm.num_batches_tracked:
                _give(norm, torch.stack(values))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _averaging() -> Callable[[_InstanceNorm, tuple[Tensor, ...]], None]:
    """A hook that gives an instance norm the mean, over samples and all batches so far, of samples' statistics."""
    count = 0

    def hook(norm: _InstanceNorm, args: tuple[Tensor, ...]) -> None:
        nonlocal count
        assert norm.running_mean is not None and norm.running_var is not None
        values, count = args[0].flatten(2), count + 1
        norm.running_mean.lerp_(values.mean(2).mean(0), 1 / count)
        norm.running_var.lerp_(values.var(2).mean(0), 1 / count)

    return hook


def _set_apart(values: list[Tensor]) -> Callable[[_Norm, tuple[Tensor, ...]], None]:
    """Return a hook that lets a norm take statistics of its input.

    torch refuses inputs with a single value per channel; the hook appends those to ``values``.
    """

    def hook(norm: _Norm, args: tuple[Tensor, ...]) -> None:
        (given,) = args
        alone = given.numel() == norm.num_features
        norm.train(not alone)
        if alone:
            values.append(given.flatten())
            if not norm.num_batches_tracked:
                _give(norm, given.reshape(1, -1))

    return hook


def _give(norm: _Norm, values: Tensor) -> None:
    """The mean and variance of ``values`` ``(count, channels)``."""
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(values.mean(0))
    norm.running_var.copy_(values.var(0) if len(values) > 1 else torch.zeros_like(values[0]))
