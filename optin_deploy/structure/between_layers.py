"""The operation between two layers through which channels cannot be followed, found in forward passes.

Every second output channel of a convolution is changed. The other channels must be unchanged after each torch function
that runs next. The first function that changes them, or that changes the shape of the tensor for good, is reported.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from optin_deploy.nn.batches import PyTree, TorchFunction
from optin_deploy.nn.calls import first_tensor
from optin_deploy.nn.hooks import Args, Kwargs, forward_hooks
from optin_deploy.nn.plain_layers import base_of, has_own_forward
from optin_deploy.nn.unfold import Conv

_MAPS = nn.Linear | Conv | nn.Bilinear | nn.RNNBase | nn.RNNCellBase
# Relative to the largest value of a tensor.
_TOLERANCE = 1e-5


@torch.no_grad()
def find_obstacle(module: nn.Module, inputs: Mapping[str, Tensor], first: str) -> str | None:
    """Return a phrase that names the operation that makes the channels of the convolution ``first`` unprunable.

    None if there is no such operation: the channels belong to a residual stream or are used in several places.

    Args:
        inputs: A batch, of which the first sample is run twice.
    """
    conv = module.get_submodule(first)
    if has_own_forward(conv):
        base = base_of(conv)
        assert base is not None
        return f"{first} is of the class {type(conv).__name__}, a {base.__name__} with a forward of its own"
    sample = {name: t[:1] for name, t in inputs.items()}
    dense = _Trace(module, first, None)
    changed = _Trace(module, first, dense.outputs)
    try:
        for trace in (dense, changed):
            with trace.running():
                module(**sample)
    except _Different:
        return None
    return changed.explain()


class _Different(Exception):  # noqa: N818 - not an error
    """The forward pass runs differently when channels change."""


class _Trace(TorchFunctionMode):
    """Records the outputs of the functions after ``first``, or compares them with the ``outputs`` of another pass."""

    def __init__(self, module: nn.Module, first: str, outputs: list[Tensor | None] | None) -> None:
        super().__init__()
        self.module, self.first, self.before = module, first, outputs
        self.outputs: list[Tensor | None] = []
        self.stack: list[str] = []
        self.begun = False  # ``first`` has run.
        self.shape: torch.Size | None = None
        # Tensors that depend on the changed channels. Holding them keeps their ids from being used again.
        self.reached: dict[int, Tensor] = {}
        self.mixer: str | None = None
        self.reforming: str | None = None
        # The function that first changed the tensor's shape, and the number of channels since the last change.
        self.start: str | None = None
        self.channels: int | None = None
        self.resizing: str | None = None
        self.second: str | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Follow the functions that run while the context lasts."""
        names = [name for name, _ in self.module.named_modules()]
        with forward_hooks(self.module, names, before=self._enter, after=self._leave), self:
            yield

    def _enter(self, name: str, submodule: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.stack.append(name)
        x = first_tensor(args if args else list(kwargs.values()))
        if isinstance(submodule, _MAPS) and self.second is None and x is not None and id(x) in self.reached:
            through = isinstance(submodule, Conv) and submodule.groups > 1 and not has_own_forward(submodule)
            through = through and submodule.in_channels == submodule.out_channels
            through = through and self.mixer is None and self.reforming is None
            self.second = None if through else name

    def _leave(self, name: str, _: nn.Module, __: object, output: object) -> Tensor | None:
        self.stack.pop()
        if name != self.first or self.begun or not isinstance(output, Tensor):
            return None
        self.begun, self.shape = True, output.shape
        if self.before is None:
            return None
        with torch._C.DisableTorchFunction():
            changed = output.clone()
            changed[:, 1::2] = 1 - changed[:, 1::2]
        self.reached[id(changed)] = changed
        return changed

    def __torch_function__(
        self, func: TorchFunction, types: object, args: Sequence[PyTree] = (), kwargs: PyTree = None
    ) -> PyTree:
        result = func(*args, **(kwargs or {}))
        output = first_tensor(result)
        if not self.begun or self.second is not None or output is None or not output.is_floating_point():
            return result
        with torch._C.DisableTorchFunction():
            if self.before is None:
                self.outputs.append(output.detach().clone())
            else:
                self._compare(func, output)
                self.outputs.append(None)
        return result

    def _compare(self, func: TorchFunction, output: Tensor) -> None:
        assert self.before is not None and self.shape is not None
        number = len(self.outputs)
        expected = self.before[number] if number < len(self.before) else None
        if expected is None or expected.shape != output.shape:
            raise _Different
        moved = (output - expected).abs() > _TOLERANCE * expected.abs().max()
        if not bool(moved.any()):
            return
        self.reached[id(output)] = output
        if self.mixer is not None:
            return
        name, axis = self._named(func), self._axis(output.shape)
        if axis is None:
            channels = output.shape[1] if output.dim() > 1 else None
            if self.reforming is None or channels != self.channels:
                self.reforming, self.channels, self.start = name, channels, self.start or name
        # A local response norm hardly mixes small values, so its name is checked.
        elif bool(moved.movedim(axis, 1)[:, ::2].any()) or getattr(func, "__name__", "") == "local_response_norm":
            self.mixer = name if self.start in (None, name) else f"{self.start} to {name}"
        else:
            self.reforming = self.start = self.channels = None
            if output.dim() == len(self.shape) and axis == 1 and output.shape != self.shape:
                self.resizing = self.resizing or name

    def _axis(self, shape: torch.Size) -> int | None:
        """Return the axis of the channels in a tensor of this shape, None if it has none."""
        assert self.shape is not None
        if len(shape) > 1 and shape[1] == self.shape[1] and len(shape) <= len(self.shape):
            return 1
        last = len(shape) in (3, len(self.shape)) and shape[-1] == self.shape[1]
        return -1 if last and shape[1:-1].numel() == self.shape[2:].numel() else None

    def _named(self, func: TorchFunction) -> str:
        """Return the class and name of the running module if it is one operator, else the function."""
        name = self.stack[-1] if self.stack else ""
        running = self.module.get_submodule(name)
        alone = name and not any(isinstance(m, _MAPS) for m in running.modules())
        if alone and not isinstance(running, nn.Sequential):
            return f"{type(running).__name__} {name}"
        return f"{getattr(func, '__name__', str(func)).strip('_')}()"

    def explain(self) -> str | None:
        """See `find_obstacle`."""
        end = f"{self.first} and {self.second or 'the end of the network'}"
        if self.mixer is not None:
            return f"{self.mixer} mixes the channels between {end}"
        if self.reforming is not None:
            return f"{self.reforming} moves the channels between {end}"
        if self.second is None:
            return None
        second = self.module.get_submodule(self.second)
        if has_own_forward(second):
            base = base_of(second)
            assert base is not None
            kind = f"{type(second).__name__}, a {base.__name__} with a forward of its own"
            return f"{self.second}, after {self.first}, is of the class {kind}"
        if isinstance(second, Conv) and second.groups > 1:
            return f"{self.second}, after {self.first}, takes the channels in {second.groups} groups"
        if self.resizing is not None:
            return f"{self.resizing} changes the size of the maps between {end}"
        if not isinstance(second, Conv):
            return f"{type(second).__name__} {self.second} takes the channels of {self.first}, and no convolution does"
        return None
