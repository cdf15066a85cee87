"""Attentions that are handed one bias of positions for all layers, a part for each head: what they do with fewer heads.

The bias has the heads of the dense network. Every layer that has lost some takes its own out of it, and hands on the
whole one, so that layers may keep different heads.
"""

import functools
import inspect
from typing import Any

from torch import Tensor, nn

ARGUMENT = "position_bias"
_HEADS_DIM = 1


class OwnHeads(nn.Module):
    """What the slim classes have in common: ``kept_heads`` are the heads left, in the dense network's numbers."""

    kept_heads: Tensor

    def keep_units(self, units: Tensor) -> None:
        """Called when the module is cut: ``units`` are those of the present heads that stay."""
        before = getattr(self, "kept_heads", None)
        kept = units if before is None else before.cpu()[units]
        device = next(self.parameters()).device
        # Not in the state dict: cutting by the same plan gives it again.
        self.register_buffer("kept_heads", kept.to(device), persistent=False)

    def own(self, whole: Tensor) -> Tensor:
        """This layer's part of a bias ``(…, heads, queries, keys)``; one that all heads share has a single head."""
        return whole if whole.shape[_HEADS_DIM] == 1 else whole.index_select(_HEADS_DIM, self.kept_heads)


def takes_position_bias(module: nn.Module) -> bool:
    """Whether ``module`` is handed a bias of positions by what calls it."""
    return ARGUMENT in inspect.signature(type(module).forward).parameters or isinstance(module, OwnHeads)


def slim_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that attentions of ``cls`` get when they are cut."""
    return cls if issubclass(cls, OwnHeads) else _derived(cls)  # type: ignore[arg-type]


@functools.cache
def _derived(cls: type[nn.Module]) -> type[nn.Module]:
    signature = inspect.signature(cls.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        whole = given.arguments.get(ARGUMENT)
        if whole is None:
            return _with_own_bias(self, cls, given)
        given.arguments[ARGUMENT] = own = self.own(whole)
        output = cls.forward(*given.args, **given.kwargs)
        return tuple(whole if part is own else part for part in output) if isinstance(output, tuple) else output

    return type(f"{cls.__name__}WithOwnHeads", (OwnHeads, cls), {"forward": forward, "__module__": cls.__module__})


def _with_own_bias(module: Any, cls: Any, given: inspect.BoundArguments) -> Any:
    """Run an attention that makes the bias itself, from a table or of zeros, and returns it next to its output."""
    made: list[tuple[Tensor, Tensor]] = []

    def compute_bias(*args: Any, **kwargs: Any) -> Tensor:
        whole = cls.compute_bias(module, *args, **kwargs)
        made.append((whole, module.own(whole)))
        return made[-1][1]

    module.compute_bias = compute_bias
    try:
        output = cls.forward(*given.args, **given.kwargs)
    finally:
        del module.compute_bias
    if not isinstance(output, tuple) or len(output) < 2 or not isinstance(output[1], Tensor):
        return output
    returned = output[1]
    # A bias of zeros, and a mask that may have been added, are the same for all heads.
    whole = returned[:, :1]
    if made:
        table, own = (bias[:, :, -returned.shape[2] :] for bias in made[0])
        whole = made[0][0] if returned is made[0][1] else table + (returned - own)[:, :1]
    return (output[0], whole, *output[2:])
