"""Whether a module is of a kind that can be pruned: its class, its parameters, what it holds."""

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optin_deploy.errors import UserError
from optin_deploy.nn.copies import called

# What parameters are cast from, to float32.
CAST = (torch.float16, torch.bfloat16, torch.float64)
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def own_module(given: object, notes: list[str]) -> nn.Module:
    """``given`` without the wrappers of parallel training; UserError where it is no module that can be pruned."""
    if isinstance(given, torch.export.ExportedProgram):
        raise UserError("an exported program holds operators and no modules: give the module that was exported")
    if isinstance(given, nn.DataParallel | nn.parallel.DistributedDataParallel):
        notes.append(f"Taken out of {type(given).__name__}.")
        return own_module(given.module, notes)
    if not isinstance(given, nn.Module):
        hint = ": give an instance of it" if isinstance(given, type) else ""
        raise UserError(f"a torch.nn.Module is needed, not a {type(given).__name__}{hint}")
    scripted = next((name for name, part in given.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if scripted:
        raise UserError(f"{scripted} is scripted or traced: put in its place the Python module that it was made of")
    if isinstance(given, torch.jit.ScriptModule):
        raise UserError(
            "the module is scripted or traced: give the Python module that it was made of, with its weights"
        )
    if isinstance(given, fx.GraphModule) and not _holds_calls(given):
        raise UserError("the module is an exported graph of operators: give the module that was exported")
    if any(cls.__name__ in _SHARDED for part in given.modules() for cls in type(part).__mro__):
        raise UserError("the module is sharded (FSDP): gather its state dict, and load it into a plain module")
    if type(given).forward is nn.Module.forward and "forward" not in vars(given):
        raise UserError(f"{called(given)} has no forward: give the module that runs it")
    return given


def _holds_calls(graph: fx.GraphModule) -> bool:
    """Whether the graph calls modules that compute something."""
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    return any(next(graph.get_submodule(name).parameters(), None) is not None for name in called)


def check_parameters(module: nn.Module) -> None:
    """Raise UserError unless all parameters are dense floating-point tensors with finite values, on one device."""
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        reason = _unfit_parameter(parameter)
        if reason is not None:
            raise UserError(f"{called(module)} cannot be pruned: {name} {reason}")
    for name, part in module.named_modules():
        if type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise UserError(
                f"{called(module)} cannot be pruned: {name} is quantized; give the network before it was quantized"
            )
    devices = {parameter.device for parameter in named.values()}
    if len(devices) > 1:
        raise UserError(f"{called(module)} is on several devices ({', '.join(sorted(map(str, devices)))}): move to one")
    with torch.no_grad():
        bad = next((name for name, parameter in named.items() if not parameter.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"the weights of {called(module)} hold NaN or infinity in {bad}")


def _unfit_parameter(parameter: Tensor) -> str | None:
    if is_lazy(parameter):
        return "is not initialised (a lazy module): run the module once, and load its weights"
    if parameter.is_meta:
        return "is on the meta device, without values: load its weights"
    if parameter.is_nested or parameter.layout != torch.strided:
        return f"is sparse or nested ({parameter.layout}): give it as a dense tensor"
    quantized = parameter.is_quantized or is_traceable_wrapper_subclass(parameter)
    if quantized or not (parameter.dtype in (torch.float32, *CAST) or parameter.is_complex()):
        kind = str(parameter.dtype).removeprefix("torch.") if type(parameter) is nn.Parameter else _kind(parameter)
        return f"is quantized or sharded ({kind}): give the network in floating point, in one piece"
    return None


def _kind(value: object) -> str:
    return type(value).__name__
