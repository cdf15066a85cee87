"""Modules that replace modules without units."""

from torch import Tensor, nn

from optin_deploy.nn.unfold import Conv, Geometry


class Constant(nn.Module):
    """Replaces a projection without inputs: returns its bias, with as many dimensions as the input.

    The axes before the last have size 1, which a residual stream broadcasts, or with ``whole`` the input's sizes.
    """

    def __init__(self, bias: Tensor, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    @property
    def weight(self) -> Tensor:
        """The bias: modules around it, such as T5's feed-forward network, read the type of their parameters here."""
        return self.bias

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        # A copy, because the network may change it in place.
        if self.whole:
            return self.bias.expand(*x.shape[:-1], -1).clone()
        return self.bias.reshape((1,) * (x.dim() - 1) + (-1,))


class ConstantTuple(Constant):
    """`Constant` for an attention that returns its output and its weights."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states), None


class ConstantMap(Constant):
    """`Constant` for a convolution: its bias as ``(1, C, 1, …)``, or with ``whole`` of its output size."""

    def __init__(self, conv: Conv, bias: Tensor, whole: bool) -> None:
        super().__init__(bias, whole)
        self.geometry = Geometry.of(conv)

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        bias = self.bias.reshape(1, -1, *(1 for _ in x.shape[2:]))
        return bias.expand(x.shape[0], -1, *self.geometry.output_size(x.shape[2:])).clone() if self.whole else bias


class NoChannels(nn.Module):
    """Replaces a convolution that has no channel left: returns ``(batch, 0, …)`` of its output size."""

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        self.geometry = Geometry.of(conv)

    def forward(self, x: Tensor) -> Tensor:
        # A new tensor, because the network may change it in place.
        return x.new_zeros((x.shape[0], 0, *self.geometry.output_size(x.shape[2:])))


class PassTuple(nn.Module):
    """Return the first input as an attention would: output and no weights."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        return hidden_states, None
