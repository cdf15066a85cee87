"""What is checked, and put right, when a module is taken in: it works, or one line says why not, before any long work.

Put right, on a copy: adapters and torch's attention (see ``structure.intake``), wrappers of parallel training,
parameters in half or double precision, gradient checkpointing, tensors of inference mode. The copy shares the
parameters, but where these change their type. All else is refused that would fail, or give wrong figures, later.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optin_deploy.copies import copied, kept_tensors, sharing
from optin_deploy.errors import UserError
from optin_deploy.outputs import all_outputs, named_outputs, unfit, unused
from optin_deploy.structure.intake import prunable_form

logger = logging.getLogger(__name__)

# Values of all sample inputs together: a checkpoint records no larger ones.
MOST_VALUES = 1 << 27
# What a checkpoint can record.
_INPUT_TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_CAST = (torch.float16, torch.bfloat16, torch.float64)
# Attributes that say that activations are computed again in the backward pass: timm's, transformers' and those that
# other networks have in common.
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "with_cp")
# How far an output may move between two runs, relative to its norm, as kernels that add in any order let it.
_SAME = 1e-4
# How far a sample alone may be from what it is in a batch: kernels differ with the size of a batch.
_ALIKE = 1e-2
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


@dataclass(frozen=True)
class Taken:
    """A module as it is pruned and exported, with what was found in its forward passes.

    Attributes:
        outputs: name of each output -> what `named_outputs` calls it.
        notes: what was put right or left out, a sentence each.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: dict[str, str]
    notes: tuple[str, ...]


def take_in(given: object, inputs: object) -> Taken:
    """A module of the user's own, put in eval mode, with its sample ``inputs``.

    Raises:
        UserError: it cannot be pruned or exported as it is.
    """
    with torch.inference_mode(False):
        check_surroundings()
        notes: list[str] = []
        module = _own_module(given, notes)
        module.eval()
        check_parameters(module)
        module = prunable_form(_copyable(module))
        sample = _plain_inputs(module, inputs)
        module, sample = _in_float32(module, sample, notes)
        module = put_right(module, notes)
        found = run_samples(module, sample)
        counted, left_out = _counted(found)
        if left_out:
            notes.append(f"Left out of the outputs: {', '.join(f'{name} {why}' for name, why in left_out.items())}.")
        if not counted:
            raise UserError(f"{_called(module)} gives no output that can be exported: {_all_told(left_out)}")
        notes += found.notes
        outputs = _output_names(counted, sample, notes)
    for note in notes:
        logger.warning("%s: %s", _called(module), note)
    return Taken(module, sample, outputs, tuple(notes))


def check_network(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Mapping[str, str]) -> nn.Module:
    """The module of a network that exists, with what `put_right` mends; see `Taken` for ``outputs``.

    Raises:
        UserError: it cannot be pruned or exported as it is, or an output cannot be one.
    """
    with torch.inference_mode(False):
        check_surroundings()
        check_parameters(module)
        if any(part.training for part in module.modules()):
            module.eval()
        notes: list[str] = []
        module = put_right(_copyable(module), notes)
        found = run_samples(module, _plain_inputs(module, inputs))
        for note in (*notes, *found.notes):
            logger.warning("%s: %s", _called(module), note)
        for name, key in outputs.items():
            if key not in found.whole:
                raise UserError(f"there is no output {key!r}; the network gives {', '.join(found.whole)}")
            reason = unfit(found.whole[key], found.single.get(key), found.size)
            if reason is not None:
                raise UserError(f"output {name} {reason}: leave it out of the network's outputs")
    return module


