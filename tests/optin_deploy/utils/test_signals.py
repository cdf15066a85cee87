import os
import re
import signal
import tempfile
from pathlib import Path

import pytest

from optin_deploy.utils.signals import Terminated, describe_end, note_kept, raise_on_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_with_everything_temporary_removed(number: signal.Signals, code: int, tmp_path: Path) -> None:
    # Whatever started the tests may have it ignored.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Terminated) as ended, raise_on_signals(), tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.code == code
    assert not list(tmp_path.iterdir())


def test_a_second_signal_does_not_cut_short_what_cleans_up() -> None:
    cleaned = []
    with pytest.raises(Terminated), raise_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)
    assert cleaned


def test_a_signal_that_is_ignored_stays_so() -> None:
    # As nohup leaves it.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raise_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_kept_is_told_only_where_something_is() -> None:
    with pytest.raises(Terminated) as ended, note_kept("sweep"), note_kept("sweep/run"):
        raise Terminated(signal.SIGTERM)
    assert re.fullmatch("ended by SIGTERM.* sweep.*: again", describe_end(ended.value, "again"))
    assert re.fullmatch("interrupted; nothing .*: again", describe_end(Terminated(signal.SIGINT), "again"))


def test_an_interrupt_stays_one_for_callers() -> None:
    with pytest.raises(KeyboardInterrupt) as interrupt, note_kept("run"):
        raise KeyboardInterrupt
    assert interrupt.value.__notes__ == ["finished stages are kept in run"]
