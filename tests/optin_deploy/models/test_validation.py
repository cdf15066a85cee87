"""What is taken in works, or one line says why not, before anything is scored."""

import copy
import functools
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from optin_deploy import api
from optin_deploy.config.recipe import make_recipe
from optin_deploy.criteria.scoring import Scoring
from optin_deploy.data.calibration import from_batches
from optin_deploy.errors import UserError
from optin_deploy.evaluation.agreement import agreement
from optin_deploy.models.custom import custom_network
from optin_deploy.models.validation.adopt import validate
from optin_deploy.network import Network, Source
from optin_deploy.pruning.pruner import prune
from optin_deploy.run.prepare import prepare

pytestmark = pytest.mark.slow


class Plain(nn.Module):
    """A feed-forward block beside a shortcut, of four tokens of six features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))])

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).mean(1))

    def body(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return x + self.blocks[0](x)


def sample(size: int = 3, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(size, 4, 6, generator=torch.Generator().manual_seed(seed))}


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    return [sample(4, seed) for seed in range(1, count + 1)]


def made(cls: Callable[[], nn.Module] = Plain) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def pruned_as(plain: Network, given: Network) -> None:
    """Both are pruned to the same network."""
    wanted, found = (prune(network, batches(), 0.7, align=1) for network in (plain, given))
    assert found.plan == wanted.plan
    for name, tensor in wanted.network.module.state_dict().items():
        torch.testing.assert_close(found.network.module.state_dict()[name], tensor, rtol=0, atol=0)


# What works, as the plain module does.


class KeepsGraph(Plain):
    """Keeps tensors that have a graph, by themselves and in lists and dictionaries."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.body(x)
        self.more = {"list": [self.seen * 2], "pair": (self.seen, None)}
        return self.head(self.seen.mean(1))


class Tables(Plain):
    """Makes a table at the first call and keeps it, as rotary embeddings do."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.ones(4, 1), persistent=False)
            self.cache = {4: torch.ones(4, 1)}
        x = self.embed(x) * self.table * self.cache[4]
        return self.head((x + self.blocks[0](x) * self.table).mean(1))


@functools.lru_cache
def ones(length: int) -> Tensor:
    return torch.ones(length, 1)


class CachedTables(Plain):
    """Takes a table of a function that keeps what it gave."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * ones(x.shape[1])
        return self.head((x + self.blocks[0](x) * ones(x.shape[1])).mean(1))


