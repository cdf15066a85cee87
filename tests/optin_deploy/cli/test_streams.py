import io
import json
import subprocess
import sys

import pytest

from optin_deploy.cli.streams import prepare_streams, write_json

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_encoding_lacks_is_written_all_the_same(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    prepare_streams()
    for stream, expected in ((out, b"a?b"), (err, b"a\\u2588b")):
        stream.write("a█b")
        stream.flush()
        assert stream.buffer.getvalue() == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_stays_the_same_document(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    document = {"é": "3 µs − 2 × 1 😀 \\"}
    write_json(json.dumps(document, ensure_ascii=False))
    out.flush()
    assert json.loads(out.buffer.getvalue().decode(encoding)) == document  # type: ignore[attr-defined]


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f'"{sys.executable}" -m optin_deploy --help {closed}'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
