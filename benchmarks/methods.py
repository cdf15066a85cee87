"""Ways to prune a case to budgets: ours by every criterion, and the baselines. Each scores once for all its budgets."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from baselines import corp, kprune, kwon, vbp
from cases import Case
from torch import nn

from optin_deploy.criteria.fisher import fisher_scores, mask_gradients
from optin_deploy.criteria.registry import Criterion
from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.errors import UserError
from optin_deploy.pruning.head_rotation import rotate_heads_to_pca
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.rounds import remove_in_rounds
from optin_deploy.pruning.settings import PruneSettings, Ridge
from optin_deploy.pruning.space import PruningSpace, analyze
from optin_deploy.search.knapsack import search
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

ALIGN = {"resnet20": 1, "resnet56": 1}


@dataclass(frozen=True)
class Outcome:
    """A pruned module, or why there is none; ``seconds`` are those of scores and compensation together."""

    method: str
    repair: str
    budget: float
    plan: Plan | None
    module: nn.Module | None
    seconds: float
    reason: str = ""


Method = Callable[[Case, Sequence[float], int], Iterator[Outcome]]


def by_criterion(
    criterion: Criterion, *, narrow: bool | None = None, repairs: Sequence[Ridge] = ("auto", None)
) -> Method:
    """Our own pruning by one criterion, with compensation and without."""

    def run(case: Case, budgets: Sequence[float], seed: int) -> Iterator[Outcome]:
        scoring = Scoring(criterion=criterion, seed=seed)
        name = criterion if narrow is None else f"{criterion}, whole heads"
        if criterion == "fisher" and case.labels is None:
            yield from (Outcome(name, "-", b, None, None, 0.0, "needs class labels") for b in budgets)
            return
        space = analyze(case.network, narrow=scoring.narrows_heads if narrow is None else narrow)
        if narrow is False and space == analyze(case.network):
            return
        start = perf_counter()
        dense = rotate_heads_to_pca(case.network, space.structure, case.batches)
        scores = score(dense, space.structure, space.costs, case.batches, scoring, labels=case.labels)
        scored = perf_counter() - start
        for budget in budgets:
            plan = search(space.structure, scores, space.costs, budget, ALIGN.get(case.name, 64))
            for ridge in repairs:
                start = perf_counter()
                module = Remover(dense, space, case.batches, ridge).remove(plan)
                seconds = scored + perf_counter() - start
                yield Outcome(name, "none" if ridge is None else "ridge", budget, plan, module, seconds)

    return run


def by_rounds(rounds: int) -> Method:
    """The default, but for the budget being approached in so many steps, scored anew each."""

    def run(case: Case, budgets: Sequence[float], seed: int) -> Iterator[Outcome]:
        space, scoring = analyze(case.network), Scoring(seed=seed)
        start = perf_counter()
        dense = rotate_heads_to_pca(case.network, space.structure, case.batches)
        scores = score(dense, space.structure, space.costs, case.batches, scoring)
        scored, align = perf_counter() - start, ALIGN.get(case.name, 64)
        for budget in budgets:
            start = perf_counter()
            settings = PruneSettings(budget, scoring, align=align, rounds=rounds)
            plan, module = remove_in_rounds(Remover(dense, space, case.batches, settings.ridge), scores, settings)
            seconds = scored + perf_counter() - start
            yield Outcome(f"{scoring.criterion}, {rounds} rounds", "ridge", budget, plan, module, seconds)

    return run


def by_kwon(case: Case, budgets: Sequence[float], seed: int) -> Iterator[Outcome]:
    """Kwon et al. in full: Fisher scores, rearrangement, least-squares rescaling of the masks."""
    name, repair = "fisher, rearranged", "rescale"
    if case.labels is None:
        yield from (Outcome(name, repair, b, None, None, 0.0, "needs class labels") for b in budgets)
        return
    space = analyze(case.network, narrow=False)
    start = perf_counter()
    gradients = mask_gradients(case.network, space.structure, case.batches, case.labels)
    scores = fisher_scores(gradients)
    scored = perf_counter() - start
    for budget in budgets:
        start = perf_counter()
        first = search(space.structure, scores, space.costs, budget, ALIGN.get(case.name, 64))
        plan = kwon.rearrange(first, gradients)
        module = slice_network(case.network.module, space.structure, plan)
        kwon.rescale(case.network, module, space.structure, plan, case.batches)
        yield Outcome(name, repair, budget, plan, module, scored + perf_counter() - start)


Baseline = Callable[..., tuple[Plan, nn.Module]]


def baseline(name: str, prune: Baseline) -> Method:
    """A method of others, with its own compensation."""

    def run(case: Case, budgets: Sequence[float], seed: int) -> Iterator[Outcome]:
        space: PruningSpace = analyze(case.network, narrow=False)
        for budget in budgets:
            start = perf_counter()
            try:
                plan, module = prune(case.network, space, case.batches, budget, seed=seed)
            except UserError as error:
                yield Outcome(name, "own", budget, None, None, 0.0, str(error))
                continue
            yield Outcome(name, "own", budget, plan, module, perf_counter() - start)

    return run


METHODS: dict[str, Method] = {
    "trajectory-obs": by_criterion("trajectory-obs"),
    "trajectory-obs-whole-heads": by_criterion("trajectory-obs", narrow=False),
    "trajectory-obs-2-rounds": by_rounds(2),
    "trajectory": by_criterion("trajectory"),
    "fisher": by_criterion("fisher"),
    "kwon": by_kwon,
    "magnitude": by_criterion("magnitude"),
    "random": by_criterion("random"),
    "corp": baseline("CORP", corp.prune),
    "vbp": baseline("variance-based", vbp.prune),
    "kprune": baseline("K-prune", kprune.prune),
}
