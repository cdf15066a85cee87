"""Remove wrappers and computed weights from a module. It computes the same.

``torch.compile``, data parallelism and averaged weights are wrappers. ``weight_norm``, ``spectral_norm``,
``parametrize`` and ``nn.utils.prune`` compute a tensor from others; they are replaced by the tensor itself. So are
subclasses of linear layers and convolutions that only change the weights, like weight standardisation.
"""

import copy
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from optin_deploy.errors import UserError
from optin_deploy.nn.plain_layers import effective_layer

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
# timm's averaged weights. The classes differ between versions.
_WRAPPER_FILE = "timm.utils.model_ema"
_QUANTIZED = (
    "torch.ao.nn.qat",
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.nn.intrinsic.quantized",
)
_ORIGINAL = "_torchdynamo_orig_callable"


def bake_weights(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` without wrappers and computed weights, or ``module`` if it has none.

    ``module`` is not changed. The copy shares the tensors that stay.

    Raises:
        UserError: It has fake quantization, or a tensor with another value each time it is computed.
    """
    while (inner := _inner(module)) is not None:
        module = inner
    for name, child in module.named_modules():
        if isinstance(child, FakeQuantizeBase) or type(child).__module__.startswith(_QUANTIZED):
            raise UserError(
                f"{name or 'the network'} is quantized or prepared for it ({type(child).__name__}): prune the "
                "network in floating point, and quantize what is left"
            )
    effective = {id(m): layer for m in module.modules() if (layer := effective_layer(m)) is not None}
    if not effective and not any(_is_wrapped(child) for child in module.modules()):
        return module
    copied = _copy_unwrapped(module, effective)
    for child in copied.modules():
        _run_plainly(child)
    # Hooks first: a parametrisation may hold a tensor that a hook computes, never the reverse.
    for child in list(copied.modules()):
        _take_hooks_off(child)
    for name, child in list(copied.named_modules()):
        if parametrize.is_parametrized(child):
            _take_parametrizations_off(name, child)
    return copied


def _inner(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper, None if ``module`` is no wrapper."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        return module._orig_mod
    if isinstance(module, _WRAPPERS) or type(module).__module__ == _WRAPPER_FILE:
        inner = module.module
        assert isinstance(inner, nn.Module)
        return inner
    return None


def _is_wrapped(module: nn.Module) -> bool:
    compiled = module._compiled_call_impl is not None or hasattr(type(module).forward, _ORIGINAL)
    compiled = compiled or any(hasattr(value, _ORIGINAL) for value in vars(module).values())
    return compiled or _inner(module) is not None or parametrize.is_parametrized(module) or any(_hooks(module))


def _copy_unwrapped(module: nn.Module, replaced: dict[int, nn.Module]) -> nn.Module:
    """Return a copy that shares tensors, without wrappers, and with ``replaced`` modules by id."""
    memo: dict[int, object] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for child in module.modules():
        # Computed tensors have a graph, which cannot be copied.
        memo |= {id(value): value for value in vars(child).values() if isinstance(value, Tensor)}
    memo |= replaced
    # Inner modules first, so that an outer wrapper finds the copies of inner ones.
    for child in reversed(list(module.modules())):
        inner = _inner(child)
        if inner is not None:
            memo[id(child)] = copy.deepcopy(inner, memo)
    return copy.deepcopy(module, memo)


def _run_plainly(module: nn.Module) -> None:
    """Undo ``torch.compile`` of the module and its functions.

    Compiled functions ignore hooks and run the original module instead of the copy.
    """
    module._compiled_call_impl = None
    for name, value in list(vars(module).items()):
        if not hasattr(value, _ORIGINAL):
            continue
        original = getattr(value, _ORIGINAL)
        function = getattr(original, "__func__", None)
        if name == "forward" and function is type(module).forward:
            del module.__dict__[name]
        else:
            module.__dict__[name] = original if function is None else MethodType(function, module)
    if "forward" not in vars(module) and hasattr(type(module).forward, _ORIGINAL):
        module.__dict__["forward"] = MethodType(getattr(type(module).forward, _ORIGINAL), module)


def _hooks(module: nn.Module) -> Iterator[tuple[int, WeightNorm | SpectralNorm | BasePruningMethod]]:
    """Yield the pre-hooks that compute a tensor of the module: torch's older weight norms, and pruning masks."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
            yield key, hook


@torch.no_grad()
def _take_hooks_off(module: nn.Module) -> None:
    for key, hook in list(_hooks(module)):
        parts: tuple[str, ...]
        if isinstance(hook, BasePruningMethod):
            name, value, parts = hook._tensor_name, hook.apply_mask(module), ("orig", "mask")
        elif isinstance(hook, SpectralNorm):
            name, value, parts = hook.name, hook.compute_weight(module, False), ("orig", "u", "v")
        else:
            name, value, parts = hook.name, hook.compute_weight(module), ("g", "v")
        made_of = [getattr(module, f"{name}_{part}") for part in parts]
        for part in parts:
            delattr(module, f"{name}_{part}")
        module.__dict__.pop(name, None)
        _set(module, name, value, made_of)
        del module._forward_pre_hooks[key]
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for number, other in list(hooks.items()):
                made = getattr(other, "hook", other)
                if isinstance(made, SpectralNormStateDictHook | SpectralNormLoadStateDictPreHook) and made.fn is hook:
                    del hooks[number]


@torch.no_grad()
def _take_parametrizations_off(name: str, module: Any) -> None:
    """Set every parametrised tensor to its value.

    torch's own function is not used because it changes the class, which the original module shares.
    """
    training = module.training
    module.eval()
    lists = dict(module.parametrizations.items())
    values = {tensor: getattr(module, tensor) for tensor in lists}
    for tensor, value in values.items():
        if not torch.equal(value, getattr(module, tensor)):
            raise UserError(
                f"{name}.{tensor}: its parametrisation gives another tensor each time: remove it, or make it "
                "the same in eval mode"
            )
    module.train(training)
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for tensor, value in values.items():
        originals = [
            t for n, t in (*lists[tensor].named_parameters(), *lists[tensor].named_buffers()) if "original" in n
        ]
        _set(module, tensor, value, originals)


def _set(module: nn.Module, name: str, value: Tensor, made_of: list[Tensor]) -> None:
    """Set a tensor of ``module``: a parameter if it is made of one, else a buffer."""
    value = value.detach().clone()
    if any(isinstance(t, nn.Parameter) for t in made_of):
        wanted = any(t.requires_grad for t in made_of)
        setattr(module, name, nn.Parameter(value, requires_grad=wanted))
    else:
        module.register_buffer(name, value)
