"""What `--verbose` shows, and that nothing stays configured after it."""

import io
import logging
import warnings

import pytest
from rich.console import Console

from optin_deploy.cli.log_output import show_logs


def shown(*, terminal: bool) -> str:
    file = io.StringIO()
    with show_logs(Console(file=file, force_terminal=terminal, width=60, color_system=None)):
        logging.getLogger("optin_deploy.somewhere").info("found [cpu] and %s", "more " * 20)
        logging.getLogger("profilers.somewhere").debug("a detail")
        logging.getLogger("transformers.somewhere").warning("one of theirs")
        logging.getLogger("another.library").warning("odd")
        logging.getLogger("another.library").info("idle")
        # Where it was raised is shown, too, so that the text must not stand there.
        warnings.warn(" ".join(["soon", "gone"]), DeprecationWarning, stacklevel=1)
    logging.getLogger("optin_deploy.somewhere").info("afterwards")
    return file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_ours_from_info_on_all_others_from_warning_on(terminal: bool) -> None:
    # The console folds long lines.
    told = " ".join(shown(terminal=terminal).split())
    for part in ("found [cpu] and more", "one of theirs", "odd", "soon gone"):
        assert told.count(part) == 1
    for part in ("a detail", "idle", "afterwards"):
        assert part not in told


def test_what_the_command_line_silences_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.ERROR)
    assert "one of theirs" in shown(terminal=False)
    assert logging.getLogger("transformers").level == logging.ERROR


def test_off_a_terminal_a_record_is_a_line() -> None:
    first = shown(terminal=False).splitlines()[0]
    assert first.endswith("more more ") and "INFO" in first


def test_nothing_stays_configured() -> None:
    root, ours = logging.getLogger(), logging.getLogger("optin_deploy")
    before = (list(root.handlers), root.level, ours.level, warnings.showwarning)
    shown(terminal=False)
    assert (list(root.handlers), root.level, ours.level, warnings.showwarning) == before
