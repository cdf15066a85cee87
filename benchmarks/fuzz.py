"""Everything that reads a file fuzzed with atheris: whatever it holds, only the documented errors may come out.

    python benchmarks/fuzz.py --seconds 120                  # each target, in a process of its own
    python benchmarks/fuzz.py --target recipe --seconds 600

libFuzzer changes good files, led by what of the code each change newly reaches. Inputs that crash are kept in
``build/fuzz/TARGET``, one that hangs for 20 seconds too. Ends with a table of executions and crashes; exit code 1 when
there are any. It takes ``optin-deploy[fuzz]``, which has wheels for few versions of Python.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Writes none of the user's tables; libFuzzer's processes take what this one has made.
FOUND = Path("build", "fuzz")
_MOST_BYTES = 1 << 14
_HANGS_SECONDS = 20

Target = Callable[[bytes], object]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    arguments.add_argument("--seconds", type=int, default=60, help="of each target")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.inside:
        _fuzz(given.target, given.inside, given.seconds, given.seed)
        return
    with tempfile.TemporaryDirectory(prefix="optin-fuzz-") as name:
        found = {
            target: _supervised(target, Path(name, target), given.seconds, given.seed)
            for target in (TARGETS if given.target == "all" else [given.target])
        }
    print(f"{'target':12} {'executions':>10} {'crashes':>8}")
    for target, (runs, crashes) in found.items():
        print(f"{target:12} {runs:10} {len(crashes):8}")
        for line in crashes:
            print(f"  {line}")
    sys.exit(any(crashes for _, crashes in found.values()))


def _supervised(target: str, folder: Path, seconds: int, seed: int) -> tuple[int, list[str]]:
    """Executions of one target, and what its crashes said."""
    folder.mkdir()
    (FOUND / target).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--target", target, "--seconds", str(seconds), "--seed", str(seed)]
    ended = subprocess.run(
        [*command, "--inside", str(folder)],
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    runs = [int(number) for number in re.findall(r"^(?:Done |#)(\d+)", ended.stderr, re.MULTILINE)]
    if ended.returncode == 0:
        return max(runs, default=0), []
    told = re.findall(
        r"^\s*(?:===.*|[\w.]+(?:Error|Exception)\b.*|.*Test unit written to.*)$", ended.stdout + ended.stderr, re.M
    )
    return max(runs, default=0), [line.strip() for line in told] or [ended.stderr[-500:]]


def _fuzz(target: str, folder: Path, seconds: int, seed: int) -> None:
    import atheris

    # What is imported in here tells libFuzzer which of its lines ran.
    with atheris.instrument_imports(include=["optin_deploy", "profilers", "yaml", "csv"]):
        one, seeds = TARGETS[target](folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(seeds):
        (corpus / str(number)).write_bytes(content)
    limits = [f"-max_total_time={seconds}", f"-max_len={_MOST_BYTES}", f"-timeout={_HANGS_SECONDS}", f"-seed={seed}"]
    kept = f"-artifact_prefix={(FOUND / target).resolve()}{os.sep}"
    atheris.Setup([sys.argv[0], str(corpus), *limits, kept, "-rss_limit_mb=4096"], one)
    atheris.Fuzz()


def _checkpoint(folder: Path) -> tuple[Target, list[bytes]]:
    """optin.json of a checkpoint, up to the plan that it holds; nothing is built of it."""
    from optin_deploy.errors import UserError
    from optin_deploy.models.checkpoint import JSON_NAME, read_plan

    def one(data: bytes) -> None:
        (folder / JSON_NAME).write_bytes(data)
        try:
            read_plan(folder)
        except UserError as error:
            _check_line(error)

    return one, [json.dumps(_IMAGES).encode(), json.dumps(_TEXTS).encode()]


def _recipe(folder: Path) -> tuple[Target, list[bytes]]:
    """A recipe file."""
    from optin_deploy.config.recipe import make_recipe
    from optin_deploy.config.sweep_plan import read_sweep
    from optin_deploy.errors import UserError

    def one(data: bytes) -> None:
        (folder / "r.yaml").write_bytes(data)
        for read in (lambda: make_recipe({}, folder / "r.yaml"), lambda: read_sweep({}, folder / "r.yaml")):
            try:
                read()
            except UserError as error:
                _check_line(error)

    recipes = sorted(Path(__file__).parent.parent.glob("docs/recipes/*.yaml"))
    return one, [b"model: m\nflops: [0.5, 0.6]\nbatch_sizes: [1, 8]\n", *(path.read_bytes() for path in recipes)]


def _report(folder: Path) -> tuple[Target, list[bytes]]:
    """report.json, read and shown."""
    from rich.console import Console

    from optin_deploy.errors import UserError
    from optin_deploy.report import comparison, markdown, read_report
    from optin_deploy.report.terminal import summary

    console = Console(width=100, file=(folder / "shown.txt").open("w+"))

    def one(data: bytes) -> None:
        (folder / "report.json").write_bytes(data)
        try:
            report = read_report(folder)
            markdown.render(report)
            comparison.as_markdown(comparison.lines({"a": report, "b": report}))
            console.file.seek(0)
            console.print(summary(report))
        except UserError as error:
            _check_line(error)

    return one, [_run_report(folder / "run")]


def _tables(folder: Path) -> tuple[Target, list[bytes]]:
    """CSV, TSV and JSON files of texts, for calibration (names of columns, numbers) and evaluation (labels, scores)."""
    from optin_deploy.data.calibration import load_calibration
    from optin_deploy.errors import UserError
    from optin_deploy.evaluation.images import load_dataset

    network = _small_bert(folder / "bert")

    def one(data: bytes) -> None:
        for name in ("t.csv", "t.tsv", "t.json", "t.jsonl"):
            path = folder / name
            path.write_bytes(data)
            for read in (
                lambda path=path: load_calibration(network, path, column="text"),
                lambda path=path: load_calibration(network, path, column="1", labels="2"),
                lambda path=path: load_dataset(network, path),
                lambda path=path: load_dataset(network, path, "text,label"),
            ):
                try:
                    read()
                except UserError as error:
                    _check_line(error)

    return one, [
        b'text,label\na good one,1\n"bad, this",0\nno,2\n',
        b'text\tlabel\na good one\t1\nno "good\t0\n',
        b"one sentence,another,0.5\nfirst,second,4.25\n",
        b"one\ttwo\t1\nthree\tfour\t2e-3\n",
        b'[{"text": "a good one", "label": 1}, {"text": "no", "label": 2.0}, {"text": null, "label": true}]',
        b'{"text": {"0": "a good one", "1": "no"}, "label": {"0": "1", "1": [0]}}',
        b'{"text": "a good one", "label": 1}\n{"text": "bad, this", "label": 0}\n',
    ]


def _sentences(folder: Path) -> tuple[Target, list[bytes]]:
    """The files of sentence-transformers, one after the other in one input: what is read of them, and of nothing."""
    from optin_deploy.errors import UserError
    from optin_deploy.models.sentence_files import read_sentence_files

    names = ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "config_sentence_transformers.json")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        for name, content in zip(names, [*data.split(b"\n"), b"", b"", b"", b""], strict=False):
            (folder / name).write_bytes(content)
        try:
            read_sentence_files(str(folder))
        except UserError as error:
            _check_line(error)

    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    own = {"in_features": 8, "out_features": 4, "activation_function": "torch.nn.Tanh"}
    whole = {"prompts": {"a": "one "}, "default_prompt_name": "a", "similarity_fn_name": "dot"}
    return one, [
        b"\n".join(json.dumps(value).encode() for value in (modules, {"pooling_mode": "cls"}, own, whole)),
        b"\n".join(json.dumps(value).encode() for value in (modules[:2], {"pooling_mode_max_tokens": True}, {}, {})),
    ]


def _latency(folder: Path) -> tuple[Target, list[bytes]]:
    """A latency table in the cache, and the list of all."""
    from profilers.errors import ProfilingError
    from profilers.latency_table import cache_folder, cached_settings, read_table, table_file

    setting = {"device": "cpu", "threads": 1}
    cache_folder().mkdir(parents=True)

    def one(data: bytes) -> None:
        table_file(setting).write_bytes(data)
        cached_settings()
        try:
            read_table(setting)
        except ProfilingError as error:
            _check_line(error)

    def row(units: int) -> dict[str, object]:
        return {"part": "p", "units": units, "width": None, "samples_ms": [[1.0 + units], [1.1 + units]]}

    depths = {"1": [[3.0], [3.1]], "2": [[5.0], [5.1]]}
    table = {"setting": setting, "depth": 2, "depths": depths, "rows": [row(0), row(1), row(2)], "loads": 1}
    return one, [json.dumps(table).encode()]


TARGETS = {
    "checkpoint": _checkpoint,
    "recipe": _recipe,
    "report": _report,
    "tables": _tables,
    "latency": _latency,
    "sentences": _sentences,
}


def _check_line(error: Exception) -> None:
    assert str(error).strip(), "an error that says nothing"


def _small_bert(path: Path):
    """A classifier of one layer and a tokenizer of few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    from optin_deploy.models.load import load_network

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "one", "bad", "this", "no"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=len(words), num_labels=3, max_position_embeddings=16, **sizes)
    BertForSequenceClassification(config).save_pretrained(path)
    return load_network(str(path), sequence_length=8)


