"""The table of runtimes: complete, and in step with what is derived from it elsewhere."""

from pkgutil import resolve_name
from typing import get_args

import pytest

from exporters import BUILDERS, Precision
from profilers import ENGINE_RUNTIMES, SPECS, Runtime
from profilers.layer_profilers import ProfiledRuns
from profilers.runners.base import Runner


def test_every_runtime_has_a_row_and_a_label_of_its_own() -> None:
    assert tuple(SPECS) == get_args(Runtime)
    assert len({spec.label for spec in SPECS.values()}) == len(SPECS)


@pytest.mark.parametrize("runtime", SPECS)
def test_runners_are_what_they_are_named(runtime: str) -> None:
    spec = SPECS[runtime]
    assert issubclass(resolve_name(spec.runner), Runner)
    if spec.layer_profiler is not None:
        assert issubclass(resolve_name(spec.layer_profiler), ProfiledRuns)


def test_every_precision_has_runtimes_that_are_measured_by_default() -> None:
    defaults = {precision for spec in SPECS.values() for precision in spec.default_precisions}
    assert defaults == set(get_args(Precision))


def test_engines_are_run_by_the_products_that_build_them() -> None:
    assert set(BUILDERS) == set(ENGINE_RUNTIMES)
    for name, builder in BUILDERS.items():
        spec = SPECS[name]
        assert (builder.product, builder.package, builder.extra) == (spec.label, spec.package, spec.extra)
