"""What merging tokens gives: heads and neurons alone (β), with tokens (τ), tokens alone; and what merging itself costs.

    python benchmarks/tokens.py --part maps --data-root ../shared/data --threads 1
    python benchmarks/tokens.py --part texts --data-root ../shared/data --threads 1
    python benchmarks/tokens.py --part schedules --data-root ../shared/data --threads 1
    python benchmarks/tokens.py --part overhead --threads 1
    python benchmarks/tokens.py --part tome --tome ../ToMe --threads 1

- maps: vit_small_saliency pruned in the three ways; its maps on photographs that were not calibrated on against the
  dense ones, and its ONNX files in turns with the dense one.
- texts: MiniLM in the three ways, judged on STS-B dev.
- schedules: vit_small_saliency with all units and fewer tokens: merging as the search has it, before every block alike,
  before three blocks (those behind a quarter, half and three quarters), and leaving out what would merge. ``predicted``
  is what the search takes a schedule to lose.
- overhead: deit_small with random weights, at batch 8: dense, merging 13 tokens a block, leaving out as many instead,
  and τ at half of the FLOPs (half of what is removed by tokens) take turns. What merging takes beyond leaving out,
  against the dense time, is its overhead.
- tome: deit_small merging 13 tokens a block by the code of Token Merging (Bolya et al.; give its repository, whose
  licence is not commercial and of which nothing is here) and by ours at the same FLOPs, in torch, interleaved, batch 8.

Rows are kept in ``results/DEVICE/tokens.json``; those of a part are replaced. ``--table`` only prints them.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import cases
import common
import torch
from realised_ratio import export
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import optin_deploy
from optin_deploy import Network
from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.head_rotation import rotate_heads_to_pca
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.rounds import remove_in_rounds
from optin_deploy.pruning.settings import PruneSettings
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.costs import TokenCosts, token_costs
from optin_deploy.tokens.matching import Matching, merge_tokens
from optin_deploy.tokens.merge_loss import measure_merge_loss
from optin_deploy.tokens.merging import MergingBlocks, with_merging
from optin_deploy.tokens.schedule import best_schedule, share_schedule
from optin_deploy.tokens.stack import TokenStack
from profilers.measure import Case, loads_for, measure_files
from profilers.stats import ratio_interval

PARTS = ("maps", "texts", "schedules", "overhead", "tome")
Row = dict[str, Any]
RESULT = common.ResultFile("tokens", Row)
_RATE = 13
_TURNS = 40


class LeavingOut(MergingBlocks):
    """What would merge into another token is left out."""

    def join(self, x: Tensor, sizes: Tensor, match: Matching) -> tuple[Tensor, Tensor]:
        return merge_tokens(x, sizes, replace(match, joining=torch.zeros_like(match.joining)))


class DroppingBlocks(MergingBlocks):
    """Leaves out the last tokens, as many as would merge."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        for index, block in enumerate(self._modules.values()):
            assert block is not None
            x = block(x[:, : self.schedule[index]], *args, **kwargs)
        return torch.cat([x, x[:, -1:].expand(-1, self.stack.tokens - x.shape[1], -1)], dim=1)


def ways(network: Network, batches: list[dict[str, Tensor]], budgets: list[float]) -> Iterator[tuple[Row, nn.Module]]:
    """The network pruned in all ways to all budgets, from one scoring; ways that do not reach one are left out."""
    scoring = Scoring()
    space = analyze(network, tokens=True)
    structure, stack = space.structure, space.stack
    assert stack is not None
    dense = rotate_heads_to_pca(network, structure, batches)
    scores = score(dense, structure, space.costs, batches, scoring)
    merge_loss = measure_merge_loss(dense, structure, stack, batches, scoring)
    costs = token_costs(dense.module, structure, space.costs, stack, dense.inputs)
    for asked in budgets:
        schedules = {"β": (), "τ": best_schedule(structure, scores, costs, asked, 64, merge_loss)}
        with suppress(optin_deploy.UserError):
            schedules["tokens"] = share_schedule(structure, costs, asked, merge_loss)
        for way, schedule in schedules.items():
            if way == "tokens":
                module = copy.deepcopy(network.module)
                with_merging(module, structure, stack, Plan({}, schedule))
            else:
                settings = PruneSettings(asked, scoring)
                remover = Remover(dense, space, batches, settings.ridge)
                _, module = remove_in_rounds(remover, scores, settings, schedule)
            flops = count_flops(module, network.inputs) / space.costs.total
            yield {"way": way, "asked": asked, "flops": flops, "schedule": list(schedule)}, module


def maps(given: Namespace) -> Iterator[Row]:
    """See the module's first lines."""
    return judged(cases.saliency_maps(given.data_root, 0, given.samples), given)