class Recomputed(Plain):
    """Computes its block again in the backward pass where it is told to."""

    grad_checkpointing = False

    def body(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return x + (recomputed(self.blocks[0], x, use_reentrant=True) if self.grad_checkpointing else self.blocks[0](x))


class KeywordOnly(Plain):
    def forward(self, *, x: Tensor) -> Tensor:
        return super().forward(x)


class AnyKeywords(Plain):
    def forward(self, **inputs: Tensor) -> Tensor:
        return super().forward(inputs["x"])


class Counting(Plain):
    """Counts its calls in a buffer that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


WORKING: dict[str, Callable[[], nn.Module]] = {
    "keeps a graph": KeepsGraph,
    "tables of its first call": Tables,
    "tables of a cached function": CachedTables,
    "keyword only": KeywordOnly,
    "any keywords": AnyKeywords,
    "counts": Counting,
}


@pytest.mark.parametrize("name", WORKING)
def test_it_is_pruned_as_without(name: str, tmp_path: Path) -> None:
    ones.cache_clear()
    network = custom_network(made(WORKING[name]), sample())
    plain = custom_network(made(), sample())
    wanted, found = (prune(each, batches(), 0.7, align=1) for each in (plain, network))
    assert found.plan == wanted.plan
    given, expected = found.network.forward(sample()), wanted.network.forward(sample())
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)
    assert all(each.passed for each in api.export_onnx(found.network, tmp_path / "small.onnx").parity)


def test_a_graph_that_the_caller_left_is_no_hindrance() -> None:
    module = made(KeepsGraph)
    module(**sample())
    assert module.seen.grad_fn is not None
    network = custom_network(module, sample())
    module(**sample())
    again = prune(network, batches(), 0.7, align=1)
    assert again.network.module.seen.shape[-1] == 8


@pytest.mark.parametrize("cls", [Tables, KeepsGraph])
def test_tensors_of_a_run_in_inference_mode_are_no_hindrance(cls: Any) -> None:
    module = made(cls).eval()
    with torch.inference_mode():
        module(**sample())
    pruned_as(custom_network(made(cls), sample()), custom_network(module, sample()))


def test_a_module_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module, inputs = made(), sample()
        network = custom_network(module, inputs)
    assert not any(p.is_inference() for p in network.module.parameters())
    assert not network.inputs["x"].is_inference()
    pruned_as(custom_network(made(), sample()), network)


def test_a_caller_in_inference_mode() -> None:
    network = custom_network(made(Tables), sample())
    with torch.inference_mode():
        made_there = prune(network, batches(), 0.7, align=1)
        assert made_there.plan == api.prune(network, batches(), 0.7, align=1).plan
        api.score(network, batches())
    assert made_there.plan == prune(network, batches(), 0.7, align=1).plan


def test_what_runs_before_scoring_leaves_no_tensors_of_inference_mode() -> None:
    network = custom_network(made(Tables), sample())
    agreement(network, network.module, batches())
    assert not network.module.table.is_inference()
    loss = network.module(**sample()).sum()
    loss.backward()


def test_tables_of_inference_mode_that_are_out_of_reach_do_no_harm() -> None:
    ones.cache_clear()
    expected = prune(custom_network(made(CachedTables), sample()), batches(), 0.7, align=1).plan
    ones.cache_clear()
    module = made(CachedTables).eval()
    with torch.inference_mode():
        module(**sample())
    assert prune(custom_network(module, sample()), batches(), 0.7, align=1).plan == expected
    ones.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_in_a_copy(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    module = made().to(dtype)
    network = custom_network(module, {"x": sample()["x"].to(dtype)})
    assert {p.dtype for p in network.module.parameters()} == {torch.float32}
    assert network.inputs["x"].dtype == torch.float32
    assert {p.dtype for p in module.parameters()} == {dtype}
    name = str(dtype).removeprefix("torch.")
    assert any(f"Cast from {name} to float32" in note for note in network.notes)
    assert f"Cast from {name} to float32" in caplog.text
    pruned_as(custom_network(made().to(dtype).float(), sample()), network)


def test_batches_of_another_precision_are_told() -> None:
    network = custom_network(made().half(), {"x": sample()["x"].half()})
    halves = [{"x": batch["x"].half()} for batch in batches()]
    with pytest.raises(UserError, match=r"batch 0, x \(1, 4, 6\) float16.* x \(1, 4, 6\) float32"):
        prune(network, halves, 0.7)


def test_integers_and_buffers_of_double_precision_stay() -> None:
    module = made()
    module.register_buffer("exact", torch.ones(3, dtype=torch.float64))
    network = custom_network(module, sample())
    assert network.module is module
    assert network.module.exact.dtype == torch.float64
    assert network.notes == ()


def test_checkpointing_is_turned_off_in_a_copy() -> None:
    module = made(Recomputed)
    module.grad_checkpointing = True
    network = custom_network(module, sample())
    assert module.grad_checkpointing
    assert not network.module.grad_checkpointing
    assert network.module.embed.weight is module.embed.weight
    assert any("checkpointing is turned off" in note for note in network.notes)
    pruned_as(custom_network(made(), sample()), network)
    # Turned on behind our back.
    again = custom_network(plain := made(Recomputed), sample())
    plain.grad_checkpointing = True
    pruned_as(custom_network(made(), sample()), again)


def test_checkpointing_of_timm_and_transformers() -> None:
    module = timm.create_model("test_vit", img_size=32, num_classes=10, depth=1)
    module.set_grad_checkpointing(True)
    network = custom_network(module, {"x": torch.randn(2, 3, 32, 32)})
    assert not network.module.grad_checkpointing
    bert = tiny.network("bert_classifier").module
    theirs = copy.deepcopy(bert)
    theirs.gradient_checkpointing_enable()
    found = custom_network(theirs, tiny.texts())
    assert not any(getattr(part, "gradient_checkpointing", False) for part in found.module.modules())
    assert set(custom_network(copy.deepcopy(bert), tiny.texts()).outputs) == set(found.outputs)


def test_data_parallel_is_taken_off() -> None:
    module = made()
    network = custom_network(nn.DataParallel(module), sample())
    assert network.module is module
    assert network.notes == ("Removed the wrapper DataParallel.",)


def test_the_module_itself_is_taken_where_nothing_is_wrong() -> None:
    module = made()
    network = custom_network(module, sample())
    assert network.module is module
    assert not module.training
    assert network.notes == ()


def test_inputs_lose_their_graph_and_class() -> None:
    class Image(Tensor):
        pass

    given = sample()["x"].clone().requires_grad_() * 2
    assert not custom_network(made(), {"x": given}).inputs["x"].requires_grad
    network = custom_network(made(), {"x": sample()["x"].as_subclass(Image)})
    assert type(network.inputs["x"]) is Tensor


def test_one_sample_is_enough() -> None:
    pruned_as(custom_network(made(), sample()), custom_network(made(), sample(1)))


def test_hooks_of_the_user_are_told_and_kept() -> None:
    module = made()
    module.blocks[0].register_forward_hook(lambda _, __, output: output * 2)
    network = custom_network(module, sample())
    assert network.notes == ("There are hooks on blocks.0: they run in every pass, and stay on the pruned module.",)
    small = prune(network, batches(), 0.7, align=1).network.module
    assert small.blocks[0]._forward_hooks


def test_changes_to_a_buffer_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    network = custom_network(made(Counting), sample())
    assert network.notes == ("Its forward changes calls: its current value is part of the pruned network.",)
    validate(network)
    prune(network, batches(), 0.7, align=1)
    assert caplog.text.count("changes calls") == 1


def test_the_random_numbers_of_the_caller_stay() -> None:
    module = made()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    prune(custom_network(module, sample()), batches(), 0.7, align=1)
    torch.testing.assert_close(torch.rand(3), expected)


# What is refused.


class Noisy(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, training=True))


class Remembering(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.mean.mul_(0.9).add_(output.detach().mean(0))
        return output - self.mean


class Growing(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.cache.append(self.body(x))
        return torch.cat(self.cache, 1)


class Stuck(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> "Stuck":
        return super().train(True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x))


class Scaling(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


class Fixed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(3, -1, 6))


class Single(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.squeeze(0)[None] if x.shape[0] == 1 else x.view(1, 4, 6))


class Squeezed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1].squeeze()


class Autocast(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


class AutocastFunctions(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = x @ torch.eye(6)
        return super().forward(x.float())


class ByPlace(Plain):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(inputs[0])


class ByPlaceOnly(Plain):
    def forward(self, x: Tensor, /) -> Tensor:
        return super().forward(x)


class NeedsMore(Plain):
    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x)


class Failing(Plain):
    def forward(self, x: Tensor) -> Tensor:
        raise LookupError("no such\n  table")


class Halves(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.half())


class Locked(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].guard = [threading.Lock()]


class Reading(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lines = (line for line in "ab")


def with_parameter(parameter: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = Plain()
        module.extra = nn.Parameter(parameter, requires_grad=False)
        return module

    return make


def quantized() -> nn.Module:
    module = Plain()
    module.head = torch.ao.nn.quantized.dynamic.Linear(8, 3)
    return module


def lazy() -> nn.Module:
    module = Plain()
    module.head = nn.LazyLinear(3)
    return module


def nan() -> nn.Module:
    module = Plain()
    module.head.bias.data[1] = float("nan")
    return module


def exported() -> nn.Module:
    return torch.export.export(Plain().eval(), (), sample()).module()  # type: ignore[no-any-return]


class Unnamed(nn.Module):
    """The wrapper of fully sharded parallel training, by its name."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "random": (Noisy, "Noisy gives another output when it is run again on the same inputs: it draws random numbers"),
    "state in a buffer": (Remembering, "gives another output .* its forward changes mean; "),
    "state in a list": (Growing, "Growing gives another output .* state between calls"),
    "train mode": (Stuck, "gives another output .* stays in train mode after eval"),
    "inputs changed": (Scaling, r"gives another output .* changes its input x in place; write x = x \* 2"),
    "batch of three": (Fixed, r"takes a batch of 3, and fails on x \(1, 4, 6\), a batch of 1"),
    "squeezed": (Squeezed, r"does not have the batch.* as its first axis \(\(3,\) for 3 samples and \(\) for one\)"),
    "autocast": (Autocast, r"turns torch.autocast\(bfloat16\) on in its forward"),
    "autocast of functions": (AutocastFunctions, r"turns torch.autocast\(bfloat16\) on in its forward"),
    "by place": (ByPlace, "positional inputs only"),
    "by place only": (ByPlaceOnly, "positional inputs only"),
    "more inputs": (NeedsMore, r"x \(3, 4, 6\): its forward takes x: .*, of which x, mask must be given"),
    "failing": (Failing, r"x \(3, 4, 6\): LookupError: no such table"),
    "casts its input": (Halves, "does not take inputs"),
    "lock": (Locked, r"copied .*blocks\.0\.guard .*TypeError"),
    "generator": (Reading, "copied .*lines"),
    "not a number": (nan, r"NaN or infinity .*head\.bias"),
    "lazy": (lazy, r"head\.weight .*lazy"),
    "meta": (lambda: Plain().to("meta"), r"embed\.weight .*meta"),
    "integers": (with_parameter(torch.ones(3, dtype=torch.uint8)), r"extra .*uint8"),
    "float8": (with_parameter(torch.ones(3).to(torch.float8_e4m3fn)), r"extra .*float8"),
    "sparse": (with_parameter(torch.eye(3).to_sparse()), "extra .*sparse"),
    "quantized": (quantized, "head .*quantized"),
    "scripted": (lambda: torch.jit.script(Plain()), "module .*scripted"),
    "scripted inside": (lambda: nn.Sequential(Plain(), torch.jit.script(nn.ReLU())), "1 .*scripted"),
    "traced": (lambda: torch.jit.trace(Plain(), sample()["x"]), "scripted or traced"),
    "exported": (exported, "exported graph"),
    "a program": (lambda: torch.export.export(Plain(), (), sample()), "exported program"),
    "a function": (lambda: F.relu, r"a torch\.nn\.Module is needed, not a function"),
    "a class": (lambda: Plain, "type.*instance"),
    "a state dict": (lambda: Plain().state_dict(), "not a OrderedDict"),
    "a list": (lambda: nn.ModuleList([Plain()]), "ModuleList has no forward"),
    "sharded": (lambda: nn.Sequential(type("FSDPModule", (Plain,), {})()), "sharded"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_one_line_says_why_it_is_not_taken(name: str) -> None:
    make, told = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(UserError, match=told) as caught:
        custom_network(make(), sample())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_batch_of_one_only_is_told() -> None:
    with pytest.raises(UserError, match=r"batch of 1.* x \(2, 4, 6\)"):
        custom_network(made(Single), sample(1))


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"x": torch.ones(())}, "input x has no batch axis"),
        ({**sample(), "scale": torch.tensor(2.0)}, "input scale has no batch axis"),
        ({**sample(), "mask": None}, "input mask is None, not a tensor"),
        ({**sample(), "flag": True}, "input flag is True"),
        ({**sample(), "mode": "train"}, "input mode is 'train'"),
        ({**sample(), "size": 3}, "input size is 3"),
        ({"x": [torch.ones(4, 6)]}, "input x is a list"),
        ({"x": {"y": torch.ones(1)}}, "input x is a dict"),
        ({"x": torch.ones(3, 4, 6).numpy()}, "input x is a ndarray"),
        (
            {**sample(), "positions": torch.arange(4)},
            r"first axes of different sizes \(x \(3, 4, 6\), positions \(4,\)\)",
        ),
        ({"x": torch.ones(0, 4, 6)}, "hold no sample"),
        ({"x": torch.ones(3, 4, 6, dtype=torch.complex64)}, "input x is complex64"),
        ({"x": torch.ones(3, 4, 6, device="meta")}, "input x is on the meta device"),
        ({"x": torch.ones(3, 4, 6).to_sparse()}, "input x is no dense tensor"),
        ({"x": torch.ones(1).expand(1 << 20, 4, 1 << 6)}, "268435456 values"),
        ({0: torch.ones(3, 4, 6)}, "input 0 has no name"),
        ({"a b": torch.ones(3, 4, 6)}, "'a b' .*name"),
        ({}, "mapping .*tensors.*dict"),
        (torch.ones(3, 4, 6), "not a Tensor"),
        ((torch.ones(3, 4, 6),), "not a tuple"),
        (None, "not None"),
        ({"y": torch.ones(3, 4, 6)}, r"y \(3, 4, 6\).* x must"),
        ({**sample(), "y": torch.ones(3)}, "its forward takes x"),
    ],
)
def test_inputs_that_cannot_be(inputs: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        custom_network(made(), inputs)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (sample(), "list of mappings .*dict"),
        (iter([sample()]), "not a list_iterator"),
        ([sample()["x"]], "batch 0 .*Tensor"),
        ([sample(), {"y": sample()["x"]}], "batch 1 .* y.* x"),
        ([sample(), {"x": None}], "batch 1 .*input x .*None"),
        ([{"x": torch.ones(0, 4, 6)}], "batch 0 .*samples"),
        ([{"x": torch.ones(2, 4, 5)}], r"batch 0, x \(1, 4, 5\) float32"),
        ([{"x": torch.ones(2, 4, 6).double()}], "float64.* float32"),
    ],
)
def test_batches_that_cannot_be(given: Any, told: str) -> None:
    network = custom_network(made(), sample())
    with pytest.raises(UserError, match=told):
        prune(network, given, 0.7)
    with pytest.raises(UserError, match=told):
        api.score(network, given)


