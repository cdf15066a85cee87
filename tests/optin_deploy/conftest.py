"""Small matrices on shared cores: one thread is fastest, and examples are the same in every run."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_models import save_shallow

from optin_deploy.latency import tables

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a checkpoint of one block."""
    path = tmp_path_factory.mktemp("shallow") / "model"
    save_shallow(path)
    return str(path)


@pytest.fixture(scope="module")
def quick_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Latency tables of few sizes, in a cache of their own; with the patch, for more of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        few = {"_DEPTH": 2, "_ANCHOR_SECONDS": 0.2, "_MOST_SIZES": 2, "_WITHIN": (), "_HEAD_SIZES": 1, "_WIDTHS": 2}
        for name, value in few.items():
            patch.setattr(tables, name, value)
        yield patch
