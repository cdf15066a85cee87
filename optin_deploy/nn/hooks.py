"""Forward hooks that last as long as a context."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

# Positional and keyword arguments of a forward call.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
# Called as ``hook(name, module, ...)`` with the name of the module and the arguments of torch's hook.
Hook = Callable[..., Any]


@contextmanager
def forward_hooks(
    module: nn.Module, names: Iterable[str], *, before: Hook | None = None, after: Hook | None = None
) -> Iterator[None]:
    """Call hooks around the forward passes of submodules of ``module`` while the context lasts.

    Args:
        names: The submodules. Each gets its hooks once.
        before: ``before(name, submodule, args, kwargs)``. It may return new ``(args, kwargs)``.
        after: ``after(name, submodule, args, output)``. It may return another output.
    """
    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            submodule = module.get_submodule(name)
            if before is not None:
                handle = submodule.register_forward_pre_hook(partial(before, name), with_kwargs=True)
                stack.callback(handle.remove)
            if after is not None:
                stack.callback(submodule.register_forward_hook(partial(after, name)).remove)
        yield
