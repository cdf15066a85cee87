"""A run on local files talks to nobody, in none of its processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_bert, save_images, save_lines, save_shallow, texts

pytestmark = pytest.mark.slow


# Every interpreter that finds this on its path reports what it is about to connect to, and is kept from it.
GUARD = """
import os, sys

def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        if event.startswith("socket.get") or not isinstance(arguments[1], (str, bytes)):
            with open(os.environ["GUARD_LOG"], "a") as log:
                log.write(f"{event} {arguments}\\n")
            raise OSError("no network")
    if event == "import" and arguments[0] == "huggingface_hub":
        with open(os.environ["GUARD_LOG"] + ".telemetry", "a") as log:
            log.write(os.environ.get("HF_HUB_DISABLE_TELEMETRY", "on") + "\\n")

sys.addaudithook(hook)
open(os.environ["GUARD_LOG"] + ".processes", "a").write("one\\n")
"""


@pytest.mark.parametrize("of", ["ours", "transformers"])
def test_a_run_on_local_files_opens_no_connection(of: str, tmp_path: Path) -> None:
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    if of == "ours":
        save_shallow(tmp_path / "model")
        save_images(tmp_path / "samples", 9)
    else:
        save_bert(tmp_path / "model", num_hidden_layers=1)
        save_lines(tmp_path / "samples.txt", texts(9))
    log = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    samples = "samples" if of == "ours" else "samples.txt"
    arguments = ["--model", "model", "--calibration", samples, "--calibration-samples", "8", "--flops", "0.6"]
    quick = ["--runtimes", "ort-cpu", "--batch-sizes", "1", "--profile-seconds", "0.1", "--threads", "1", "--quiet"]
    paths = [str(tmp_path / "guard"), *sys.path]

    def command(*given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *given],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths), "GUARD_LOG": str(log)},
            capture_output=True,
            text=True,
        )

    probe = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    assert "no network" in command("-c", probe).stderr
    assert "127.0.0.1" in log.read_text()
    log.unlink()

    ended = command("-m", "optin_deploy", "prune-export", *arguments, *quick, "--output", "run")
    assert ended.returncode == 0, ended.stderr
    assert not log.exists(), log.read_text()
    # The command line, and the workers that measure.
    assert len(Path(f"{log}.processes").read_text().splitlines()) > 2
    assert set(Path(f"{log}.telemetry").read_text().split()) == {"1"}
