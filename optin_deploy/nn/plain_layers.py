"""Linear layers and convolutions with torch's forward, and subclasses that only change the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from optin_deploy.nn.batches import PyTree, TorchFunction

_BASES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_SEED = 0
# Errors that a forward may raise for noise.
_UNFIT = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def base_of(layer: nn.Module) -> type[nn.Module] | None:
    """Return torch's class of a linear layer or convolution, None for other modules."""
    return next((base for base in _BASES if isinstance(layer, base)), None)


def has_own_forward(layer: nn.Module) -> bool:
    """Return whether a linear layer or convolution has another forward than torch's class."""
    base = base_of(layer)
    if base is None:
        return False
    names = ("forward", "__call__", "_conv_forward")
    # An instance may have a function of its own.
    return any(n in vars(layer) or getattr(type(layer), n, None) is not getattr(base, n, None) for n in names)


@torch.no_grad()
def computes_with_its_weights(layer: nn.Module) -> bool:
    """Return whether a linear layer or convolution computes weights times input plus bias.

    Layers with a forward of their own are tried.
    """
    if not has_own_forward(layer):
        return True
    base, weight = base_of(layer), layer.get_parameter("weight")
    assert base is not None
    try:
        x = _noise(layer, weight, 0)
        return torch.allclose(layer(x), base.forward(layer, x), rtol=1e-3, atol=1e-5)
    except _UNFIT:
        return False


class _Weights(TorchFunctionMode):
    """Records the inputs, weights, biases and outputs of the linear maps in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []

    def __torch_function__(
        self, func: TorchFunction, types: object, args: Sequence[PyTree] = (), kwargs: PyTree = None
    ) -> PyTree:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _NAMES:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            self.calls.append((named["input"], named["weight"], named.get("bias"), output))
        return output


_NAMES = ("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)))


@torch.no_grad()
def effective_layer(layer: nn.Module) -> nn.Module | None:
    """Return a layer of torch's own class that computes the same as ``layer``, a subclass with its own forward.

    Weight standardisation or equalised learning rates compute weights from parameters. The weights are read from the
    call of the linear map and tried on two inputs. None if they differ, or if ``layer`` is no such subclass.
    """
    base = base_of(layer)
    weight = getattr(layer, "weight", None)
    if base is None or not has_own_forward(layer) or type(layer).__module__.startswith(("torch.", "peft.")):
        return None
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    training = layer.training
    layer.eval()
    try:
        return _effective(layer, base, weight)
    except _UNFIT:
        return None
    finally:
        layer.train(training)


def _effective(layer: Any, base: type[nn.Module], weight: Tensor) -> nn.Module | None:
    plain: nn.Module | None = None
    for number in range(2):
        x = _noise(layer, weight, number)
        with _Weights() as weights:
            expected = layer(x)
        if len(weights.calls) != 1:
            return None
        taken, effective, bias, returned = weights.calls[0]
        if taken is not x or returned is not expected or effective.shape != weight.shape:
            return None
        if plain is None:
            plain = _plain(layer, base, effective, bias)
        elif not torch.equal(plain.get_parameter("weight"), effective):
            return None
        if not torch.equal(plain(x), expected):
            return None
    return plain


def _noise(layer: Any, weight: Tensor, number: int) -> Tensor:
    """Return an input for a layer, different for each ``number``."""
    generator = torch.Generator().manual_seed(_SEED + number)
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (2, 3 + number, layer.in_features)
    else:
        reach = zip(layer.kernel_size, layer.dilation, strict=True)
        shape = (2, layer.in_channels, *(d * (k - 1) + 4 + number for k, d in reach))
    return torch.randn(shape, generator=generator).to(weight)


def _plain(layer: Any, base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a layer of the class ``base`` with the sizes of ``layer`` and these weights."""
    if base is nn.Linear:
        made = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    else:
        names = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
        sizes = {n: getattr(layer, n) for n in names if n != "output_padding" or "Transpose" in base.__name__}
        sizes |= {"bias": bias is not None, "device": "meta"}
        made = base(layer.in_channels, layer.out_channels, layer.kernel_size, **sizes)
    trained = any(p.requires_grad for p in layer.parameters())
    made.weight = _parameter(weight, trained)
    if bias is not None:
        made.bias = _parameter(bias, trained)
    # Attributes that the network around it may read.
    made.__dict__ |= {n: value for n, value in vars(layer).items() if n not in vars(made) and not callable(value)}
    return made.train(layer.training)


def _parameter(tensor: Tensor, trained: bool) -> nn.Parameter:
    # An unchanged parameter stays the same object, so that tied weights stay tied.
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().clone(), requires_grad=trained)
