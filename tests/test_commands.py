"""Every command of the README and the documentation, run as it stands.

Those of optin-deploy run in this process, on tiny networks and data under the names that the pages use. What they do
before long work (reading options, networks and data, checking budgets and runtimes) is all real, and so are pruning,
export and parity; speed is not measured, which other tests do, and commands for a latency stop where its tables would
be measured. For every other command the table `COVERED` says what has to hold. A command that nothing covers fails.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import WORDS, classifier, save_bert, save_images, save_lines, save_shallow, texts

from optin_deploy.cli.main import app, main
from optin_deploy.config.recipe import Recipe
from optin_deploy.models.load import load_network
from optin_deploy.network import Network
from optin_deploy.run import latency_stage, measure_stages
from profilers import Comparison, Measurement, RawSamples, environment

pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("optin-deploy", "python", "python3", "pip", "make", "sh", "docker", "torchrun", "mkdocs", "npm")
# What stands in a sentence may leave out what the sentence says; with it, it can be run.
COMPLETED = {"optin-deploy sweep --flops 0.8,0.7,0.6,0.5": "--model path/or/name"}
SHORT = ["--profile-seconds", "0.2", "--batch-sizes", "1", "--threads", "1", "--calibration-samples", "32"]
# Of networks this small, 64 neurons are too much of the whole for budgets to be met.
FINE = ["--align", "8"]


def commands(page: Path) -> list[str]:
    """The shell commands of a page, in order: in fences of sh, in indented blocks, and between backquotes."""
    text = page.read_text(encoding="utf-8")
    found: list[tuple[int, str]] = []
    for fence in re.finditer(r"```sh\n(.*?)```", text, re.DOTALL):
        found += [(fence.start(), line) for line in _lines(fence[1])]
    without = re.sub(r"```.*?```", lambda m: " " * len(m[0]), text, flags=re.DOTALL)
    for block in re.finditer(r"(?:^    .*\n)+", without, re.MULTILINE):
        found += [(block.start(), line) for line in _lines(block[0]) if _program(line)]
    for code in re.finditer(r"(?<!`)`([^`\n]+)`(?!`)", without):
        if _program(code[1]) and " " in code[1]:
            found.append((code.start(), code[1]))
    return [line for _, line in sorted(found, key=lambda item: item[0])]


def _lines(block: str) -> list[str]:
    """The commands of a block, without comments and the path of an environment."""
    joined = re.sub(r"\\\n\s*", "", block)
    parts = [part.strip() for line in joined.splitlines() for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [re.sub(r"^\.venv/bin/", "", re.sub(r" +", " ", part)) for part in parts if part]


def _program(line: str) -> bool:
    return line.split(" ")[0] in PROGRAMS


ALL = [(page, command) for page in PAGES for command in commands(page)]
OURS = list(dict.fromkeys(command for _, command in ALL if command.startswith("optin-deploy")))
OTHERS = list(dict.fromkeys(command for _, command in ALL if not command.startswith("optin-deploy")))


# Commands of ours


class Reached(Exception):  # noqa: N818
    """All is checked, and the latency tables would be measured."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks and data under the names that the pages use."""
    folder = tmp_path_factory.mktemp("world")
    for model in ("path/or/name", "data/minilm_sst2", "bert", "nli"):
        save_bert(folder / model, num_hidden_layers=1)
    save_bert(folder / "minilm", head=False, num_hidden_layers=1)
    save_shallow(folder / "my-vit")
    for name in ("sentences.txt", "texts.txt"):
        save_lines(folder / name, texts(60))
    pairs_of_texts = [{"premise": t, "hypothesis": t[:5] or t, "label": i % 3} for i, t in enumerate(texts(60))]
    for name in ("train.jsonl", "dev.jsonl"):
        save_lines(folder / name, list(map(json.dumps, pairs_of_texts)))
    rows = [f"{text}\t{i % 3}" for i, text in enumerate(texts(60))]
    (folder / "data" / "sst2").mkdir()
    for name in ("dev.tsv", "data/sst2/train.tsv", "data/sst2/dev.tsv"):
        save_lines(folder / name, rows)
    rng = np.random.default_rng(0)
    pairs = [f"{rng.choice(WORDS)},{rng.choice(WORDS)} {rng.choice(WORDS)},{rng.uniform(0, 5):.1f}" for _ in range(20)]
    save_lines(folder / "dev.csv", pairs)
    for name in ("photos", "my/photos", "train"):
        save_images(folder / name, 12)
    for number in range(10):
        save_images(folder / "val" / str(number), 1, seed=number)
    for recipe in (ROOT / "docs" / "recipes").glob("*.yaml"):
        shutil.copy(recipe, folder)
    return folder


def stand_in(model: str, **options: Any) -> Network:
    """A network of two blocks for those that timm knows by name; all others are what is in the folder."""
    return classifier(10, depth=2) if model.startswith(("deit_", "vit_tiny")) else load_network(model, **options)


def instantly(dense: Any, pruned: Any, sample: Any, config: Any, progress: Any) -> Comparison:
    """Made up latencies of what was to be measured."""
    samples = {"dense": [[2.0] * 3] * 9, "dense_again": [[2.0] * 3] * 9, "pruned": [[1.0] * 3] * 9}
    cases = [(runtime, size) for runtime in config.runtimes for size in config.batch_sizes]
    return Comparison(
        tuple(Measurement.from_samples(r, size, RawSamples(samples, True, 1.0)) for r, size in cases), environment(), {}
    )


