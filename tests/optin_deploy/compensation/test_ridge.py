import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optin_deploy.compensation.ridge import STRENGTHS, Moments, fit, solve

Data = tuple[Tensor, Tensor, Tensor | None]


def drawn(rows: int, features: int, outputs: int, seed: int = 0, weighted: bool = False) -> Data:
    """Rows, targets that follow them with noise, and weights of the rows; float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64) + 0.5
    truth = torch.randn(features, outputs, generator=generator, dtype=torch.float64)
    y = x @ truth + 1 + 0.5 * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    return x, y, torch.rand(rows, generator=generator, dtype=torch.float64) if weighted else None


def expected(data: Data, old: Tensor, strength: float, bias: bool) -> np.ndarray:
    """Least squares for the change, each row times the root of its weight, the penalty as further rows."""
    x, y, weights = (None if t is None else t.numpy() for t in data)
    before, roots = old.numpy(), np.sqrt(np.ones(len(x)) if weights is None else weights)[:, None]
    features = x.shape[1]
    design = roots * np.hstack([x, np.ones((len(x), 1))])
    missing = roots * y - design @ before
    penalty = np.sqrt(strength * np.square(design[:, :-1]).sum(0).mean()) if features else 0.0
    # A bias that stays takes no part.
    design = design if bias else design[:, :-1]
    design = np.vstack([design, penalty * np.eye(features, design.shape[1])])
    missing = np.vstack([missing, np.zeros((features, y.shape[1]))])
    change = scipy.linalg.lstsq(design, missing)[0] if design.shape[1] else np.zeros((0, y.shape[1]))
    return before + np.vstack([change, np.zeros((len(before) - len(change), y.shape[1]))])


@given(
    rows=st.integers(1, 30),
    features=st.integers(0, 8),
    outputs=st.integers(1, 4),
    strength=st.sampled_from([1e-4, 0.01, 1.0, 100.0]),
    bias=st.booleans(),
    weighted=st.booleans(),
)
def test_solutions_are_those_of_augmented_least_squares(
    rows: int, features: int, outputs: int, strength: float, bias: bool, weighted: bool
) -> None:
    data = drawn(rows, features, outputs, rows, weighted)
    old = torch.randn(features + 1, outputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = solve(Moments.of(*data), old, strength, bias=bias)
    np.testing.assert_allclose(given, expected(data, old, strength, bias), rtol=1e-6, atol=1e-7)
    if not bias:
        assert torch.equal(given[-1], old[-1])


@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_is_the_sum_of_squared_residuals(weighted: bool) -> None:
    x, y, weights = drawn(20, 5, 3, weighted=weighted)
    solution = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    residuals = (y - x @ solution[:-1] - solution[-1]).square().sum(1)
    total = float((residuals if weights is None else residuals * weights).sum())
    assert Moments.of(x, y, weights).error(solution) == pytest.approx(total)


def test_moments_of_parts_add_up() -> None:
    x, y, weights = drawn(20, 5, 3, weighted=True)
    whole = Moments.of(x, y, weights)
    first, second = (x[:7], y[:7], weights[:7]), (x[7:], y[7:], weights[7:])
    for parts in (Moments.of(*first) + Moments.of(*second), Moments.of(*first).add(*second)):
        torch.testing.assert_close(parts.gram, whole.gram)
        torch.testing.assert_close(parts.cross, whole.cross)
        assert parts.targets == pytest.approx(whole.targets)


def test_moments_of_many_features() -> None:
    x, y, weights = drawn(20, 300, 3, weighted=True)
    moments, rows = Moments.of(x, y, weights), torch.cat([x, torch.ones(20, 1)], dim=1)
    torch.testing.assert_close(moments.gram, rows.T @ weights.diag() @ rows)
    torch.testing.assert_close(moments.cross, rows.T @ weights.diag() @ y)


def test_sums_are_float64() -> None:
    x, y, _ = drawn(20, 5, 3)
    moments = Moments.of(x.float(), y.float())
    assert moments.gram.dtype == moments.cross.dtype == torch.float64
    assert solve(moments, torch.zeros(6, 3, dtype=torch.float64), 0.01).dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
def test_without_features_the_bias_is_the_mean(bias: bool) -> None:
    x, y, weights = drawn(20, 0, 3, weighted=True)
    old = torch.full((1, 3), 7.0, dtype=torch.float64)
    given = solve(Moments.of(x, y, weights), old, 0.1, bias=bias)
    mean = (weights[:, None] * y).sum(0, keepdim=True) / weights.sum()
    torch.testing.assert_close(given, mean if bias else old)


@pytest.mark.parametrize("strength", [0.0, 0.01])
def test_features_may_be_zero_or_repeat_each_other(strength: float) -> None:
    x, y, _ = drawn(20, 4, 3)
    x[:, 1], x[:, 3] = 0.0, x[:, 2]
    old = torch.zeros(5, 3, dtype=torch.float64)
    given = solve(Moments.of(x, y), old, strength)
    assert bool(given.isfinite().all())
    assert torch.equal(given[1], old[1])
    # Of equals, each takes half.
    torch.testing.assert_close(given[2], given[3], rtol=1e-2, atol=1e-2)
    everything_zero = solve(Moments.of(torch.zeros_like(x), y), old, strength)
    torch.testing.assert_close(everything_zero, torch.cat([old[:-1], y.mean(0, keepdim=True)]))


@pytest.mark.parametrize("noise", [0.01, 1.0, 3.0])
def test_the_strength_is_the_best_on_held_out_rows(noise: float) -> None:
    x, y, _ = drawn(40, 12, 3)
    y = y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    training, held_out = (x[:20], y[:20], None), (x[20:], y[20:], None)
    old = torch.zeros(13, 3, dtype=torch.float64)
    errors = {}
    for strength in STRENGTHS:
        solution = expected(training, old, strength, bias=True)
        errors[strength] = np.square(held_out[1] - held_out[0] @ solution[:-1] - solution[-1]).sum()
    best = min(errors, key=errors.__getitem__)
    given = fit(Moments.of(*training), Moments.of(*held_out), old, STRENGTHS, bias=True)
    np.testing.assert_allclose(given, expected((x, y, None), old, best, bias=True), rtol=1e-6, atol=1e-8)


def test_noise_asks_for_a_stronger_penalty() -> None:
    """So that the test above tries more than one strength."""
    chosen = []
    for noise in (0.01, 3.0):
        x, y, _ = drawn(40, 12, 3)
        y = y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        parts, old = (Moments.of(x[:20], y[:20]), Moments.of(x[20:], y[20:])), torch.zeros(13, 3, dtype=torch.float64)
        given = fit(*parts, old, STRENGTHS, bias=True)
        chosen += [s for s in STRENGTHS if torch.equal(given, solve(parts[0] + parts[1], old, s))]
    assert chosen[0] < chosen[1]


@pytest.mark.parametrize("bias", [True, False])
def test_what_does_worse_than_before_is_given_up(bias: bool) -> None:
    x, y, _ = drawn(30, 4, 3)
    truth = solve(Moments.of(x, y), torch.zeros(5, 3, dtype=torch.float64), 1e-9)
    # In training the targets are something else altogether.
    training, held_out = Moments.of(x[:20], -y[:20]), Moments.of(x[20:], y[20:])
    assert torch.equal(fit(training, held_out, truth, STRENGTHS, bias=bias), truth)


def test_with_no_rows_held_out_the_middle_strength_counts() -> None:
    data, old = drawn(30, 4, 3), torch.zeros(5, 3, dtype=torch.float64)
    given = fit(Moments.of(*data), None, old, (1e-9, 0.3, 1e9), bias=True)
    np.testing.assert_allclose(given, expected(data, old, 0.3, bias=True), rtol=1e-6)
