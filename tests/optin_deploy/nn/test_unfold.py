import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optin_deploy.nn.unfold import (
    Geometry,
    columns_of,
    columns_per_unit,
    design,
    design_rows,
    set_weight_matrix,
    some_rows,
    weight_matrix,
)
from optin_deploy.structure.groups import channels_last


@st.composite
def projections(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A linear layer or a convolution, and an input for it; in float64."""
    inputs, outputs, batch = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bias = draw(st.booleans())
    if draw(st.booleans()):
        x = torch.randn(batch, draw(st.integers(1, 5)), inputs, generator=generator)
        return nn.Linear(inputs, outputs, bias=bias).double(), x.double()
    pairs, edges = (st.tuples(st.integers(low, 3), st.integers(low, 3)) for low in (1, 0))
    padding = draw(st.sampled_from(["same", "valid", None])) or draw(edges)
    x = torch.randn(batch, inputs, 8, 9, generator=generator).double()
    if draw(st.booleans()):
        stride, dilation = draw(pairs), draw(pairs)
        room = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        more = tuple(draw(st.integers(0, r)) for r in room)
        sizes = {"stride": stride, "padding": draw(edges), "dilation": dilation, "output_padding": more, "bias": bias}
        return nn.ConvTranspose2d(inputs, outputs, draw(pairs), **sizes).double(), x
    conv = nn.Conv2d(
        inputs,
        outputs,
        draw(pairs),
        stride=1 if padding == "same" else draw(pairs),
        padding=padding,
        dilation=draw(pairs),
        bias=bias,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    return conv.double(), x


def features_last(projection: nn.Module, y: Tensor) -> Tensor:
    """An output as ``(batch, positions, outputs)``."""
    return y if isinstance(projection, nn.Linear) else channels_last(y, 1).flatten(1, 2)


@given(drawn=projections())
@torch.no_grad()
def test_design_times_weights_is_the_forward(drawn: tuple[nn.Module, Tensor]) -> None:
    projection, x = drawn
    given_rows = design(projection, x) @ weight_matrix(projection).T
    if projection.bias is not None:
        given_rows = given_rows + projection.bias
    torch.testing.assert_close(given_rows, features_last(projection, projection(x)))


@given(drawn=projections(), data=st.data())
@torch.no_grad()
def test_the_columns_of_units_are_those_that_masking_zeroes(
    drawn: tuple[nn.Module, Tensor], data: st.DataObject
) -> None:
    projection, x = drawn
    axis = -1 if isinstance(projection, nn.Linear) else 1
    width = data.draw(st.sampled_from([w for w in (1, 2, 3) if x.shape[axis] % w == 0]))
    units = torch.tensor(sorted(data.draw(st.sets(st.integers(0, x.shape[axis] // width - 1)))), dtype=torch.long)
    masked = x.clone()
    for unit in units.tolist():
        masked.narrow(axis, unit * width, width).zero_()
    changed = design(projection, x)
    changed[..., columns_of(units, columns_per_unit(projection, width))] = 0
    assert torch.equal(changed, design(projection, masked))
    assert columns_per_unit(projection, width) * (x.shape[axis] // width) == changed.shape[-1]


@given(drawn=projections())
def test_weights_are_written_in_place(drawn: tuple[nn.Module, Tensor]) -> None:
    projection, x = drawn
    weight, doubled = projection.weight, 2 * weight_matrix(projection).detach()
    set_weight_matrix(projection, doubled)
    assert projection.weight is weight
    assert torch.equal(weight_matrix(projection), doubled)
    torch.testing.assert_close(design(projection, x) @ doubled.T, design(projection, x) @ weight_matrix(projection).T)


@given(drawn=projections(), data=st.data())
@torch.no_grad()
def test_rows_are_those_of_the_whole_design(drawn: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    projection, x = drawn
    whole = design(projection, x).flatten(0, 1)
    rows = some_rows(len(whole), data.draw(st.integers(1, len(whole))))
    assert torch.equal(design_rows(projection, x, rows), whole[rows])


@given(drawn=projections())
@torch.no_grad()
def test_output_size(drawn: tuple[nn.Module, Tensor]) -> None:
    projection, x = drawn
    if not isinstance(projection, nn.Linear):
        assert Geometry.of(projection).output_size(x.shape[2:]) == projection(x).shape[2:]


def test_grouped_convolutions_are_refused() -> None:
    with pytest.raises(AssertionError):
        design(nn.Conv2d(4, 4, 1, groups=2), torch.zeros(1, 4, 2, 2))
