"""Check the class, the submodules and the parameters of a module."""

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optin_deploy.errors import UserError
from optin_deploy.nn.batches import dtype_name
from optin_deploy.nn.copies import class_name_of

# Parameters of these types are cast to float32.
CAST = (torch.float16, torch.bfloat16, torch.float64)
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def unwrap_module(candidate: object, notes: list[str]) -> nn.Module:
    """Return a module without the wrappers of parallel training; UserError if it is not a module that can be pruned."""
    if isinstance(candidate, torch.export.ExportedProgram):
        raise UserError("an exported program holds operators and no modules: give the module that was exported")
    if isinstance(candidate, nn.DataParallel | nn.parallel.DistributedDataParallel):
        notes.append(f"Removed the wrapper {type(candidate).__name__}.")
        return unwrap_module(candidate.module, notes)
    if not isinstance(candidate, nn.Module):
        hint = ": give an instance of it" if isinstance(candidate, type) else ""
        raise UserError(f"a torch.nn.Module is needed, not a {type(candidate).__name__}{hint}")
    scripted = next(
        (name for name, part in candidate.named_modules() if isinstance(part, torch.jit.ScriptModule)), None
    )
    if scripted:
        raise UserError(f"{scripted} is scripted or traced: replace it by the Python module that it was made of")
    if isinstance(candidate, torch.jit.ScriptModule):
        raise UserError(
            "the module is scripted or traced: give the Python module that it was made of, with its weights"
        )
    if isinstance(candidate, fx.GraphModule) and not _holds_calls(candidate):
        raise UserError("the module is an exported graph of operators: give the module that was exported")
    if any(cls.__name__ in _SHARDED for part in candidate.modules() for cls in type(part).__mro__):
        raise UserError("the module is sharded (FSDP): gather its state dict and load it into a plain module")
    if type(candidate).forward is nn.Module.forward and "forward" not in vars(candidate):
        raise UserError(f"{class_name_of(candidate)} has no forward: give the module that runs it")
    return candidate


def _holds_calls(graph: fx.GraphModule) -> bool:
    """Whether the graph calls modules that compute something."""
    modules_called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    return any(next(graph.get_submodule(name).parameters(), None) is not None for name in modules_called)


def check_parameters(module: nn.Module) -> None:
    """Raise UserError unless all parameters are dense floating-point tensors with finite values, on one device."""
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        reason = _unfit_parameter(parameter)
        if reason is not None:
            raise UserError(f"{class_name_of(module)} cannot be pruned: {name} {reason}")
    for name, part in module.named_modules():
        if type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise UserError(
                f"{class_name_of(module)} cannot be pruned: {name} is quantized; "
                "give the network before it was quantized"
            )
    devices = {parameter.device for parameter in named.values()}
    if len(devices) > 1:
        raise UserError(
            f"{class_name_of(module)} is on several devices ({', '.join(sorted(map(str, devices)))}): move to one"
        )
    with torch.no_grad():
        bad = next((name for name, parameter in named.items() if not parameter.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"the weights of {class_name_of(module)} hold NaN or infinity in {bad}")


def _unfit_parameter(parameter: Tensor) -> str | None:
    if is_lazy(parameter):
        return "is not initialised (a lazy module): run the module once, and load its weights"
    if parameter.is_meta:
        return "is on the meta device, without values: load its weights"
    if parameter.is_nested or parameter.layout != torch.strided:
        return f"is sparse or nested ({parameter.layout}): give it as a dense tensor"
    quantized = parameter.is_quantized or is_traceable_wrapper_subclass(parameter)
    if quantized or not (parameter.dtype in (torch.float32, *CAST) or parameter.is_complex()):
        kind = dtype_name(parameter.dtype) if type(parameter) is nn.Parameter else type(parameter).__name__
        return f"is quantized or sharded ({kind}): give the network in floating point, in one piece"
    return None
