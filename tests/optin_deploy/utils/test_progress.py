import io
import re

import pytest
from rich.console import Console

from optin_deploy.utils import progress
from optin_deploy.utils.progress import Stages


def shown(*, terminal: bool, quiet: bool) -> str:
    """What a run of two stages, the second of which fails, writes."""
    file = io.StringIO()
    with Stages(Console(file=file, force_terminal=terminal, width=100), quiet=quiet) as stages:
        with stages.checks():
            pass
        with stages.stage("score [1/2]", 2) as advance:
            advance(1)
        with pytest.raises(ValueError, match="wrong"), stages.stage("measure"):
            raise ValueError("wrong")
        assert list(stages.seconds) == ["load and check", "score [1/2]"]
    return file.getvalue()


def test_off_a_terminal_a_line_tells_of_each_stage_that_is_done() -> None:
    assert re.fullmatch(r"score \[1/2\]: \d+\.\d s\n", shown(terminal=False, quiet=False))


def test_a_terminal_gets_bars() -> None:
    assert "100%" in shown(terminal=True, quiet=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_quiet(terminal: bool) -> None:
    assert shown(terminal=terminal, quiet=True) == ""


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_gets_bars_where_it_can_show_them(widgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "find_spec", lambda _: object() if widgets else None)
    stages = Stages(Console(file=io.StringIO(), force_jupyter=True))
    assert stages._progress.disable != widgets
    assert (stages._lines is None) == widgets
