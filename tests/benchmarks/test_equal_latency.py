import sys
from pathlib import Path

import pytest

# The benchmarks are scripts: they import each other by name.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from equal_latency import Row, at_equal_time, verdict

from profilers.stats import Interval

pytestmark = pytest.mark.slow


def row(seed: int, latency: tuple[float, float], spearman: tuple[float, float]) -> Row:
    return Row(8, seed, 0.5, latency, Interval(1.0, 0.9, 1.1), latency, spearman, spearman)


def test_networks_are_compared_at_the_time_that_one_of_them_takes() -> None:
    rows = [row(0, (0.6, 0.55), (80.0, 79.5)), row(0, (0.4, 0.4), (76.0, 76.5)), row(0, (0.9, 0.9), (90.0, 90.0))]
    # At 0.55 a FLOP budget would give 79; at 0.3 the line goes on.
    assert at_equal_time(rows, "spearman") == pytest.approx([0.5, 0.5, 0.0])
    beyond = [row(0, (0.6, 0.3), (80.0, 75.0)), row(0, (0.4, 0.4), (76.0, 76.0))]
    assert at_equal_time(beyond, "spearman") == pytest.approx([1.0, 0.0])


def test_other_seeds_and_single_budgets_are_no_comparison() -> None:
    rows = [row(0, (0.6, 0.5), (80.0, 79.0)), row(1, (0.4, 0.5), (70.0, 71.0))]
    assert at_equal_time(rows, "spearman") == []
    assert verdict(rows) == ""


def test_the_verdict_has_means_and_standard_errors() -> None:
    rows = [row(0, (0.6, 0.6), (80.0, 81.0)), row(0, (0.4, 0.4), (76.0, 79.0))]
    assert "Spearman × 100 +2.0000 ± 1.0000" in verdict(rows)
