"""What all tests have in common."""

import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from renderings import CheckGolden

GOLDEN = Path(__file__).parent / "golden"


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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")


@pytest.fixture
def check_golden(request: pytest.FixtureRequest) -> CheckGolden:
    """Compare a whole rendering with a file of ``tests/golden``, or write the file with ``--update-golden``.

    Ends of lines are stripped and figures that differ from run to run must be replaced before.
    """

    def check(name: str, text: str) -> None:
        lines = [line.rstrip() for line in text.strip("\n").splitlines()]
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert path.is_file(), f"{path} is missing: write it with pytest --update-golden"
        assert lines == path.read_text(encoding="utf-8").splitlines(), f"{name}: if it is meant, pytest --update-golden"

    return check
