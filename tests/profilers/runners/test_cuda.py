from collections.abc import Iterator

import pytest
import torch

from profilers import ProfilingError
from profilers.runners.cuda import capture_graph, check_tf32, set_tensorrt_tf32, set_torch_tf32, timed_by_events

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def torch_settings() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize("tf32", [True, False])
def test_torch_is_told_both_ways(tf32: bool) -> None:
    set_torch_tf32(tf32)
    # All of torch's ways to ask must agree: torch.compile takes the older ones.
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
    assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is tf32
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is tf32
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")


def test_tensorrt_inside_onnx_runtime_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    set_tensorrt_tf32(True)
    check_tf32(True)
    set_tensorrt_tf32(False)
    check_tf32(False)
    with pytest.raises(ProfilingError, match=r"TF32.*NVIDIA_TF32_OVERRIDE=0"):
        check_tf32(True)


def test_events_stand_around_a_run_that_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        """A pretended event, named by the order in which they are made."""

        made = 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            Event.made += 1
            self.name = f"event {Event.made}"

        def record(self, stream: str) -> None:
            done.append(f"{self.name} on {stream}")

        def synchronize(self) -> None:
            done.append(f"{self.name} waited for")

        def elapsed_time(self, other: "Event") -> float:
            assert (self.name, other.name) == ("event 1", "event 2")
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timed_by_events(lambda: done.append("run"), "a stream", None)() == 1.5
    assert done == ["event 1 on a stream", "run", "event 2 on a stream", "event 2 waited for"]


@pytest.mark.gpu
@ON_GPU
def test_events_time_what_is_on_the_stream() -> None:
    values = torch.randn(2048, 2048, device="cuda")
    run = timed_by_events(lambda: torch.mm(values, values), torch.cuda.current_stream(), values)
    ms = run()
    assert ms is not None
    assert ms > 0


@pytest.mark.gpu
@ON_GPU
def test_what_waits_for_the_device_cannot_be_captured() -> None:
    values = torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError):
        capture_graph(lambda: values.sum().item(), torch.cuda.Stream())
    # And leaves the device as it was.
    assert values.sum().item() == 8
