"""Small matrices on shared cores: one thread is fastest, and examples are the same in every run."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_models import save_shallow

from optin_deploy.latency import target

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
    """Measure latency tables of few sizes, in a cache of their own; yield the patch, for more of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        quick = target.LatencySettings(
            depth=2,
            sizes=2,
            sizes_within_step=(),
            head_counts=1,
            head_widths=2,
            anchor_seconds=0.2,
            iterations=1,
            plan_seconds=0.5,
        )
        patch.setattr(target, "DEFAULT_SETTINGS", quick)
        yield patch