def check_surroundings() -> None:
    """Raise UserError where the caller has autocast on: everything would be computed in its precision."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise UserError("torch.autocast is on: networks are pruned in float32, so call this outside of it")


def _own_module(given: object, notes: list[str]) -> nn.Module:
    """``given`` without the wrappers of parallel training; UserError where it is no module that can be pruned."""
    if isinstance(given, torch.export.ExportedProgram):
        raise UserError("an exported program holds operators and no modules: give the module that was exported")
    if isinstance(given, nn.DataParallel | nn.parallel.DistributedDataParallel):
        notes.append(f"Taken out of {type(given).__name__}.")
        return _own_module(given.module, notes)
    if not isinstance(given, nn.Module):
        hint = ": give an instance of it" if isinstance(given, type) else ""
        raise UserError(f"a torch.nn.Module is needed, not a {type(given).__name__}{hint}")
    if isinstance(given, torch.jit.ScriptModule):
        raise UserError("the module is scripted or traced: give the Python module that it was made of, with its weights")
    if isinstance(given, fx.GraphModule) and not _holds_calls(given):
        raise UserError("the module is an exported graph of operators: give the module that was exported")
    if any(cls.__name__ in _SHARDED for part in given.modules() for cls in type(part).__mro__):
        raise UserError("the module is sharded (FSDP): gather its state dict, and load it into a plain module")
    if type(given).forward is nn.Module.forward and "forward" not in vars(given):
        raise UserError(f"{_called(given)} has no forward: give the module that runs it")
    return given


def _holds_calls(graph: fx.GraphModule) -> bool:
    """Whether the graph calls modules that compute something."""
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    return any(next(graph.get_submodule(name).parameters(), None) is not None for name in called)


def check_parameters(module: nn.Module) -> None:
    """Raise UserError unless all parameters are dense floating-point tensors with finite values, on one device."""
    named = dict(module.named_parameters())
    if not named:
        raise UserError(f"{_called(module)} has no parameters: there is nothing to prune")
    for name, parameter in named.items():
        reason = _unfit_parameter(parameter)
        if reason is not None:
            raise UserError(f"{_called(module)} cannot be pruned: {name} {reason}")
    for name, part in module.named_modules():
        if type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise UserError(
                f"{_called(module)} cannot be pruned: {name} is quantized; give the network before it was quantized"
            )
    devices = {parameter.device for parameter in named.values()}
    if len(devices) > 1:
        raise UserError(f"{_called(module)} is on several devices ({', '.join(sorted(map(str, devices)))}): move to one")
    bad = next((name for name, parameter in named.items() if not parameter.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"the weights of {_called(module)} hold NaN or infinity in {bad}")


def _unfit_parameter(parameter: Tensor) -> str | None:
    if is_lazy(parameter):
        return "is not initialised (a lazy module): run the module once, and load its weights"
    if parameter.is_meta:
        return "is on the meta device, without values: load its weights"
    if parameter.is_nested or parameter.layout != torch.strided:
        return f"is sparse or nested ({parameter.layout}): give it as a dense tensor"
    quantized = parameter.is_quantized or is_traceable_wrapper_subclass(parameter)
    if quantized or not (parameter.dtype in (torch.float32, *_CAST) or parameter.is_complex()):
        kind = str(parameter.dtype).removeprefix("torch.") if type(parameter) is nn.Parameter else _kind(parameter)
        return f"is quantized or sharded ({kind}): give the network in floating point, in one piece"
    return None


def _kind(value: object) -> str:
    return type(value).__name__


def _copyable(module: nn.Module) -> nn.Module:
    """``module``; UserError where it cannot be copied, which slicing does."""
    try:
        copied(module, sharing(module))
    except Exception as error:  # whatever an attribute raises
        where = next(_uncopyable(module), "an attribute")
        raise UserError(
            f"{_called(module)} cannot be copied because of {where} ({_line(error)}): keep it out of the module"
        ) from error
    return module


def _uncopyable(module: nn.Module) -> Iterator[str]:
    memo = {**sharing(module), **{id(part): part for part in module.modules()}}
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # whatever an attribute raises
                yield f"{name}.{attribute}" if name else attribute


def _plain_inputs(module: nn.Module, inputs: object) -> dict[str, Tensor]:
    """The sample inputs, without graphs; UserError unless they are tensors by name, all with the batch first."""
    if not isinstance(inputs, Mapping) or not inputs:
        raise UserError(f"inputs are a mapping of forward's argument names to tensors, not {_described(inputs)}")
    for name, value in inputs.items():
        if not isinstance(name, str):
            raise UserError(f"input {name!r} has no name: give forward's argument names")
        reason = _unfit_input(value)
        if reason is not None:
            raise UserError(f"input {name} {reason}")
    sizes = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {tuple(inputs[name].shape)}" for name in sizes)
        raise UserError(
            f"the inputs have first axes of different sizes ({told}), and each has to be the batch: keep what is the "
            "same for all samples in the module, or expand it"
        )
    if not min(sizes.values()):
        raise UserError(f"the sample inputs hold no sample ({', '.join(sizes)})")
    values = sum(tensor.numel() for tensor in inputs.values())
    if values > MOST_VALUES:
        raise UserError(f"the sample inputs hold {values} values, {MOST_VALUES} at most: two samples are enough")
    device = next(module.parameters()).device
    elsewhere = next((name for name, tensor in inputs.items() if tensor.device != device), None)
    if elsewhere is not None:
        raise UserError(f"input {elsewhere} is on {inputs[elsewhere].device}, the module on {device}: move one of them")
    return {name: _plain(tensor) for name, tensor in inputs.items()}


def _unfit_input(value: object) -> str | None:
    if not isinstance(value, Tensor):
        return f"is {_described(value)}, no tensor: leave it out, or fix it in a module around yours"
    if is_traceable_wrapper_subclass(value) or value.is_nested or value.layout != torch.strided:
        return "is no dense tensor"
    if value.dtype not in _INPUT_TYPES:
        return f"is {str(value.dtype).removeprefix('torch.')}: give floating-point numbers, integers or truth values"
    if value.is_meta:
        return "is on the meta device, without values"
    if value.dim() == 0:
        return "has no batch axis: keep what is the same for all samples in the module, or give one value a sample"
    return None


def _described(value: object) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:60]
    return f"a {type(value).__name__}"


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without a graph, subclass or inference mode; itself where it has none of them."""
    if tensor.is_inference():
        tensor = tensor.clone()
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor)
    return tensor.detach() if tensor.requires_grad else tensor