def texts(given: Namespace) -> Iterator[Row]:
    """See the module's first lines."""
    return judged(cases.stsb(given.data_root, 0, None), given)


def judged(case: cases.Case, given: Namespace) -> Iterator[Row]:
    """A row of quality and speed for every way and budget."""
    budgets = [float(part) for part in given.flops.split(",")]
    for row, module in ways(case.network, [dict(batch) for batch in case.batches], budgets):
        speed = timed(case.network, {"pruned": module}, given, (1, 8))
        yield {**row, **case.measure(module), "speed": speed["pruned"]}


def schedules(given: Namespace) -> Iterator[Row]:
    """See the module's first lines."""
    case = cases.saliency_maps(given.data_root, 0, given.samples)
    network = case.network
    space = analyze(network, tokens=True)
    structure, stack = space.structure, space.stack
    assert stack is not None
    batches = [dict(batch) for batch in case.batches]
    costs = token_costs(network.module, structure, space.costs, stack, network.inputs)
    merge_loss = measure_merge_loss(network, structure, stack, batches, Scoring())
    for asked in (float(part) for part in given.flops.split(",")):
        searched = share_schedule(structure, costs, asked, merge_loss)
        depth = len(stack.blocks)
        found = {
            "merging, as searched": (MergingBlocks, searched),
            "leaving out, as searched": (LeavingOut, searched),
            "merging, every block alike": (MergingBlocks, alike(costs, asked, range(1, depth))),
            "merging, three blocks": (MergingBlocks, alike(costs, asked, [depth // 4, depth // 2, 3 * depth // 4])),
        }
        for way, (kind, schedule) in found.items():
            module = copy.deepcopy(network.module)
            with_merging(module, structure, stack, Plan({}, schedule))
            made = module.get_submodule(stack.name)
            assert isinstance(made, MergingBlocks)
            parent, _, name = stack.name.rpartition(".")
            blocks = dict(made.named_children())
            setattr(module.get_submodule(parent), name, kind(blocks, stack, schedule, made.heads).eval())
            flops = count_flops(module, network.inputs) / space.costs.total
            row = {"way": way, "asked": asked, "flops": flops, "schedule": list(schedule), "speed": {}}
            if kind is MergingBlocks:
                row["predicted"] = merge_loss.of(schedule, stack.prefix)
            yield {**row, **case.measure(module)}


def alike(costs: TokenCosts, asked: float, blocks: Iterable[int]) -> tuple[int, ...]:
    """The schedule that keeps the same part of the patches before each of these ``blocks``, and of the FLOPs what is
    ``asked`` for or a little less."""
    stack, merging = costs.stack, set(blocks)

    def schedule(part: float) -> tuple[int, ...]:
        left, made = float(stack.tokens - stack.prefix), []
        for block in range(len(stack.blocks)):
            left *= part if block in merging else 1.0
            made.append(stack.prefix + round(left))
        return tuple(made)

    low, high = 0.5, 1.0
    for _ in range(30):
        part = (low + high) / 2
        low, high = (low, part) if costs.at(schedule(part)).of(Plan({})) > asked * costs.total else (part, high)
    return schedule(low)


def timed(network: Network, modules: Mapping[str, nn.Module], given: Namespace, sizes: tuple[int, ...]) -> Row:
    """Name -> batch size -> dense ÷ module with its interval and the module's median, ONNX files in turns."""
    found: Row = {name: {} for name in modules}
    with TemporaryDirectory(prefix="optin-benchmark-") as folder:
        files = {}
        for name, module in {"dense": network.module, **modules}.items():
            export(network.with_module(module), Path(folder, name), ({n: t[:2] for n, t in network.inputs.items()},))
            files[name] = Path(folder, f"{name}.onnx")
        sample = network.sample_arrays()
        for size in sizes:
            measured = Case("ort-cpu", size, given.threads, given.seconds, loads=loads_for("ort-cpu", files.values()))
            samples = measure_files(files, sample, measured, [("dense", name) for name in modules]).samples_ms
            for name in modules:
                found[name][str(size)] = asdict(ratio_interval(samples["dense"], samples[name]))
    return found


def deit_small(given: Namespace) -> tuple[Network, TokenStack, Any]:
    """With random weights, which make no difference to its speed."""
    network = optin_deploy.load_network("deit_small", weights="random")
    space = analyze(network, tokens=True)
    assert space.stack is not None
    return network, space.stack, space


def overhead(given: Namespace) -> list[Row]:
    """See the module's first lines."""
    network, stack, space = deit_small(given)
    schedule = tuple(stack.tokens - _RATE * block for block in range(len(stack.blocks)))
    merging = copy.deepcopy(network.module)
    with_merging(merging, space.structure, stack, Plan({}, schedule))
    dropping = copy.deepcopy(network.module)
    dropping.blocks = DroppingBlocks(dict(dropping.blocks.named_children()), stack, schedule, (0,) * len(schedule))
    calibration = optin_deploy.load_calibration(network, None, samples=32)
    pruned = optin_deploy.prune(network, calibration.batches, flops=0.5, tokens="auto", tokens_share=0.5)
    modules = {"merging": merging, "leaving out": dropping.eval(), "τ": pruned.network.module}
    rows = []
    for name, speed in timed(network, modules, given, (8,)).items():
        flops = count_flops(modules[name], network.inputs) / space.costs.total
        rows.append({"way": name, "flops": flops, "speed": speed})
    times = [1 / row["speed"]["8"]["value"] for row in rows]
    rows[0]["overhead"] = times[0] - times[1]
    rows[2]["realised"] = rows[2]["speed"]["8"]["value"] * rows[2]["flops"]
    return rows


def tome(given: Namespace) -> list[Row]:
    """See the module's first lines."""
    if given.tome is None or not (given.tome / "tome" / "patch" / "timm.py").is_file():
        sys.exit("--part tome needs --tome DIR, a copy of Token Merging's repository")
    sys.path.insert(0, str(given.tome))
    from tome.patch import timm as patched  # type: ignore[import-not-found]

    network, stack, space = deit_small(given)
    theirs = copy.deepcopy(network.module)
    patched(theirs)
    theirs.r = _RATE
    # It merges in the middle of a block: two thirds of what a block costs are behind that.
    shift = round(_RATE * 2 / 3)
    schedule = tuple(stack.tokens - shift - _RATE * block for block in range(len(stack.blocks)))
    ours = copy.deepcopy(network.module)
    with_merging(ours, space.structure, stack, Plan({}, schedule))
    modules = {"dense": network.module, "ToMe": theirs, "ours": ours}
    image = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    samples = _in_turns(modules, image)
    inputs = {next(iter(network.inputs)): image[:1]}
    return [
        {
            "way": name,
            "flops": count_flops(module, inputs) / space.costs.total,
            "speed": {"8": asdict(ratio_interval(samples["dense"], samples[name]))},
            "ours": asdict(ratio_interval(samples[name], samples["ours"])),
        }
        for name, module in modules.items()
    ]


@torch.inference_mode()
def _in_turns(modules: Mapping[str, nn.Module], image: Tensor) -> dict[str, list[list[float]]]:
    """Milliseconds of each module, turn by turn."""
    samples: dict[str, list[list[float]]] = {name: [] for name in modules}
    for turn in range(_TURNS + 2):
        for name, module in modules.items():
            start = perf_counter()
            module(image)
            if turn >= 2:
                samples[name].append([1000 * (perf_counter() - start)])
    return samples


def table(rows: list[Row]) -> Table:
    """All rows, a line each."""
    made = Table(*("part", "way", "FLOPs", "speed-up, batch 1", "batch 8", "correlation", ""), box=None)
    for row in rows:
        speed = [_interval(row["speed"][size]) if size in row["speed"] else "" for size in ("1", "8")]
        extra = {
            "overhead": "of the dense time is merging",
            "realised": "realised",
            "ours": "× as fast is ours",
            "predicted": "predicted",
        }
        told = [f"{_value(row[key])} {words}" for key, words in extra.items() if key in row]
        correlation = next((f"{row[k]:.4f}" for k in ("correlation", "similarity correlation") if k in row), "")
        made.add_row(row["part"], row["way"], f"{row['flops']:.3f}", *speed, correlation, "; ".join(told))
    return made


def _value(found: Any) -> str:
    return _interval(found) if isinstance(found, Mapping) else f"{found:.3g}"


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.2f} [{found['low']:.2f}–{found['high']:.2f}]"


def main() -> None:
    """Measure one part, keep its rows, print all."""
    made = common.parser(__doc__ or "")
    made.add_argument("--part", choices=PARTS)
    made.add_argument("--tome", type=Path)
    made.add_argument("--flops", default="0.8,0.7,0.6,0.5")
    made.add_argument("--samples", type=int, default=64, help="photographs to calibrate on")
    made.add_argument("--seconds", type=float, default=20.0, help="of the rounds of one measurement")
    made.add_argument("--table", action="store_true")
    given = made.parse_args()
    rows = RESULT.read()
    if not given.table:
        if given.part is None:
            made.error("give --part or --table")
        torch.set_num_threads(given.threads)
        parts: dict[str, Callable[[Namespace], Iterable[Row]]] = {
            "maps": maps,
            "texts": texts,
            "schedules": schedules,
            "overhead": overhead,
            "tome": tome,
        }
        rows = [row for row in rows if row["part"] != given.part]
        for row in parts[given.part](given):
            rows.append({"part": given.part, **row})
            print(rows[-1], flush=True)
            RESULT.write(rows)
    Console(width=160).print(table(rows))


if __name__ == "__main__":
    main()
