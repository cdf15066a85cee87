"""The results of ``gpu.sh``: kept after every case, continued by the next call, not given up for one case.

A case has a key, like ``latency/deit_small/fp16/ort-cuda/32``, and a row, a reason why it failed, or was not reached.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import common

NAME = "gpu"
OUT_OF_TIME = "out of time"
_LONGEST_REASON = 300
Row = dict[str, Any]
# By key: figures, or why there are none.
Outcome = Row | str


class TimeIsUp(BaseException):
    """Raised in the middle of whatever is being done; like KeyboardInterrupt no Exception, which much code catches."""


@dataclass(frozen=True)
class Record:
    """The state of a run.

    Attributes:
        results: the folder above the devices' own.
        basis: what figures must have in common to stand in one file: device, torch, kind of run.
        facts: what else the file tells: how it was measured, which runtimes are not available.
        planned: keys of all cases, in their order.
        rows: by key.
        failed: by key, in one line why.
        deadline: of `perf_counter`, in seconds.
    """

    results: Path
    basis: Mapping[str, Any]
    facts: Mapping[str, Any]
    planned: tuple[str, ...]
    deadline: float
    rows: dict[str, Row] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        """Seconds until time is up."""
        return self.deadline - perf_counter()

    @property
    def not_measured(self) -> dict[str, str]:
        """Cases that were not reached."""
        return {key: OUT_OF_TIME for key in self.planned if key not in self.rows and key not in self.failed}

    def open(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that are still to be measured."""
        return [key for key in keys if key in self.planned and key not in self.rows and key not in self.failed]

    def save(self) -> Path:
        """Write all of it; the file appears whole or not at all."""
        figures = {"basis": self.basis, **self.facts, "rows": self.rows, "failed": self.failed}
        return common.write_results(NAME, {**figures, "not_measured": self.not_measured}, self.results)


def opened(
    results: Path, basis: Mapping[str, Any], facts: Mapping[str, Any], planned: Sequence[str], deadline: float
) -> Record:
    """The record that stands in ``results``, or an empty one where that has another basis. What failed is tried again,
    and what an earlier call planned and did not reach stays planned."""
    path = results / common.device_name() / f"{NAME}.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else {}
    if earlier.get("basis") != basis:
        return Record(results, basis, facts, tuple(planned), deadline)
    keys = tuple(dict.fromkeys([*planned, *earlier["not_measured"]]))
    failed = {key: reason for key, reason in earlier["failed"].items() if key not in planned}
    return Record(results, basis, facts, keys, deadline, earlier["rows"], failed)


def attempt(
    record: Record, keys: Sequence[str], limit_s: float, work: Callable[[float], Mapping[str, Outcome]]
) -> None:
    """Do ``work``, which is given its seconds and gives the outcomes of ``keys``, and save the record.

    Args:
        limit_s: most seconds that it may take. A case that takes longer has failed; one that is cut short because the
            time of the whole run is up was not measured.
    """
    seconds = min(limit_s, record.left_s)
    if seconds <= 0:
        return
    outcomes: Mapping[str, Outcome]
    try:
        with _within(seconds):
            outcomes = work(seconds)
    except TimeIsUp:
        cut_short = seconds < limit_s
        outcomes = {} if cut_short else dict.fromkeys(keys, f"took longer than {limit_s:.0f} s")
    except Exception as error:  # no case ends the run
        outcomes = dict.fromkeys(keys, _reason(error))
    for key, outcome in outcomes.items():
        if isinstance(outcome, str):
            record.failed[key] = outcome
        else:
            record.rows[key] = outcome
    record.save()


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the body when it takes longer; in the main thread only, where signals are handled."""
    assert threading.current_thread() is threading.main_thread()

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:_LONGEST_REASON]
