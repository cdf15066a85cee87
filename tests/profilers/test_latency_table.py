import sys
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profilers import ProfilingError
from profilers.latency_table import LatencyTable, Row
from profilers.shrinkage import fit_rising, log_error, shrink_to_line
from profilers.table_cache import cache_folder, check_cache, read_table, save_table, table_file

SETTING = {"runtime": "ort-cpu", "batch_size": 1}
DEPTH = 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "optin-deploy" / "tables"


def samples(ms: float) -> list[list[float]]:
    """Three rounds around ``ms``, the last interrupted."""
    return [[ms, ms], [ms - 0.1, ms + 0.1], [ms, 9 * ms]]


def table(mlp: dict[int, float], attention: dict[tuple[int, int], float], fixed: float = 2.0) -> LatencyTable:
    """What one block costs by the units of its parts; the dense block costs the most of each together."""
    dense = max(mlp.values())
    rows = [Row("mlp", n, None, samples(fixed + DEPTH * ms)) for n, ms in mlp.items()]
    rows += [Row("attn", n, w, samples(fixed + DEPTH * ms)) for (n, w), ms in attention.items()]
    depths = {1: samples(fixed + dense), DEPTH: samples(fixed + DEPTH * dense)}
    return LatencyTable(SETTING, DEPTH, depths, tuple(rows))


MLP = {0: 1.0, 64: 3.0, 80: 4.0, 96: 4.0, 128: 4.0}
ATTENTION = {(0, 8): 2.0, (2, 4): 2.5, (2, 8): 3.0, (4, 4): 3.0, (4, 8): 4.0}


def test_differencing_two_depths_leaves_the_fixed_cost_out() -> None:
    assert table(MLP, ATTENTION, fixed=0.0).block_ms == pytest.approx(4.0)
    assert table(MLP, ATTENTION, fixed=50.0).block_ms == pytest.approx(4.0)


def test_the_grid_is_relative_to_the_dense_block() -> None:
    units, widths, ms = table(MLP, ATTENTION).grid("mlp")
    assert (units, widths) == ([0, 64, 80, 96, 128], [None])
    np.testing.assert_allclose(ms[:, 0], [-3.0, -1.0, 0.0, 0.0, 0.0], atol=1e-9)


def test_without_any_unit_the_width_does_not_matter() -> None:
    units, widths, ms = table(MLP, ATTENTION).grid("attn")
    assert (units, widths) == ([0, 2, 4], [4, 8])
    np.testing.assert_allclose(ms, [[-2.0, -2.0], [-1.5, -1.0], [-1.0, 0.0]], atol=1e-9)


def test_the_staircase_keeps_the_largest_size_of_every_level() -> None:
    assert table(MLP, ATTENTION).edges("mlp") == [0, 64, 128]


@settings(max_examples=100)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=4))
def test_rising_is_the_nearest_rising_sequence(values: list[int]) -> None:
    found = fit_rising(values)
    assert all(a <= b + 1e-12 for a, b in pairwise(found))

    def distance(other: tuple[float, ...] | list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(values, other, strict=True))

    # Levels of the nearest are means of runs of values: all of those, in all rising orders.
    means = {sum(values[i:j]) / (j - i) for i in range(len(values)) for j in range(i + 1, len(values) + 1)}
    best = min(map(distance, combinations_with_replacement(sorted(means), len(values))))
    assert distance(found) == pytest.approx(best, abs=1e-9)


def test_a_saved_table_is_read_again(cache: Path) -> None:
    made = table(MLP, ATTENTION)
    assert read_table(SETTING) is None
    path = save_table(made)
    assert path.parent == cache
    assert read_table(SETTING) == made
    assert read_table({**SETTING, "batch_size": 8}) is None
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_the_order_of_a_setting_does_not_matter() -> None:
    assert table_file({"a": 1, "b": 2}) == table_file({"b": 2, "a": 1})


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"rows": [{"part": 1}], "depths": {}}'])
def test_a_damaged_table_is_told(damage: str) -> None:
    path = save_table(table(MLP, ATTENTION))
    path.write_text(damage)
    with pytest.raises(ProfilingError, match="remove it"):
        read_table(SETTING)


# What noise can explain


