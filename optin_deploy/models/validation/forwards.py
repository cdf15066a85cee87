"""Run a module on its sample inputs: it must run, repeat its results, and return tensors with a batch axis."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from optin_deploy.errors import UserError
from optin_deploy.nn.batches import Batch, PyTree, TorchFunction, batch_size, dtype_name
from optin_deploy.nn.copies import check_copyable, class_name_of, error_line
from optin_deploy.nn.outputs import all_outputs, unfit_reason

# Largest relative difference between two runs: kernels may add in any order.
_REPEATABLE = 1e-4
# Largest relative difference of a sample in a batch and alone: kernels depend on the batch size.
_INDEPENDENT = 1e-2


@dataclass(frozen=True)
class SampleRun:
    """Values that a module returns by name, for a batch of ``size`` samples and for its first sample alone."""

    batch: Mapping[str, PyTree]
    single: Mapping[str, PyTree]
    size: int
    notes: tuple[str, ...] = ()


def run_samples(module: nn.Module, inputs: Batch) -> SampleRun:
    """Run the module twice on ``inputs``, and once on a batch of another size.

    Raises:
        UserError: it fails, returns other values the second time, uses autocast, or accepts one batch size only.
    """
    size = batch_size(inputs)
    other = {name: t[:1] if size > 1 else torch.cat((t, t)) for name, t in inputs.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        copies = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs = all_outputs(_run(module, copies, inputs))
        first = {name: value.clone() if isinstance(value, Tensor) else value for name, value in outputs.items()}
        changed = [name for name, tensor in copies.items() if not _equal(tensor, inputs[name])]
        before = _state(module)
        second = all_outputs(_run(module, copies, inputs))
        moved = sorted(name for name, state in _state(module).items() if before.get(name) != state)
        _check_repeatable(module, first, second, changed, moved)
        # Copies: a network may change its inputs in place.
        third = all_outputs(_run(module, {name: t.clone() for name, t in other.items()}, other, earlier_size=size))
        _check_autocast(module, {name: t[:1].clone() for name, t in inputs.items()})
    check_copyable(module)
    notes = []
    if changed:
        notes.append(f"Its forward changes its input {changed[0]} in place: batches are changed with it.")
    if moved:
        notes.append(f"Its forward changes {moved[0]}: its current value is part of the pruned network.")
    notes += _hook_notes(module)
    batch, single = (second, third) if size > 1 else (third, second)
    run = SampleRun(batch, single, max(size, 2))
    mixed = [name for name in exportable_outputs(run)[0] if _difference(single[name], batch[name][:1]) > _INDEPENDENT]
    if mixed:
        notes.append(
            f"Samples of a batch are not independent: {mixed[0]} of the first one alone is another. Scores and "
            "compensation assume that they are independent."
        )
    return replace(run, notes=tuple(notes))


def _run(module: nn.Module, batch: Batch, original: Batch, earlier_size: int | None = None) -> PyTree:
    """Return the module's output for ``batch``, a copy of ``original``.

    Args:
        earlier_size: size of the batch that it took before, if this is a second one.

    Raises:
        UserError: it fails.
    """
    try:
        return module(**batch)
    except UserError:
        raise
    except Exception as error:  # a user's module may raise errors of any type
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in original.items())
        if earlier_size is not None:
            raise UserError(
                f"{class_name_of(module)} takes a batch of {earlier_size}, and fails on {shapes}, a batch of "
                f"{batch_size(original)} ({error_line(error)}): "
                "its forward must take batches of any size"
            ) from error
        hint = _name_mismatch(module, batch) if isinstance(error, TypeError) else None
        raise UserError(
            f"{class_name_of(module)} does not take inputs of shape {shapes}: {hint or error_line(error)}"
        ) from error


def _name_mismatch(module: nn.Module, batch: Batch) -> str | None:
    """Return why forward does not take inputs of these names; None if it does."""
    try:
        signature = inspect.signature(module.forward)
        signature.bind(**batch)
    except TypeError:
        arguments = signature.parameters.values()
        if all(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in arguments):
            return "its forward takes positional inputs only: wrap it in a module whose forward names them"
        needed = [p.name for p in arguments if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.default is p.empty]
        return (
            f"its forward takes {', '.join(map(str, arguments))}, of which {', '.join(needed) or 'none'} must be given"
        )
    except ValueError:
        pass
    return None


def _check_repeatable(
    module: nn.Module, first: Mapping[str, PyTree], second: Mapping[str, PyTree], changed: list[str], moved: list[str]
) -> None:
    """Raise UserError if two runs differ, with the likely reason."""
    if set(first) == set(second):
        # A single number for the batch, like a loss, is not an output.
        outputs = {name: value for name, value in first.items() if not isinstance(value, Tensor) or value.dim()}
        differing = [name for name, value in outputs.items() if _difference(value, second[name]) > _REPEATABLE]
        if not differing:
            return
        output = differing[0]
    else:
        output = min(set(first) ^ set(second))
    stuck = [name or "the module" for name, part in module.named_modules() if part.training]
    if changed:
        why = f"its forward changes its input {changed[0]} in place; write x = x * 2 and the like instead of x.mul_(2)"
    elif moved:
        why = f"its forward changes {moved[0]}; networks with state between calls cannot be pruned"
    elif stuck:
        why = f"{stuck[0]} stays in train mode after eval()"
    else:
        why = (
            "it draws random numbers or has state between calls; its forward must do neither in eval mode "
            "(training=self.training for dropout)"
        )
    raise UserError(f"{class_name_of(module)} gives another {output} when it is run again on the same inputs: {why}")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _difference(a: object, b: object) -> float:
    """Return the norm of the difference relative to that of ``b``.

    It is infinite if the shapes differ, and 0 for values that cannot be compared.
    """
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
    """Return the identity of each parameter and buffer, and how often it was changed in place."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: (id(t), 0 if t.is_inference() else t._version) for name, t in tensors}


