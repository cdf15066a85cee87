"""The coverage table: its driver, what its columns catch, and that fifth of its rows which has to hold at all times."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from optin_deploy.structure.adapters.registry import ADAPTERS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
_KNOWN = list(ADAPTERS)
import architectures as driver  # noqa: E402
import coverage_cases as cases  # noqa: E402
import coverage_worker as worker  # noqa: E402
from coverage_table import page, passed  # noqa: E402

pytestmark = pytest.mark.slow


_OWN = [adapter for adapter in ADAPTERS if adapter not in _KNOWN]
for _adapter in _OWN:
    ADAPTERS.remove(_adapter)


@pytest.fixture(autouse=True)
def own_adapters() -> Iterator[None]:
    """Adapters of the benchmark's own are there for its own tests only."""
    ADAPTERS.extend(_OWN)
    yield
    for adapter in _OWN:
        ADAPTERS.remove(adapter)


class Block(nn.Module):
    """An Mlp beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = timm.layers.Mlp(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Shuffled(nn.Module):
    """A product of its own, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(600)
        return x


class Crash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        os._exit(7)


def architecture(module: type[nn.Module]) -> cases.Architecture:
    return cases.Architecture(module.__name__, "wrappers", cases.sequences(8), make=module)


@pytest.mark.parametrize("name", [name for name, each in cases.ARCHITECTURES.items() if each.fifth])
def test_the_fifth_passes_every_column_but_time(name: str) -> None:
    row = worker.examined(cases.ARCHITECTURES[name], measure_seconds=0)
    assert row.columns == dict.fromkeys(("score", "slice", "budget", "reload", "onnx"))


def test_the_fifth_is_one_of_every_family_and_a_fifth() -> None:
    fifth = [each for each in cases.ARCHITECTURES.values() if each.fifth]
    assert {each.family for each in fifth} == {each.family for each in cases.ARCHITECTURES.values()}
    assert 0.15 <= len(fifth) / len(cases.ARCHITECTURES) <= 0.25


def test_every_row_is_told_whatever_happens_in_it() -> None:
    some = {f"own: {cls.__name__}": architecture(cls) for cls in (Block, Shuffled, Crash)}
    rows = dict(driver.run(some, driver.Limits(), jobs=2, seconds=0.0))
    endless = {"own: Endless": architecture(Endless)}
    rows |= dict(driver.run(endless, driver.Limits(clock_seconds=1), jobs=2, seconds=0.0))
    whole = {**rows["own: Block"]["columns"], "speed": None}
    assert passed({"columns": whole}) and not passed(rows["own: Block"])
    assert rows["own: Block"]["reached"] <= 0.5 and rows["own: Block"]["prunable"] == 1
    assert rows["own: Shuffled"]["columns"]["score"].startswith("nothing prunable found in")
    assert rows["own: Endless"]["columns"] == {"score": "took more than 1 s by the clock"}
    assert rows["own: Crash"]["columns"]["score"].startswith("its process ended with code 7")
    text = page(rows)
    assert "**0 of 4 architectures pass every column.**" in text
    assert "- Endless, scored: took more than 1 s by the clock" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 6


def test_a_cut_that_is_not_the_mask_fails_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(nn.Module):
        def __init__(self, module: nn.Module, *_: object) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x) * 1.001

    network = worker.network_of(architecture(Block))
    space = worker.analyze(network)
    plan = worker.Plan({"mlp": tuple(range(10))})
    worker._check_sliced(network, space, plan)
    monkeypatch.setattr(worker, "slice_network", Wrong)
    with pytest.raises(Exception, match="off masked"):
        worker._check_sliced(network, space, plan)


def test_a_budget_that_has_to_be_too_large_is_rounded_up() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.block = nn.Linear(8, 160), Block()
            self.back = nn.Linear(160, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(torch.tanh(self.back(self.before(x))))

    row = worker.examined(architecture(Half), measure_seconds=0)
    # 2,560 of 3,584 multiply-adds stay: 0.714.
    assert row.prunable == pytest.approx(1024 / 3584)
    assert row.asked == pytest.approx(0.75) and 0.74 <= (row.reached or 0) <= 0.75
    assert row.left_dense[0]["module"] in ("before", "back")


def test_names_with_commas_are_found() -> None:
    assert list(driver.chosen(driver._names("T5,LLaMA, grouped queries"), fifth=False)) == [
        "decoders: T5",
        "decoders: LLaMA, grouped queries",
    ]
    with pytest.raises(SystemExit, match="choose from"):
        driver.chosen(["nonsense"], fifth=False)
