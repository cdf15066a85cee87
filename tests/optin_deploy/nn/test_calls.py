import tiny
import torch
from torch import Tensor, nn

from optin_deploy.nn.calls import first_tensor, trace_calls


def test_calls_are_in_the_order_in_which_they_end() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()))
    x = torch.randn(1, 2)
    calls = trace_calls(module, {"input": x})
    assert [c.name for c in calls] == ["0", "1.0", "1"]
    assert torch.equal(calls[0].input, x)
    assert calls[0].output is calls[1].input
    assert not any(call.changed for call in calls)
    assert not any(m._forward_hooks for m in module.modules())


def test_tensors_are_copied_in_the_state_of_the_call() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            update = self.linear(x)
            update += x
            return self.relu(update)

    module = tiny.randomised(nn.Sequential(InPlace()))
    x = torch.randn(5, 4)
    linear, relu, block = trace_calls(module, {"input": x})
    assert linear.changed
    assert torch.equal(linear.output, module[0].linear(x))
    assert torch.equal(relu.input, linear.output + x)
    assert torch.equal(relu.output, relu.input.relu())
    assert torch.equal(block.output, relu.output)


def test_first_tensor() -> None:
    x = torch.ones(1)
    assert first_tensor(x) is x
    assert first_tensor((x, None)) is x
    assert first_tensor([x]) is x
    assert first_tensor((None, x)) is None
    assert first_tensor(()) is None
    assert first_tensor({"a": x}) is x
