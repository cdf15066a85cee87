"""What forward passes of a module on its sample inputs show: that it runs, gives the same again, and what it gives."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from optin_deploy.errors import UserError
from optin_deploy.nn.copies import called, copyable, line
from optin_deploy.nn.outputs import all_outputs, unfit

# How far an output may move between two runs, relative to its norm, as kernels that add in any order let it.
_SAME = 1e-4
# How far a sample alone may be from what it is in a batch: kernels differ with the size of a batch.
_ALIKE = 1e-2


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
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        first = {name: _kept(value) for name, value in all_outputs(_run(module, given, inputs)).items()}
        changed = [name for name, tensor in given.items() if not _equal(tensor, inputs[name])]
        before = _state(module)
        second = all_outputs(_run(module, given, inputs))
        moved = sorted(name for name, state in _state(module).items() if before.get(name) != state)
        _check_same(module, first, second, changed, moved)
        # Copies, so that a network that changes its inputs does not change the user's.
        third = all_outputs(_run(module, {name: t.clone() for name, t in other.items()}, other, of=size))
        _check_autocast(module, {name: t[:1].clone() for name, t in inputs.items()})
    copyable(module)
    notes = []
    if changed:
        notes.append(f"Its forward changes its input {changed[0]} in place: batches are changed with it.")
    if moved:
        notes.append(f"Its forward changes {moved[0]}: what that holds is part of the pruned network.")
    notes += _hooked(module)
    whole, single = (second, third) if size > 1 else (third, second)
    found = Samples(whole, single, max(size, 2), ())
    mixed = [name for name in counted_outputs(found)[0] if _difference(single[name], whole[name][:1]) > _ALIKE]
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
                f"{called(module)} takes a batch of {of}, and fails on {shapes}, a batch of {size} ({line(error)}): "
                "its forward must take batches of any size"
            ) from error
        hint = _unknown_names(module, batch) if isinstance(error, TypeError) else None
        raise UserError(f"{called(module)} does not take inputs of shape {shapes}: {hint or line(error)}") from error


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
        return (
            f"its forward takes {', '.join(map(str, arguments))}, of which {', '.join(needed) or 'none'} must be given"
        )
    except ValueError:
        pass
    return None


def _check_same(
    module: nn.Module, first: Mapping[str, Any], second: Mapping[str, Any], changed: list[str], moved: list[str]
) -> None:
    """Raise UserError where two runs differ, with what is known of why."""
    if set(first) == set(second):
        # One number for the batch, like a loss, is no output of a network.
        counted = {name: value for name, value in first.items() if not isinstance(value, Tensor) or value.dim()}
        differing = [name for name, value in counted.items() if _difference(value, second[name]) > _SAME]
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
    raise UserError(f"{called(module)} gives another {told} when it is run again on the same inputs: {why}")


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
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    names = [
        name or "the whole"
        for name, part in module.named_modules()
        # Torch's own, of weight norms and the like, are objects of its classes.
        if any(not type(h).__module__.startswith("torch.") for kind in kinds for h in vars(part).get(kind, {}).values())
    ]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"There are hooks on {names[0]}{more}: they run in every pass, and stay on what is left of the module."]


def _check_autocast(module: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Raise UserError where the forward turns an autocast on."""
    watching = _Autocast()
    # A mode of torch's that some modules do not run in: that they run otherwise is known.
    with suppress(Exception), watching:
        module(**batch)
    if watching.seen is not None:
        kind = str(watching.seen).removeprefix("torch.")
        raise UserError(
            f"{called(module)} turns torch.autocast({kind}) on in its forward: networks are pruned in float32, so take "
            "it out; --precision makes files of lower precision"
        )


class _Autocast(TorchFunctionMode):
    """Notes whether any function of torch's is called under an autocast, and in which type that computes."""

    seen: torch.dtype | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on = next((device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)), None)
        if on is not None:
            self.seen = torch.get_autocast_dtype(on)
        return func(*args, **(kwargs or {}))


def counted_outputs(found: Samples) -> tuple[list[str], dict[str, str]]:
    """Names of what can be outputs, and of what cannot, with why."""
    reasons = {name: unfit(value, found.single.get(name), found.size) for name, value in found.whole.items()}
    reasons |= {name: "is not given for every batch" for name in found.single if name not in found.whole}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in reasons if name not in left_out], left_out
