from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from together import together
from torch import Tensor

from optin_deploy.criteria import scoring
from optin_deploy.criteria.registry import Criterion
from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.distributed.ranks import SINGLE_PROCESS, Ranks, Shared, own_indices, ranks_of
from optin_deploy.errors import UserError
from optin_deploy.pruning.pruner import prune
from optin_deploy.pruning.removal import Remover
from optin_deploy.search.costs import flop_costs
from optin_deploy.tokens.find_stack import token_stack
from optin_deploy.tokens.merge_loss import measure_merge_loss

pytestmark = pytest.mark.slow


WAYS = [
    *((criterion, "sketch") for criterion in get_args(Criterion)),
    *(("trajectory", scorer) for scorer in get_args(scoring.Scorer) if scorer != "sketch"),
]


def some_batches(name: str) -> list[tiny.Batch]:
    """Five, so that neither two nor three processes get equal shares."""
    return [tiny.batches(tiny.network(name), 1, size=3 + i % 2)[0] for i in range(5)]


def all_scores(name: str, ranks: Ranks) -> dict[str, Tensor]:
    network, structure = tiny.network(name), tiny.structure(name)
    batches = Shared(some_batches(name), ranks)
    costs = flop_costs(network.module, structure, network.inputs)
    labels = [torch.arange(len(next(iter(batch.values())))) % 3 for batch in batches]
    found = {}
    for criterion, scorer in WAYS:
        if criterion == "fisher" and network.logits is None:
            continue
        given = Scoring(criterion, scorer, probes=3, task_weight=0.5, seed=2)
        scores = score(network, structure, costs, batches, given, labels=labels)
        found |= {f"{criterion} {scorer} {group}": values for group, values in scores.items()}
    return found


@pytest.mark.parametrize(("name", "world"), [("vit", 2), ("vit", 3), ("bert", 3), ("plain_resnet", 2)])
def test_scores_are_those_of_one_process(name: str, world: int, tmp_path: Path) -> None:
    expected = all_scores(name, SINGLE_PROCESS)
    for found in together(partial(all_scores, name), world, tmp_path):
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            torch.testing.assert_close(found[key], values, rtol=1e-6, atol=0, msg=key)


def pruned(name: str, ranks: Ranks, **options: Any) -> dict[str, Tensor]:
    network = tiny.network(name)
    small = prune(network, Shared(some_batches(name), ranks), 0.6, align=2, **options).network.module
    return dict(small.state_dict())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {}),
        ("vit", {"rounds": 2, "narrow": True}),
        ("vit", {"tokens": "auto"}),
        ("bert", {}),
        ("plain_resnet", {"ridge": None}),
    ],
    ids=str,
)
def test_weights_are_those_of_one_process(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = pruned(name, SINGLE_PROCESS, **options)
    for found in together(partial(pruned, name, **options), 3, tmp_path):
        for key, weights in expected.items():
            torch.testing.assert_close(found[key], weights, rtol=1e-5, atol=1e-5, msg=key)


def measured(ranks: Ranks) -> dict[str, Tensor]:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    stack = token_stack(network.module, network.inputs, structure)
    batches = Shared(some_batches("vit"), ranks)
    return {"loss": torch.from_numpy(measure_merge_loss(network, structure, stack, batches, Scoring()).loss)}


def test_merging_costs_what_it_costs_one_process(tmp_path: Path) -> None:
    for found in together(measured, 2, tmp_path):
        torch.testing.assert_close(found["loss"], measured(SINGLE_PROCESS)["loss"], rtol=1e-6, atol=0)


class PositionError(UserError):
    def __init__(self, line: int, column: int) -> None:
        super().__init__("of a subclass")


def refused_by_subclass() -> None:
    raise PositionError(1, 2)


def exchanged(ranks: Ranks) -> dict[str, Tensor]:
    """What the main process makes reaches all, and so do errors, whoever has them."""

    def refused(message: str) -> str:
        raise UserError(message)

    assert ranks.broadcast_object(lambda: {"rank": ranks.rank, "kept": (1, 2)}) == {"rank": 0, "kept": (1, 2)}
    assert ranks.check_consistent(lambda: ("same", ranks.rank), itemgetter(0)) == ("same", ranks.rank)
    assert ranks.on_main(lambda: {1, 2}) == (None if ranks.rank else {1, 2})
    with pytest.raises(UserError, match=r"^from the main one$"):
        ranks.broadcast_object(lambda: refused("from the main one"))
    with pytest.raises(UserError, match=r"^of a subclass$"):
        ranks.on_main(refused_by_subclass)
    with pytest.raises(UserError, match=r"^rank 1: no file$"):
        ranks.check_consistent(lambda: refused("no file") if ranks.rank == 1 else "fine", str)
    with pytest.raises(UserError, match=r"^no model$"):
        ranks.check_consistent(lambda: refused("no model"), str)
    with pytest.raises(UserError, match=r"^rank 1 has other weights"):
        ranks.check_consistent(lambda: f"mine {ranks.rank}" * (1 + ranks.rank), str)
    own = torch.full((2, 3), float(ranks.rank + 1))
    return {
        "given": ranks.broadcast(lambda: own, own),
        **ranks.all_reduce({"sum": own, "count": torch.tensor(ranks.rank)}),
    }


def test_processes_exchange(tmp_path: Path) -> None:
    for found in together(exchanged, 2, tmp_path):
        assert torch.equal(found["given"], torch.ones(2, 3))
        assert torch.equal(found["sum"], torch.full((2, 3), 3.0, dtype=torch.float64))
        assert float(found["count"]) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_piece_of_work_is_done_once(count: int, world: int) -> None:
    everyone = [Ranks(rank, world) for rank in range(world)]
    shares = [ranks.shard(count) for ranks in everyone]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    costs = [float((7 * i) % 5 + 1) for i in range(count)]
    weighed = [ranks.balanced_shard(costs) for ranks in everyone]
    assert sorted(i for share in weighed for i in share) == list(range(count))
    loads = [sum(costs[i] for i in share) for share in weighed]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_batches_of_nobody_else() -> None:
    batches: Sequence[tiny.Batch] = [{"x": torch.zeros(1)}] * 3
    assert ranks_of(batches) == SINGLE_PROCESS and own_indices(batches) == range(3)
    shared = Shared(batches, Ranks(1, 2))
    assert own_indices(shared) == range(1, 3)
    assert ranks_of(shared[:2]) == Ranks(1, 2) and len(shared[:2]) == 2


def sparse(ranks: Ranks) -> dict[str, Tensor]:
    network = tiny.network("vit")
    batches = Shared(some_batches("vit"), ranks)
    found = prune(network, batches, 0.7, align=4)
    Remover(network, found.space, batches, "auto").make_sparse(found.network.module, found.plan)
    return dict(found.network.module.state_dict())


def test_sparse_weights_are_those_of_one_process(tmp_path: Path) -> None:
    expected = sparse(SINGLE_PROCESS)
    for found in together(sparse, 2, tmp_path):
        for key, weights in expected.items():
            torch.testing.assert_close(found[key], weights, rtol=1e-5, atol=1e-5, msg=key)