def _in_float32(
    module: nn.Module, inputs: dict[str, Tensor], notes: list[str]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Module and inputs in float32 where a parameter is in another precision; the module is then a copy."""
    others = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.dtype in _CAST})
    if not others:
        return module, inputs
    notes.append(f"Cast from {', '.join(others)} to float32, in which networks are pruned; batches are to be float32.")
    return copied(module).float(), {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}


def put_right(module: nn.Module, notes: list[str]) -> nn.Module:
    """``module`` without gradient checkpointing and without tensors of inference mode, which no gradient passes; itself
    where it has neither, else a copy."""
    if any(t.is_inference() for t in module.parameters()):
        module = copied(module)
    elif any(t.is_inference() for _, t in kept_tensors(module)):
        module = copied(module, {id(p): p for p in module.parameters()})
    checkpointing = {(name, key) for name, part in module.named_modules() for key in _CHECKPOINTING if _is_on(part, key)}
    if checkpointing:
        module = copied(module, sharing(module))
        for name, key in checkpointing:
            setattr(module.get_submodule(name), key, False)
        notes.append("Gradient checkpointing is turned off.")
    return module


def _is_on(part: nn.Module, key: str) -> bool:
    return vars(part).get(key) is True


@dataclass(frozen=True)
class Samples:
    """What a module gives for a batch of ``size`` samples, and for the first of them alone, by name."""

    whole: Mapping[str, Any]
    single: Mapping[str, Any]
    size: int
    notes: tuple[str, ...]


def run_samples(module: nn.Module, inputs: Mapping[str, Tensor]) -> Samples:
    """Run the module twice on ``inputs``, and once on a batch of another size.

    Raises:
        UserError: it fails, gives something else the second time, changes its inputs, uses autocast, or takes one size
            of batch only.
    """
    size = len(next(iter(inputs.values())))
    other = {name: t[:1] if size > 1 else torch.cat((t, t)) for name, t in inputs.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _without_autocast(module):
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        first = {name: _kept(value) for name, value in all_outputs(_run(module, given, inputs)).items()}
        changed = [name for name, tensor in given.items() if not _equal(tensor, inputs[name])]
        before = _state(module)
        second = all_outputs(_run(module, given, inputs))
        moved = sorted(name for name, state in _state(module).items() if before.get(name) != state)
        _check_same(module, first, second, changed, moved)
        # Copies, so that a network that changes its inputs does not change the user's.
        third = all_outputs(_run(module, {name: t.clone() for name, t in other.items()}, other, of=size))
    _copyable(module)
    notes = []
    if changed:
        notes.append(f"Its forward changes its input {changed[0]} in place: batches are changed with it.")
    if moved:
        notes.append(f"Its forward changes {moved[0]}: what that holds is part of the pruned network.")
    notes += _hooked(module)
    whole, single = (second, third) if size > 1 else (third, second)
    found = Samples(whole, single, max(size, 2), ())
    mixed = [name for name in _counted(found)[0] if _difference(single[name], whole[name][:1]) > _ALIKE]
    if mixed:
        notes.append(
            f"Samples of a batch are not independent: {mixed[0]} of the first one alone is another. Scores and repair "
            "take them as independent."
        )
    return Samples(whole, single, max(size, 2), tuple(notes))


def _run(module: nn.Module, batch: Mapping[str, Tensor], shown: Mapping[str, Tensor], of: int | None = None) -> Any:
    """What the module gives for ``batch``; UserError where it fails, after a run on a batch of ``of`` samples."""
    try:
        return module(**batch)
    except UserError:
        raise
    except Exception as error:  # whatever a user's module raises
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in shown.items())
        if of is not None:
            size = len(next(iter(shown.values())))
            raise UserError(
                f"{_called(module)} takes a batch of {of}, and fails on {shapes}, a batch of {size} ({_line(error)}): "
                "its forward must take batches of any size"
            ) from error
        hint = _unknown_names(module, batch) if isinstance(error, TypeError) else None
        raise UserError(f"{_called(module)} does not take inputs of shape {shapes}: {hint or _line(error)}") from error


def _unknown_names(module: nn.Module, batch: Mapping[str, Tensor]) -> str | None:
    """Why forward has no place for inputs of these names; None where it has."""
    try:
        signature = inspect.signature(module.forward)
        signature.bind(**batch)
    except TypeError:
        arguments = signature.parameters.values()
        if all(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in arguments):
            return "its forward takes inputs by their place only: put it into a module whose forward names them"
        needed = [p.name for p in arguments if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.default is p.empty]
        return f"its forward takes {', '.join(map(str, arguments))}, of which {', '.join(needed) or 'none'} must be given"
    except ValueError:
        pass
    return None


def _check_same(
    module: nn.Module, first: Mapping[str, Any], second: Mapping[str, Any], changed: list[str], moved: list[str]
) -> None:
    """Raise UserError where two runs differ, with what is known of why."""
    if set(first) == set(second):
        differing = [name for name, value in first.items() if _difference(value, second[name]) > _SAME]
        if not differing:
            return
        told = differing[0]
    else:
        told = min(set(first) ^ set(second))
    stuck = [name or "the module" for name, part in module.named_modules() if part.training]
    if changed:
        why = f"its forward changes its input {changed[0]} in place; write x = x * 2 and the like instead of x.mul_(2)"
    elif moved:
        why = f"its forward changes {moved[0]}; networks that keep something from call to call cannot be pruned"
    elif stuck:
        why = f"{stuck[0]} stays in train mode after eval()"
    else:
        why = (
            "it draws random numbers or keeps something from call to call; have its forward do neither in eval mode "
            "(training=self.training for dropout)"
        )
    raise UserError(f"{_called(module)} gives another {told} when it is run again on the same inputs: {why}")


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _difference(a: Any, b: Any) -> float:
    """The norm of the difference relative to that of ``b``; infinite where shapes differ, 0 where one is no plain
    tensor or neither is finite."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if isinstance(a, Tensor) is isinstance(b, Tensor) else float("inf")
    if a.is_nested or a.layout != torch.strided or a.is_quantized:
        return 0.0
    if a.shape != b.shape:
        return float("inf")
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.to(wide).nan_to_num(), b.to(wide).nan_to_num()
    return float((x - y).norm() / y.norm().clamp_min(1e-12))


def _state(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Where each parameter and buffer lies, and how often it was changed in place."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: (id(t), 0 if t.is_inference() else t._version) for name, t in tensors}


def _hooked(module: nn.Module) -> list[str]:
    """A note of hooks that the user has put on the module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    names = [name or "the whole" for name, part in module.named_modules() if any(vars(part).get(h) for h in hooks)]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"There are hooks on {names[0]}{more}: they run in every pass, and stay on what is left of the module."]


@contextmanager
def _without_autocast(module: nn.Module) -> Iterator[None]:
    """Raise UserError where a part of the module runs under an autocast that its forward turns on."""

    def look(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            on = next((device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)), None)
            if on is not None:
                kind = str(torch.get_autocast_dtype(on)).removeprefix("torch.")
                raise UserError(
                    f"{_called(module)} turns torch.autocast({kind}) on around {name}: networks are pruned in float32, "
                    "so take it out of forward; --precision makes files of lower precision"
                )

        return hook

    parts = [(name, part) for name, part in module.named_modules() if name and next(part.children(), None) is None]
    handles = [part.register_forward_pre_hook(look(name)) for name, part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counted(found: Samples) -> tuple[list[str], dict[str, str]]:
    """Names of what can be outputs, and of what cannot, with why."""
    reasons = {name: unfit(value, found.single.get(name), found.size) for name, value in found.whole.items()}
    reasons |= {name: "is not given for every batch" for name in found.single if name not in found.whole}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in reasons if name not in left_out], left_out


def _all_told(left_out: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {why}" for name, why in left_out.items())[:400] or "it gives nothing"


def _output_names(keys: list[str], inputs: Mapping[str, Tensor], notes: list[str]) -> dict[str, str]:
    """Name of each output -> its key: as it is but where a file could not have it, empty, unprintable or an input's."""
    names: dict[str, str] = {}
    for key in keys:
        plain = "".join(c if c.isprintable() else "_" for c in key) or "output"
        wanted = f"{plain}_output" if plain in inputs else plain
        name = unused(wanted, {*names, *inputs, *(each for each in keys if each != key)})
        names[name] = key
        if name != key:
            notes.append(f"The output {key!r} is called {name}: an input has that name, or no file could have it.")
    return names


def _called(module: nn.Module) -> str:
    return type(module).__name__


def _line(error: Exception) -> str:
    told = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