def reached(*_: object, **__: object) -> None:
    raise Reached


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(world)
    monkeypatch.setattr("optin_deploy.models.load.load_network", stand_in)
    monkeypatch.setattr(measure_stages, "compare", instantly)
    monkeypatch.setattr(measure_stages, "_break_down_layers", lambda *_: [])
    monkeypatch.setattr(latency_stage, "measure_latency_model", reached)
    yield world


def arguments(command: str) -> list[str]:
    """What the command gives to the program, with what makes it short."""
    given = shlex.split(f"{command} {COMPLETED.get(command, '')}".replace("$MINILM", "minilm"))[1:]
    if "--help" in given or given[0] not in ("prune-export", "sweep"):
        return given
    engines = ["--builder-optimization-level", "0"] if "ort-cpu,rtx" in given else []
    without = "--tokens" in given or "--sparsity" in given
    return given + SHORT + engines + ([] if without else FINE)


@pytest.mark.parametrize("command", OURS)
def test_a_command_of_ours_runs(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in re.findall(r"--output (runs/\w+)", command):
        shutil.rmtree(here / run, ignore_errors=True)
    for run in re.findall(r"(?<!--output )\bruns/(\w+)", command):
        if not (here / "runs" / run).exists():
            shutil.copytree(a_run(), here / "runs" / run)
    monkeypatch.setattr(sys, "argv", ["optin-deploy", *arguments(command)])
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    except Reached:
        assert "--latency" in command
        return
    told = capsys.readouterr()
    if ended.value.code == 2 and re.search(r"--runtimes \S*(tensorrt|rtx)", command):
        # The builder is not installed, or there is no GPU to measure on: one line, and what to do or what was done.
        assert re.search(r"^error: [^\n]*(optin-deploy\[(tensorrt|rtx)\]|GPU)[^\n]*\n\Z", told.err, re.MULTILINE), told
        return
    assert not ended.value.code, told


def a_run() -> Path:
    """A run for commands that go on from one, made by whichever test comes first: they may come in any order."""
    folder = Path("runs") / "made"
    if not folder.exists():
        given = ["prune-export", "--model", "path/or/name", "--flops", "0.5", "--output", str(folder), *SHORT, *FINE]
        app(given, standalone_mode=False)
    return folder


# All other commands


def targets(command: str) -> bool:
    """Targets of make."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return all(re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE) for name in command.split()[1:])


def installable(command: str) -> bool:
    """Packages that this project names, with extras that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = str(project) + (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in (part for part in shlex.split(command)[2:] if not part.startswith("-")):
        extra = re.fullmatch(r"(?:optin-deploy|\.)\[([\w-]+)\]", name)
        if extra and extra[1] not in project["optional-dependencies"]:
            return False
        if not extra and name not in known:
            return False
    return True


def script(command: str) -> bool:
    """A script that is there and compiles, with options that it, or what its parser is made of, has."""
    path, *options = shlex.split(command)[1:]
    text = (ROOT / path).read_text(encoding="utf-8")
    compile(text, path, "exec")
    text += (ROOT / "benchmarks" / "common.py").read_text(encoding="utf-8")
    return all(f'"{option}"' in text for option in options if option.startswith("--"))


def shell_script(command: str) -> bool:
    """A shell script without errors of syntax, whose options are those of the program that it starts."""
    _, script, *options = command.split()
    path = ROOT / script
    known = (path.with_suffix("") / "main.py").read_text(encoding="utf-8") if options else ""
    return (
        all(f'"{o}"' in known for o in options) and subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0
    )


def as_make_does(command: str) -> bool:
    """An environment made as `make install` makes it."""
    ours = command.replace("python3", "$(PYTHON)").replace(".venv", "$(VENV)")
    return ours in (ROOT / "Makefile").read_text(encoding="utf-8")


def in_the_demo(command: str) -> bool:
    """What `make demo` runs, too."""
    substituted = command.partition("=$(python ")[2].removesuffix(")")
    return bool(substituted) and substituted in (ROOT / "benchmarks" / "demo.sh").read_text(encoding="utf-8")


def as_one_process(command: str) -> bool:
    """What follows the module is a command of ours with options that exist; what several processes do has tests of its
    own."""
    options = re.findall(r"--[\w-]+", command.partition("-m optin_deploy prune-export")[2])
    known = {f"--{name.replace('_', '-')}" for name in (*Recipe.model_fields, "output")}
    return set(options) <= known


# A pattern of commands -> what has to hold for one.
COVERED: dict[str, Callable[[str], bool]] = {
    r"make [\w -]+": targets,
    r"pip install .+": installable,
    r"python3 -m venv .+": as_make_does,
    r"python (benchmarks|tests)/\S+\.py.*": script,
    r"sh benchmarks/\w+\.sh( --\w+)*": shell_script,
    r"torchrun .+ -m optin_deploy .+": as_one_process,
    r"MINILM=\$\(python -c .+\)": in_the_demo,
}


@pytest.mark.parametrize("command", OTHERS)
def test_another_command_is_covered(command: str) -> None:
    checks = [check for pattern, check in COVERED.items() if re.fullmatch(pattern, command)]
    assert checks, f"nothing covers {command!r}: add it to COVERED"
    assert all(check(command) for check in checks), command


def test_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Commands\n\n    make a && make b   # both\n    no command\n\nInline: `pip install c`, `pip`, `other d`.\n\n"
        "```sh\nE=$(f)\noptin-deploy g \\\n    --h '#1'   # why\n```\n\n```python\nmake = 1\n```\n",
        encoding="utf-8",
    )
    assert commands(page) == ["make a", "make b", "pip install c", "E=$(f)", "optin-deploy g --h '#1'"]
    assert len(OURS) > 12 and len(OTHERS) > 12
