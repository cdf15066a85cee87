"""What all tests have in common."""

import gc
from collections.abc import Iterator
from functools import cache

import pytest


@pytest.fixture(scope="session", autouse=True)
def translations_are_read_once() -> Iterator[None]:
    """For every network torch's exporter parses the sources of all its translations again, a third of what a small
    export takes; a run of the tests makes hundreds."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        apis = _registration.onnxscript_apis
        patch.setattr(apis, "get_torchlib_ops", cache(apis.get_torchlib_ops))
        yield


@pytest.fixture(scope="session", autouse=True)
def garbage_is_collected_seldom() -> Iterator[None]:
    """Exports make millions of objects beside those of the libraries, all of which Python would look through again and
    again, for a tenth of the time that tests take."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    yield
    gc.set_threshold(*before)


@pytest.fixture
def without_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs give no account of where the time goes, which takes seconds and has tests of its own."""
    monkeypatch.setattr("optin_deploy.run.measure_stages.LAYER_RUNTIMES", ())
