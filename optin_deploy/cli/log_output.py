"""Log records on the console of the progress display, for ``--verbose``.

Users of the library configure their own handlers.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler

_OURS = ("optin_deploy", "exporters", "profilers")


@contextmanager
def show_logs(console: Console) -> Iterator[None]:
    """Show records on ``console``: of these packages from INFO on, of others from WARNING on, and Python's warnings.

    On a terminal they appear above the bars. In a file, each is one line.
    """
    from transformers.utils import logging as transformers_logging

    handler = _handler(console)
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in _OURS]
    # The command line silences transformers without --verbose.
    theirs = logging.getLogger("transformers")
    before = [(logger, logger.level) for logger in (root, theirs, *ours)]
    root.setLevel(logging.WARNING)
    theirs.setLevel(logging.WARNING)
    for logger in ours:
        logger.setLevel(logging.INFO)
    # The handler of transformers would write across the bars.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        transformers_logging.disable_propagation()
        transformers_logging.enable_default_handler()
        for logger, level in before:
            logger.setLevel(level)


def _handler(console: Console) -> logging.Handler:
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="%X", omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        return handler
    lines = logging.StreamHandler(console.file)
    lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    return lines