def test_infinite_outputs_are_told_before_scoring() -> None:
    class Masked(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.arange(3) > 1, float("-inf"))

    network = custom_network(made(Masked), sample())
    with pytest.raises(UserError, match=r"NaN or infinity .*batch 0"):
        prune(network, batches(), 0.7)


def test_samples_that_depend_on_each_other_are_told() -> None:
    class Normalised(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    (note,) = custom_network(made(Normalised), sample()).notes
    assert re.search(r"not independent.*output", note)


def test_inputs_that_are_changed_to_the_same_again_are_told() -> None:
    class Relu(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.relu_())

    given = sample()
    before = given["x"].clone()
    (note,) = custom_network(made(Relu), given).notes
    assert "changes its input x in place" in note
    torch.testing.assert_close(given["x"], before)


def test_autocast_around_the_call_is_told() -> None:
    with torch.autocast("cpu"), pytest.raises(UserError, match=r"torch\.autocast is on"):
        custom_network(made(), sample())
    network = custom_network(made(), sample())
    with torch.autocast("cpu"), pytest.raises(UserError, match=r"torch\.autocast is on"):
        prune(network, batches(), 0.7)


class Broken(torch.autograd.Function):
    """Has no backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1


class WithoutGradient(Plain):
    def body(self, x: Tensor) -> Tensor:
        return Broken.apply(super().body(x))


class Holder:
    """An object of the user's."""


class HoldsGraph(Plain):
    """Keeps a tensor with a graph where no container is looked into."""

    def forward(self, x: Tensor) -> Tensor:
        self.holder = Holder()
        self.holder.seen = self.body(x)  # type: ignore[attr-defined]
        return self.head(self.holder.seen.mean(1))  # type: ignore[attr-defined]


class HoldsAfterwards(Plain):
    """Holds what cannot be copied once gradients flow."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.held = [threading.Lock()] if output.requires_grad else []
        return output


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (WithoutGradient, "derivative .*--scorer exact"),
        (HoldsAfterwards, "held"),
        (HoldsGraph, r"holder .*graph.*detach"),
    ],
)
def test_what_shows_with_gradients_only_is_found_before_scoring(cls: Any, told: str) -> None:
    network = custom_network(made(cls), sample())
    with pytest.raises(UserError, match=told):
        prune(network, batches(), 0.7)
    recipe = make_recipe({"model": "own", "flops": 0.7, "runtimes": ("ort-cpu",)})
    with pytest.raises(UserError, match=told):
        prepare(recipe, network, from_batches(batches(3)))
    if cls is WithoutGradient:
        with pytest.raises(UserError, match=r"derivative.*--scorer exact"):
            prune(network, batches(), 0.7, scoring=Scoring("trajectory", "forward"))
        for scoring in (Scoring("magnitude"), Scoring("trajectory", "exact")):
            assert prune(network, batches(), 0.7, scoring=scoring).plan.kept


def own(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Mapping[str, str]) -> Network:
    """A network that the user has made without custom_network."""
    return Network(module.eval(), inputs, outputs, Source("custom", "own"), "user")


ENTRIES: dict[str, Callable[[Network, Path], object]] = {
    "prune": lambda network, _: api.prune(network, batches(), 0.7),
    "score": lambda network, _: api.score(network, batches()),
    "export": lambda network, path: api.export_onnx(network, path / "x.onnx"),
    "profile": lambda network, _: api.profile(network, seconds=0.1, threads=1),
    "compare": lambda network, _: api.compare(network, network, seconds=0.1, threads=1),
    "prepare": lambda network, _: prepare(
        make_recipe({"model": "own", "flops": 0.7, "runtimes": ("ort-cpu",)}), network, from_batches(batches(3))
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: own(made(Noisy), sample(), {"output": "output"}), "random numbers"),
        (lambda: own(made(nan), sample(), {"output": "output"}), r"NaN or infinity .*head\.bias"),
        (lambda: own(made(), sample(), {"logits": "logits"}), "'logits'.* output"),
        (lambda: own(made(Squeezed), sample(), {"y": "output"}), "output y .*batch"),
        (lambda: own(made(), sample(), {"x": "output"}), "output x .*input"),
        (lambda: own(made().half(), sample(), {"y": "output"}), r"half precision .*embed\.weight"),
        (lambda: own(nn.Sequential(made(), torch.jit.script(nn.ReLU())), sample(), {"y": "output"}), "1 is scripted"),
    ],
)
def test_every_way_in_is_checked(entry: str, make: Callable[[], Network], told: str, tmp_path: Path) -> None:
    network = make()
    with pytest.raises(UserError, match=told):
        ENTRIES[entry](network, tmp_path)
    assert not list(tmp_path.iterdir())


def test_modules_that_are_exported_or_profiled_are_taken_in(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="random"):
        api.export_onnx(made(Noisy), tmp_path / "x.onnx", inputs=sample())
    with pytest.raises(UserError, match=r"x .*batch axis"):
        api.profile(made(), {"x": torch.ones(())})


def test_notes_of_the_intake_come_with_the_network() -> None:
    network = custom_network(made().half(), {"x": sample()["x"].half()})
    pruned = prune(network, batches(), 0.7, align=1)
    assert pruned.network.notes == network.notes
    assert replace(network, notes=()).notes == ()


def test_transformers_with_a_cache() -> None:
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, use_cache=True)
    network = custom_network(transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (2, 7))})
    assert list(network.outputs) == ["logits"]
    assert any(re.search("Left out of the outputs: .* is of type DynamicCache", note) for note in network.notes)
