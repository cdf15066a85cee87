import io
import re
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from rich.console import Console

from optin_deploy.utils import progress
from optin_deploy.utils.progress import Stages, progress_until, report_progress, show_progress, track


def shown(*, terminal: bool, quiet: bool) -> str:
    """What a run of two stages, the second of which fails, writes."""
    file = io.StringIO()
    with Stages(Console(file=file, force_terminal=terminal, width=100), quiet=quiet) as stages:
        with stages.checks():
            pass
        with stages.stage("score [1/2]"):
            assert list(track([1, 2])) == [1, 2]
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


def fractions(work: Callable[[], object]) -> list[float]:
    shown: list[float] = []
    with show_progress(shown.append):
        work()
    return shown


def test_items_share_the_bar() -> None:
    assert fractions(lambda: list(track("abcd"))) == [0.25, 0.5, 0.75, 1.0]
    assert fractions(lambda: list(track("ab", [3, 1]))) == [0.75, 1.0]
    assert fractions(lambda: list(track([]))) == [1.0]
    assert fractions(lambda: list(track("ab", [0, 0]))) == [1.0]


def test_loops_inside_loops_share_the_time_of_an_item() -> None:
    def work() -> None:
        for _ in track(range(2)):
            for _ in track(range(2)):
                pass

    assert fractions(work) == [0.25, 0.5, 0.75, 1.0]


def test_work_in_parts() -> None:
    def work() -> None:
        with progress_until(0.5):
            list(track("ab"))
        report_progress(0.75)
        list(track("a"))

    assert fractions(work) == [0.25, 0.5, 0.75, 1.0]


def test_progress_never_falls() -> None:
    def work() -> None:
        list(track("ab"))
        list(track("ab"))
        report_progress(0.1)

    assert fractions(work) == [0.5, 1.0]


def test_without_a_display_nothing_happens() -> None:
    with progress_until(0.5):
        report_progress(0.5)
    assert list(track("ab")) == ["a", "b"]


def test_a_loop_that_is_left_or_fails_leaves_the_display_as_it_was() -> None:
    def work() -> None:
        for _ in track(range(4)):
            break
        with suppress(ZeroDivisionError):
            for _ in track(range(2)):
                _ = 1 / 0
        report_progress(0.5)

    assert fractions(work) == [0.5, 1.0]


def test_a_loop_that_is_closed_late_does_not_touch_the_next_display() -> None:
    shown: list[float] = []
    with show_progress(lambda _: None):
        late = track(range(3))
        next(late)
    with show_progress(shown.append):
        late.close()  # type: ignore[attr-defined]
        report_progress(0.5)
    assert shown == [0.5, 1.0]


def test_items_are_taken_one_by_one() -> None:
    class Counted(list[int]):
        taken = 0

        def __iter__(self) -> Iterator[int]:
            for item in super().__iter__():
                self.taken += 1
                yield item

    items = Counted([1, 2, 3])
    with show_progress(lambda _: None):
        next(iter(track(items)))
    assert items.taken == 1
