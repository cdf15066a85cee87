"""Which engines can be tested where the tests run."""

import pytest

from exporters import BUILDERS
from profilers import lacking_device


def needs_device(runtime: str) -> None:
    """Skip a test that runs engines of ``runtime`` where its packages or its GPU are not there."""
    for package in (BUILDERS[runtime].package, "polygraphy"):
        pytest.importorskip(package)
    if lacking := lacking_device(runtime):
        pytest.skip(lacking)
