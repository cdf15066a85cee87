"""Attentions with one position bias for all layers, sliced to fewer heads.

The bias has the heads of the dense network. Every sliced layer selects its own heads from it and passes on the whole
bias, so that layers may keep different heads.
"""

import functools
import inspect
from typing import Any

from torch import Tensor, nn

ARGUMENT = "position_bias"
_HEADS_DIM = 1


class OwnHeads(nn.Module):
    """Base of the resizable classes: ``kept_heads`` stores the dense network's indices of the heads left."""

    kept_heads: Tensor

    def keep_units(self, units: Tensor) -> None:
        """Keep the ``units`` of the present heads. Slicing calls this."""
        before = getattr(self, "kept_heads", None)
        kept = units if before is None else before.cpu()[units]
        device = next(self.parameters()).device
        # Not in the state dict, because slicing by the same plan restores it.
        self.register_buffer("kept_heads", kept.to(device), persistent=False)

    def own(self, whole: Tensor) -> Tensor:
        """Return this layer's heads of a bias ``(…, heads, queries, keys)``. A bias with one head is shared by all."""
        return whole if whole.shape[_HEADS_DIM] == 1 else whole.index_select(_HEADS_DIM, self.kept_heads)


def takes_position_bias(module: nn.Module) -> bool:
    """Return whether ``module`` takes a position bias as an argument."""
    return ARGUMENT in inspect.signature(type(module).forward).parameters or isinstance(module, OwnHeads)


def resizable_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that attentions of ``cls`` get when they are sliced."""
    return cls if issubclass(cls, OwnHeads) else _derived(cls)  # type: ignore[arg-type]


@functools.cache
def _derived(cls: type[nn.Module]) -> type[nn.Module]:
    signature = inspect.signature(cls.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        whole = bound.arguments.get(ARGUMENT)
        if whole is None:
            return _with_own_bias(self, cls, bound)
        bound.arguments[ARGUMENT] = own = self.own(whole)
        output = cls.forward(*bound.args, **bound.kwargs)
        return tuple(whole if part is own else part for part in output) if isinstance(output, tuple) else output

    return type(f"{cls.__name__}WithOwnHeads", (OwnHeads, cls), {"forward": forward, "__module__": cls.__module__})


def _with_own_bias(module: Any, cls: Any, bound: inspect.BoundArguments) -> Any:
    """Run an attention that computes the bias itself, from a table or as zeros, and returns it after its output."""
    made: list[tuple[Tensor, Tensor]] = []

    def compute_bias(*args: Any, **kwargs: Any) -> Tensor:
        whole = cls.compute_bias(module, *args, **kwargs)
        made.append((whole, module.own(whole)))
        return made[-1][1]

    module.compute_bias = compute_bias
    try:
        output = cls.forward(*bound.args, **bound.kwargs)
    finally:
        del module.compute_bias
    if not isinstance(output, tuple) or len(output) < 2 or not isinstance(output[1], Tensor):
        return output
    returned = output[1]
    # A bias of zeros and an added mask are the same for all heads.
    whole = returned[:, :1]
    if made:
        table, own = (bias[:, :, -returned.shape[2] :] for bias in made[0])
        whole = made[0][0] if returned is made[0][1] else table + (returned - own)[:, :1]
    return (output[0], whole, *output[2:])