def _run_report(directory: Path) -> bytes:
    """report.json of a run."""
    import timm
    import torch

    from optin_deploy.config.recipe import Recipe
    from optin_deploy.data.calibration import from_batches
    from optin_deploy.models.custom import custom_network
    from optin_deploy.run.pipeline import prune_export

    torch.manual_seed(0)
    module = timm.create_model("test_vit", img_size=32, num_classes=4, depth=1).eval()
    batches = [{"x": torch.rand(4, 3, 32, 32)} for _ in range(2)]
    network = custom_network(module, batches[0])
    quick = {"runtimes": ("ort-cpu",), "batch_sizes": (1,), "profile_seconds": 0.1, "threads": 1}
    recipe = Recipe(model="m", flops=0.7, **quick)
    prune_export(recipe, output=directory, network=network, calibration=from_batches(batches), quiet=True)
    return (directory / "report.json").read_bytes()


_TEXTS = {
    "format": 1,
    "source": {"library": "transformers", "name": "m", "arguments": {"model_type": "bert", "vocab_size": 20}},
    "kept": {"layer.0": [0, 2, 3]},
    "tokens": [],
    "weights": "pretrained",
    "inputs": {n: {"shape": [2, 8], "dtype": "int64"} for n in ("input_ids", "attention_mask")},
    "outputs": {"logits": "logits"},
    "sequence_inputs": ["input_ids", "attention_mask"],
    "token_mask": "attention_mask",
    "logits": "logits",
    "text": {"input_names": ["input_ids", "attention_mask"], "max_length": 8},
    "versions": {"torch": "2.9"},
}
_IMAGES = {
    **_TEXTS,
    "source": {"library": "timm", "name": "test_vit", "arguments": {"img_size": 32}},
    "tokens": [5, 4],
    "inputs": {"x": {"shape": [2, 3, 32, 32], "dtype": "float32"}},
    "sequence_inputs": [],
    "token_mask": None,
    "text": None,
    "image": {
        "input_name": "x",
        "size": [32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    },
}

if __name__ == "__main__":
    main()
