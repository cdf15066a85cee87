import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import sleep

import huggingface_hub.constants
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_bert, save_images, save_lines, save_shallow, texts

from optin_deploy.cli.main import main
from optin_deploy.config.recipe import Recipe
from optin_deploy.report import read_report
from optin_deploy.run import pipeline, prune_stage

MODEL = ["--model", "test_vit", "--weights", "random", "--image-size", "32", "--calibration-samples", "8"]
QUICK = ["--runtimes", "ort-cpu", "--batch-sizes", "1", "--profile-seconds", "0.2", "--threads", "1"]
RUN = ["prune-export", *MODEL, *QUICK, "--flops", "0.6"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory on a machine without GPU, hub and cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["optin-deploy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def refusal(here: Path, run: Run) -> Callable[..., str]:
    """The one line on stderr of a run that must end with 2 and leave nothing."""

    def call(*arguments: object) -> str:
        before = sorted(here.parent.rglob("*"))
        outcome = run(*arguments)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
        assert sorted(here.parent.rglob("*")) == before
        return outcome.err

    return call


def process(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own, on one thread as these tests are."""
    command = [sys.executable, "-m", "optin_deploy", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def without_progress(err: str) -> str:
    """What is left of stderr without the lines of the stages that are done, of which there is one at least."""
    left = re.sub(r"^[a-zA-Z ]+: \d+\.\d s\n", "", err, flags=re.MULTILINE)
    assert len(left) < len(err)
    return left


# Finished runs


@pytest.mark.slow
def test_json_on_stdout_only(tmp_path: Path) -> None:
    save_shallow(tmp_path / "shallow")
    short = [*QUICK, "--calibration-samples", "8"]
    arguments = ["prune-export", "--model", "shallow", *short, "--flops", "0.6", "--json", "--output", "run"]
    done = process(tmp_path, *arguments)
    assert (done.returncode, without_progress(done.stderr)) == (0, "")
    assert json.loads(done.stdout) == json.loads((tmp_path / "run" / "report.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "shallow"]
    again = read_report(tmp_path / "run" / "report.json").command
    assert again.startswith("optin-deploy prune-export --model shallow")


@pytest.mark.usefixtures("without_layers")
@pytest.mark.slow
def test_verbose_tells_on_stderr_what_is_found_written_and_kept(here: Path, run: Run) -> None:
    save_shallow(here / "shallow")
    arguments = [
        "prune-export",
        "--model",
        "shallow",
        *QUICK,
        "--flops",
        "0.6",
        "--json",
        "--output",
        "run",
        "--verbose",
    ]
    first = run(*arguments)
    assert json.loads(first.out) == json.loads((here / "run" / "report.json").read_text())
    for told in (
        "load and check: started",
        "blocks.0.mlp, neuron, 192 units",
        "built-in samples, 128 samples",
        "batch sizes 1, 1 CPU threads",
        "score: done in",
        "units kept: head",
        "wrote run/checkpoint/model.safetensors, ",
        "wrote run/dense.onnx, ",
        "ort-cpu, batch 1: p50",
        "wrote run/report.html, ",
    ):
        assert first.err.count(told) == 1, told
    # The lines of a run without it would say the same again.
    assert not re.search(r"^[a-z ]+: \d+\.\d s$", first.err, re.MULTILINE)
    second = run(*arguments)
    for name in ("scores.safetensors", "checkpoint", "agreement.json", "pruned.onnx", "profile.json"):
        assert re.search(rf"INFO +run/{name} is kept .*\d", second.err), name


@pytest.mark.parametrize("command", ["prune-export", "sweep", "export", "profile"])
def test_quiet_and_verbose_are_one_too_many(refusal: Callable[..., str], command: str) -> None:
    error = refusal(command, "--quiet", "--verbose")
    assert "--quiet" in error and "--verbose" in error


@pytest.mark.usefixtures("without_layers")
@pytest.mark.slow
def test_failed_gate(here: Path, tmp_path: Path, run: Run) -> None:
    save_shallow(tmp_path / "shallow")
    arguments = ["--model", tmp_path / "shallow", *QUICK, "--flops", "0.6", "--calibration-samples", "8"]
    outcome = run("prune-export", *arguments, "--parity-tolerance", "1e-12", "--no-compensate")
    assert outcome.code == 3
    assert re.fullmatch(r"gate failed: [^\n]*parity[^\n]*\n", without_progress(outcome.err))
    (directory,) = (here / "runs").iterdir()
    assert re.fullmatch(r"shallow-flops0\.6-[0-9a-f]{8}", directory.name)
    assert directory.name in " ".join(outcome.out.split())
    report = read_report(directory / "report.json")
    assert {gate.name: gate.passed for gate in report.gates} == {"budget": True, "parity": False}
    assert report.settings["compensate"] is False
    assert (directory / "report.html").is_file()
    # The saved recipe is the same run, which still fails.
    assert run("prune-export", "--recipe", directory / "recipe.yaml", "--quiet", "--json").code == 3
    assert list((here / "runs").iterdir()) == [directory]


def test_interrupt_names_the_command_that_goes_on(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_stage, "_prune", interrupt)
    outcome = run(*RUN, "--output", "my run")
    assert outcome.code == 130
    line = without_progress(outcome.err)
    assert line.startswith("interrupted") and line.count("\n") == 1
    assert line.endswith(f"optin-deploy {' '.join(RUN)} --output 'my run'\n") and line.count("my run") == 2
    assert load_file(here / "my run" / "scores.safetensors")


def test_interrupt_before_there_is_a_directory_promises_nothing(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prepare", interrupt)
    outcome = run(*RUN)
    assert outcome.code == 130
    assert re.fullmatch(r"interrupted; nothing [^\n]+\n", outcome.err)
    assert outcome.err.endswith(f"optin-deploy {' '.join(RUN)}\n")
    assert not list(here.iterdir())


@pytest.mark.slow
def test_a_terminated_run_leaves_nothing_temporary(tmp_path: Path) -> None:
    save_shallow(tmp_path / "shallow")
    (tmp_path / "tmp").mkdir()
    # Terminated while it measures, which would take minutes.
    long = [*QUICK, "--profile-seconds", "600", "--calibration-samples", "8", "--flops", "0.6", "--output", "run"]
    command = [sys.executable, "-m", "optin_deploy", "prune-export", "--model", "shallow", *long]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not list((tmp_path / "tmp").glob("optin-worker-*")):
            sleep(0.05)
        process.terminate()
        out, err = process.communicate()
    assert (process.returncode, out) == (143, "")
    line = without_progress(err)
    assert "SIGTERM" in line and line.count("\n") == 1 and "optin-deploy prune-export --model shallow" in line
    assert not list((tmp_path / "tmp").glob("optin-*"))
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EISDIR, errno.ENOENT])
def test_what_cannot_be_read_or_written_is_one_line(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "run/plan.json")

    monkeypatch.setattr(prune_stage, "_prune", fail)
    outcome = run(*RUN, "--output", "run")
    assert outcome.code == 2
    told = without_progress(outcome.err)
    assert re.fullmatch(r"error: run/plan.json cannot be read or written: [^\n]+\n", told)
    assert os.strerror(number) in told


def test_an_error_that_names_no_file_is_a_bug(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    monkeypatch.setattr(pipeline, "prepare", fail)
    monkeypatch.setattr(sys, "argv", ["optin-deploy", *RUN])
    with pytest.raises(ConnectionResetError):
        main()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"criterion": "trajectory-obs", "narrow_heads": None, "rounds": 1, "ridge": "auto", "probes": None}),
        (["--criterion", "magnitude", "--narrow-heads"], {"criterion": "magnitude", "narrow_heads": True}),
        (["--no-narrow-heads", "--rounds", "3"], {"narrow_heads": False, "rounds": 3}),
        (["--ridge", "0.25"], {"ridge": 0.25}),
        (["--ridge", "auto", "--no-compensate"], {"ridge": "auto", "compensate": False}),
        (["--calibration-labels", "class"], {"calibration_labels": "class"}),
    ],
)
def test_options_end_in_the_recipe(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: dict[str, object]
) -> None:
    found: list[Recipe] = []

    def stop(recipe: Recipe, **_: object) -> None:
        found.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prune_export_together", stop)
    assert run(*RUN, *options).code == 130
    given = found[0].model_dump()
    assert {name: given[name] for name in expected} == expected


# Bad inputs


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--model", "tset_vit"], "test_vit"),
        (["--model", "no-such-org/no-such-model"], "unknown model"),
        (["--weights", "pretrained"], "pretrained weights.*test_vit"),
        (["--weights", "model.pth"], "model.pth.*pickle|pickle.*model.pth"),
        (["--weights", "none.safetensors"], "none.safetensors.*cannot be read"),
        (["--image-size", "33"], "image size 33 .*16"),
        (["--image-size", "0"], "--image-size 0"),
        (["--model", "test_convnext", "--weights", "random"], "img_size"),
        (["--flops", "0"], "--flops 0"),
        (["--flops", "1"], "--flops 1"),
        (["--flops", "1.5"], "--flops 1.5.*above 0 and below 1"),
        (["--flops", "-1"], "--flops -1"),
        (["--flops", "nan"], "--flops nan"),
        (["--flops", "0.01"], r"0\.01 .*cannot be reached.* 0\.\d+"),
        (["--calibration", "none"], "calibration .*none does not exist"),
        (["--calibration-column", "text"], "--calibration-column text"),
        (["--calibration-samples", "0"], "--calibration-samples 0"),
        (["--evaluate", "none"], "evaluation .*none does not exist"),
        (["--criterion", "fisher", "--calibration-labels", "folders"], "folders.*table of texts"),
        (["--calibration-labels", "folders"], "--calibration-labels folders.* only with"),
        (["--latency", "2"], "--latency 2\\.0: "),
        (["--batch-size", "4"], "--batch-size 4.* only with --latency"),
        (["--precision", "int3"], "--precision int3: "),
        (["--precision", "bf16"], "--precision bf16.*ONNX Runtime.*CPU.*--runtimes"),
        (["--static"], "--static.* only with --runtimes .*tensorrt"),
        (["--workspace-mib", "64"], "--workspace-mib 64.* only with --runtimes .*tensorrt"),
        (["--builder-optimization-level", "6"], "--builder-optimization-level 6"),
        (["--runtime", "tensorrt"], r"tensorrt .*\[tensorrt\]|TensorRT .*GPU"),
        (
            ["--runtimes", "rtx", "--refittable"],
            r"\[rtx\]|RTX .*refittable .*GPU",
        ),
        (["--latency", "0.5", "--runtime", "rtx"], r"\[rtx\]|--runtime rtx.*no GPU"),
        (["--latency", "0.5", "--runtime", "torch-cuda"], "no CUDA device is present"),
        (["--criterion", "foo"], "--criterion foo: .*trajectory-obs.*fisher.*magnitude.*random"),
        (["--criterion", "fisher"], "--criterion fisher .*--calibration-labels"),
        (["--rounds", "0"], "--rounds 0"),
        (["--rounds", "17"], "--rounds 17"),
        (["--scorer", "foo"], "--scorer foo"),
        (["--criterion", "trajectory", "--scorer", "forward", "--probes", "1"], "--probes 1.*--scorer forward"),
        (["--align", "0"], "--align 0"),
        (["--ridge", "-1"], "--ridge -1"),
        (["--ridge", "some"], "--ridge some"),
        (["--opset", "3"], "--opset 3"),
        (["--runtimes", "tpu"], "--runtimes tpu"),
        (["--runtimes", ","], "--runtimes"),
        (["--runtimes", "ort-cpu,ort-cuda"], "no CUDA device is present"),
        (["--runtimes", "torch-cuda"], "no CUDA device is present"),
        (["--runtimes", "ort-tensorrt"], "no CUDA device is present"),
        (["--runtimes", "torch-graph-cuda"], "no CUDA device is present"),
        (["--device", "cuda"], "--device cuda.*no CUDA device"),
        (["--device", "tpu"], "--device tpu"),
        (["--batch-sizes", "0,a"], "--batch-sizes 0"),
        (["--batch-sizes", "1,a"], "--batch-sizes a"),
        (["--threads", "0"], "--threads 0"),
        (["--profile-seconds", "inf"], "--profile-seconds inf"),
        (["--recipe", "none.yaml"], "none.yaml cannot be read"),
    ],
)
def test_wrong_options(refusal: Callable[..., str], changes: list[str], expected: str) -> None:
    assert re.search(expected, refusal(*RUN, *changes))


@pytest.mark.parametrize(
    ("given", "missing"), [(["--flops", "0.5"], "--model"), (["--model", "deit_small"], "--flops")]
)
def test_needed_options(refusal: Callable[..., str], given: list[str], missing: str) -> None:
    assert refusal("prune-export", *given).startswith(f"error: {missing} ")


def test_unknown_key_in_recipe(here: Path, refusal: Callable[..., str]) -> None:
    save_lines(here / "r.yaml", ["flop: 0.5", "model: test_vit"])
    assert re.search("'flop'.*'flops'", refusal("prune-export", "--recipe", "r.yaml"))


def test_bad_calibration(here: Path, refusal: Callable[..., str]) -> None:
    (here / "empty").mkdir()
    assert "holds no images" in refusal(*RUN, "--calibration", "empty")
    save_images(here / "images", 4)[2].write_bytes(b"no image")
    assert "002.png cannot be read" in refusal(*RUN, "--calibration", "images")


def test_bad_text_calibration(here: Path, refusal: Callable[..., str]) -> None:
    save_bert(here / "bert")
    table = save_lines(here / "t.csv", ["text,label", *(f"{t},1" for t in texts(4))])
    command = ["prune-export", "--model", "bert", "--flops", "0.7", "--sequence-length", "12", "--calibration"]
    assert "--calibration-column" in refusal(*command, table)
    assert "'words'" in refusal(*command, table, "--calibration-column", "words")
    assert "holds no texts" in refusal(*command, save_lines(here / "e.txt", [""]))
    labels = [*command, table, "--calibration-column", "text", "--criterion", "fisher"]
    assert "'kind'" in refusal(*labels, "--calibration-labels", "kind")
    assert "'w0 w0'" in refusal(*labels, "--calibration-labels", "text")
    assert "--criterion fisher " in refusal(*labels)


@pytest.mark.parametrize("output", [".", "file", "file/run", "other"])
def test_output_that_holds_something_else(here: Path, refusal: Callable[..., str], output: str) -> None:
    (here / "file").touch()
    (here / "other").mkdir()
    (here / "other" / "run.json").write_text('{"fingerprint": "another"}')
    assert f"--output {output} " in refusal(*RUN, "--output", output)


def test_missing_package_names_the_extra(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    assert re.search(r"pip install 'optin-deploy\[cpu\]'.*\[gpu\]", refusal(*RUN))


@pytest.mark.parametrize(
    ("runtime", "told"),
    [
        ("ort-cuda", ("CUDAExecutionProvider", "pip install 'optin-deploy[gpu]'")),
        ("ort-tensorrt", ("TensorrtExecutionProvider", "pip install 'optin-deploy[ort-tensorrt]'")),
    ],
)
def test_an_onnxruntime_without_the_provider_names_the_extras(
    runtime: str, told: tuple[str, ...], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    error = refusal(*RUN, "--device", "cpu", "--runtimes", runtime)
    assert all(fact in error for fact in (runtime, *told)), error


@pytest.mark.parametrize("endpoint", ["http://x:abc", "http://[::1"])
def test_a_hub_with_an_invalid_address_is_an_error(
    endpoint: str, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    message = refusal("models")
    assert "HF_ENDPOINT" in message and endpoint in message


def test_messages_are_no_markup(here: Path, refusal: Callable[..., str]) -> None:
    (here / "[bold]x[").mkdir()
    assert "[bold]x[/] :smile:" in refusal(*RUN, "--calibration", "[bold]x[/] :smile:")


@pytest.mark.parametrize(
    "arguments",
    [["prune-export", "--flos", "0.5"], ["prune-export", "--flops", "half"], ["no-such-command"], [*RUN, "stray"]],
)
def test_usage_errors(here: Path, run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert re.fullmatch(r"error: [^\n]+; see [^\n]* --help\n", outcome.err)
    assert not list(here.iterdir())


def test_no_command_gets_the_help(run: Run) -> None:
    outcome = run()
    assert outcome.code == 2
    assert "prune-export" in outcome.out + outcome.err
    assert "error:" not in outcome.err


@pytest.mark.slow
def test_no_traceback_from_a_process(tmp_path: Path) -> None:
    done = process(tmp_path, *RUN, "--flops", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: --flops 2[^\n]*\n", done.stderr)
    assert not list(tmp_path.iterdir())


# The other commands


def test_models(run: Run) -> None:
    outcome = run("models", "deit_tiny")
    assert (outcome.code, outcome.err) == (0, "")
    assert "deit_tiny_patch16_224" in outcome.out
    found = json.loads(run("models", "deit_tiny", "--json").out)
    assert "deit_tiny_patch16_224" in found["timm"]
    assert found["modules"]


def test_env(run: Run) -> None:
    outcome = run("env")
    assert (outcome.code, outcome.err) == (0, "")
    assert "torch" in outcome.out
    assert json.loads(run("env", "--json").out)["versions"]["torch"]


def test_help(run: Run) -> None:
    assert run("--help").code == 0
    assert "--flops" in run("prune-export", "--help").out
