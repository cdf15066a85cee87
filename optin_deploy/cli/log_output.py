"""What `--verbose` shows: log records, on the console that has the progress display. Users of the library configure
their own handlers; nothing here is done for them."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler

_OURS = ("optin_deploy", "exporters", "profilers")


@contextmanager
def logs_shown(console: Console) -> Iterator[None]:
    """Meanwhile, records of these packages from INFO on, and of all others from WARNING on, come to ``console``, and
    Python's warnings with them. On a terminal they stand above the bars; in a file, one line each, of any length."""
    from transformers.utils import logging as of_transformers

    handler = _handler(console)
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in _OURS]
    # The command line silences it where nobody asks for more.
    theirs = logging.getLogger("transformers")
    before = [(logger, logger.level) for logger in (root, theirs, *ours)]
    root.setLevel(logging.WARNING)
    theirs.setLevel(logging.WARNING)
    for logger in ours:
        logger.setLevel(logging.INFO)
    # It has a handler of its own, which would write across the bars.
    of_transformers.disable_default_handler()
    of_transformers.enable_propagation()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        of_transformers.disable_propagation()
        of_transformers.enable_default_handler()
        for logger, level in before:
            logger.setLevel(level)


def _handler(console: Console) -> logging.Handler:
    if console.is_terminal:
        shown = RichHandler(console=console, show_path=False, log_time_format="%X", omit_repeated_times=False)
        shown.setFormatter(logging.Formatter("%(message)s"))
        return shown
    lines = logging.StreamHandler(console.file)
    lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    return lines
