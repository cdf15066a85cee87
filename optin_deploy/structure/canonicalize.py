"""Rewrite a module before it is described, so that its parts can be pruned. It computes the same."""

from collections.abc import Callable
from functools import partial

from torch import nn

from optin_deploy.errors import UserError, one_line
from optin_deploy.nn.copies import copy_module
from optin_deploy.structure.adapters.torch_attention import replace_torch_attention
from optin_deploy.structure.parametrizations import bake_weights


def canonicalize(module: nn.Module) -> nn.Module:
    """Return ``module`` in the form that can be pruned.

    Wrappers are removed, peft's adapters merged, computed weights baked in, and torch's attentions replaced by modules.
    Without any of these it is returned as it is. ``module`` is not changed. If nothing is merged, the copy shares its
    tensors.

    Raises:
        UserError: Adapters cannot be merged, or weights cannot be baked in (see `bake_weights`).
    """
    return replace_torch_attention(_merge_adapters(bake_weights(module)))


def _merge_adapters(module: nn.Module) -> nn.Module:
    """Return the module with every peft adapter merged into the layer that it adapts."""
    if not any(type(m).__module__.startswith("peft.") for m in module.modules()):
        return module
    from peft import PeftModel, PromptLearningConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole = copy_module(module)
    for name, child in list(whole.named_modules()):
        if isinstance(child, PeftModel) and isinstance(child.active_peft_config, PromptLearningConfig):
            kind = child.active_peft_config.peft_type
            raise UserError(f"{kind} adds tokens and not weights: it cannot be merged; prune the network without it")
        if isinstance(child, PeftModel):
            return _merge_adapters(_replace(whole, name, _try_merge(child, child.merge_and_unload)))
    # Adapters inside a network that is not a PeftModel.
    layers = [(name, child) for name, child in whole.named_modules() if isinstance(child, BaseTunerLayer)]
    for name, child in layers:
        if hasattr(child, "unload_and_optionally_merge_module"):
            unload = partial(child.unload_and_optionally_merge_module, merge=True, safe_merge=False, adapter_names=None)
            whole = _replace(whole, name, _try_merge(child, unload))
        else:
            _try_merge(child, child.merge)
            whole = _replace(whole, name, child.get_base_layer())
    return whole


def _try_merge(adapters: object, merge: Callable[[], nn.Module]) -> nn.Module:
    try:
        return merge()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"the adapters in {type(adapters).__name__} cannot be merged ({one_line(error, 120)}): merge "
            "or remove them first"
        ) from error


def _replace(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    if not name:
        return child
    module.set_submodule(name, child)
    return module
