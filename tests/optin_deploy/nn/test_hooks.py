import pytest
import torch
from torch import Tensor, nn

from optin_deploy.nn.hooks import forward_hooks


def test_hooks_get_the_name_and_may_change_inputs_and_outputs() -> None:
    module = nn.Sequential(nn.Identity(), nn.Identity())
    calls: list[tuple[str, str]] = []

    def double(name: str, _: nn.Module, args: tuple[Tensor], kwargs: dict[str, Tensor]) -> object:
        calls.append(("before", name))
        return (args[0] * 2,), kwargs

    def add(name: str, _: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        calls.append(("after", name))
        return output + 1

    with forward_hooks(module, ["0", "1", "1"], before=double, after=add):
        assert module(torch.ones(1)).item() == 7
    assert calls == [("before", "0"), ("after", "0"), ("before", "1"), ("after", "1")]
    assert module(torch.ones(1)).item() == 1


def test_hooks_are_removed_after_an_error() -> None:
    module = nn.Sequential(nn.Identity())
    with pytest.raises(AttributeError), forward_hooks(module, ["0", "missing"], after=print):
        pass
    assert not module[0]._forward_hooks
