"""stdout and stderr, whatever they are: closed, full, or of an encoding that cannot say everything."""

import errno
import io
import json
import os
import re
import sys
from pathlib import Path


def prepare_streams() -> None:
    """Let everything be written: what the encoding lacks as `?` (escaped on stderr); what is closed leads nowhere."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def write_json(text: str) -> None:
    """Write a JSON document to stdout; what its encoding lacks is escaped, so that it stays the same document."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
    sys.stdout.write(text + "\n")


def flush_stdout() -> None:
    """Write what stdout still holds while a failure can be told: at its end Python would only say it on the side."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # What cannot be written is tried once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            sys.exit(1)
        raise OSError(error.errno, error.strerror, "stdout") from error
