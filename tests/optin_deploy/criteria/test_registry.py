import subprocess
import sys
from typing import get_args

import pytest
import tiny
import torch
from torch import Tensor

from optin_deploy.criteria import registry
from optin_deploy.criteria.registry import CRITERIA, Criterion, CriterionSpec, list_names
from optin_deploy.criteria.scoring import Scoring, ScoringInputs, score
from optin_deploy.search.costs import flop_costs


def score_by_position(inputs: ScoringInputs) -> dict[str, Tensor]:
    return {group.name: torch.arange(group.units).double() for group in inputs.structure.groups}


def test_every_criterion_has_one_row_with_a_function() -> None:
    assert tuple(CRITERIA) == get_args(Criterion)
    assert all(callable(spec.load()) for spec in CRITERIA.values())


def test_a_row_and_a_function_are_enough_for_a_new_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    row = CriterionSpec("position", f"{__name__}:score_by_position")
    monkeypatch.setitem(CRITERIA, "position", row)
    network, structure = tiny.network("vit"), tiny.structure("vit")
    costs = flop_costs(network.module, structure, network.inputs)
    scores = score(network, structure, costs, tiny.batches(network, 1), Scoring("position"))
    assert all(torch.equal(scores[g.name], torch.arange(g.units).double()) for g in structure.groups)


def test_the_table_is_read_without_torch() -> None:
    code = f"import sys; import {registry.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_names_become_words() -> None:
    assert [list_names(names) for names in (("a",), ("a", "b"), ("a", "b", "c"))] == ["a", "a or b", "a, b or c"]
