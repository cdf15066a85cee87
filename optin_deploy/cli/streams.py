"""stdout and stderr, which may be closed, full, or of an encoding that lacks characters."""

import errno
import io
import json
import os
import re
import sys
from pathlib import Path


def prepare_streams() -> None:
    """Write characters that an encoding lacks as ``?`` or, on stderr, escaped; discard output to a closed stream."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def write_json(text: str) -> None:
    """Write a JSON document to stdout. Characters that its encoding lacks are escaped, which JSON reads as the same."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text)
    sys.stdout.write(text + "\n")


def flush_stdout() -> None:
    """Flush stdout while a failure can still be reported; at exit Python would only print a note."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python flushes once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            sys.exit(1)
        raise OSError(error.errno, error.strerror, "stdout") from error