def _hook_notes(module: nn.Module) -> list[str]:
    """Return a note if there are hooks of the user on the module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    names = [
        name or "the whole"
        for name, part in module.named_modules()
        # Hooks of torch, for weight norms and the like, are objects of its classes.
        if any(not type(h).__module__.startswith("torch.") for kind in kinds for h in vars(part).get(kind, {}).values())
    ]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"There are hooks on {names[0]}{more}: they run in every pass, and stay on the pruned module."]


def _check_autocast(module: nn.Module, batch: Batch) -> None:
    """Raise UserError if the forward turns autocast on."""
    watching = _Autocast()
    # Some modules fail in this mode of torch; they run without it.
    with suppress(Exception), watching:
        module(**batch)
    if watching.seen is not None:
        raise UserError(
            f"{class_name_of(module)} turns torch.autocast({dtype_name(watching.seen)}) on in its forward: networks "
            "are pruned in float32, so remove it; --precision makes files of lower precision"
        )


class _Autocast(TorchFunctionMode):
    """Records the type of the autocast under which a function of torch is called."""

    seen: torch.dtype | None = None

    def __torch_function__(
        self, func: TorchFunction, types: object, args: Sequence[PyTree] = (), kwargs: PyTree = None
    ) -> PyTree:
        on = next((device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)), None)
        if on is not None:
            self.seen = torch.get_autocast_dtype(on)
        return func(*args, **(kwargs or {}))


def exportable_outputs(run: SampleRun) -> tuple[list[str], dict[str, str]]:
    """Return the names of values that can be outputs, and of the others with the reason."""
    reasons = {name: unfit_reason(value, run.single.get(name), run.size) for name, value in run.batch.items()}
    reasons |= {name: "is not given for every batch" for name in run.single if name not in run.batch}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in reasons if name not in left_out], left_out