def test_a_line_comes_back_out_of_noise() -> None:
    generator = np.random.default_rng(0)
    sizes = [(n, n * w, w) for n in range(1, 9) for w in (8, 16, 32)]
    truth = np.array([3 + 2.0 * n - 0.1 * w + 0.05 * n * w for n, _, w in sizes])
    noisy = truth + generator.normal(0, 0.5, len(sizes))
    found = np.array(shrink_to_line(sizes, noisy.tolist(), 0.5))
    assert np.abs(found - truth).mean() < 0.5 * np.abs(noisy - truth).mean()


def test_stairs_larger_than_the_noise_stay() -> None:
    sizes = [(n, 0, 0) for n in range(1, 33)]
    stairs = [10.0 * (1 + (n - 1) // 8) for n in range(1, 33)]
    np.testing.assert_allclose(shrink_to_line(sizes, stairs, 0.1), stairs, atol=0.02)
    assert shrink_to_line(sizes, stairs, 0.0) == stairs
    assert shrink_to_line(sizes[:2], stairs[:2], 5.0) == stairs[:2]


@given(st.integers(0, 2**16), st.sampled_from([0.003, 0.03]))
def test_the_error_is_that_of_a_mean_over_rounds(seed: int, spread: float) -> None:
    generator = np.random.default_rng(seed)
    logs = generator.normal(0, 0.2, (1, 16)) + generator.normal(1, 0.3, (30, 1)) + generator.normal(0, spread, (30, 16))
    samples = np.exp(logs)[:, :, None].tolist()
    assert log_error(samples) == pytest.approx(spread / 4, rel=0.25)


def test_the_dense_block_costs_nothing_beside_itself() -> None:
    generator = np.random.default_rng(1)
    for _ in range(20):
        noisy = table({n: 4.0 * n / 128 + 1 for n in range(0, 129, 16)}, ATTENTION)
        stacks = [[[ms * generator.uniform(0.7, 1.3) for ms in turn] for turn in row.samples_ms] for row in noisy.rows]
        rows = [replace(row, samples_ms=turns) for row, turns in zip(noisy.rows, stacks, strict=True)]
        assert replace(noisy, rows=tuple(rows)).grid("mlp")[2][-1, -1] == 0.0


@pytest.mark.parametrize("spread", [0.01, 0.05])
def test_the_error_is_that_from_load_to_load(spread: float) -> None:
    generator, loads = np.random.default_rng(3), 3
    of_load = generator.normal(1, 0.3, (60, 1)) + generator.normal(0, spread, (60, loads))
    # Rounds scatter little; many of them tell nothing about where in memory a network lies.
    logs = np.tile(of_load, 8) + generator.normal(0, 0.002, (60, 8 * loads))
    samples = np.exp(logs)[:, :, None].tolist()
    assert log_error(samples, loads) == pytest.approx(spread / loads**0.5, rel=0.25)
    assert log_error([turns[:2] for turns in samples], loads) == 0.0


def test_the_dense_block_s_own_noise_is_not_in_all_others() -> None:
    """A dense stack that happens to lie badly: savings are still those of the line through all sizes."""
    generator, loads = np.random.default_rng(4), 3
    sizes = {n: 1 + 3 * n / 1536 for n in range(0, 1537, 128)}
    rows = []
    for units, ms in sizes.items():
        of_load = generator.normal(1.05 if units == 1536 else 1.0, 0.03, loads)
        rows.append(Row("mlp", units, None, [[DEPTH * ms * of_load[turn % loads]] for turn in range(4 * loads)]))
    dense = rows[-1].samples_ms
    found = LatencyTable(SETTING, DEPTH, {1: dense, DEPTH: dense}, tuple(rows), loads)
    raw = found.saved_ms(next(row for row in rows if row.units == 768))
    units, _, cells = found.grid("mlp")
    assert abs(raw - 1.5) > 0.15
    assert -cells[units.index(768), 0] == pytest.approx(1.5, abs=0.12)


def test_without_rounds_in_common_no_error_is_told() -> None:
    assert log_error([[[1.0], [2.0]]]) == 0.0
    assert log_error([[[1.0]], [[2.0]]]) == 0.0
    assert log_error([[[1.0], [1.0]], [[2.0]]]) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_the_cache_is_where_it_has_always_been(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", None):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if unset is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == tmp_path / "home" / ".cache" / "optin-deploy" / "tables"


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ProfilingError, match=r"Not a directory.*XDG_CACHE_HOME"):
        check_cache()
