"""Directories given as a model: find the weights, or describe what the directory holds instead."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from optin_deploy.errors import UserError
from optin_deploy.models.hub import PROCESSOR_FILES, TOKENIZER_FILES
from optin_deploy.models.pickles import SUFFIXES as PICKLES
from optin_deploy.models.pickles import conversion_command, python_command
from optin_deploy.models.weight_files import FOREIGN_FORMATS, INDEX_SUFFIX, LFS_POINTER, SHARD, shards
from optin_deploy.utils.paths import require_regular

WEIGHTS, INDEX = "model.safetensors", f"model.safetensors{INDEX_SUFFIX}"
_VARIANT = re.compile(r"model\.([^.]+)\.safetensors|model\.safetensors\.index\.([^.]+)\.json")
_ADAPTER = "adapter_config.json"
_PEFT_CLASSES = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
}
_TOKEN_ADAPTERS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "CPT")
# File in a directory without config.json -> what the directory is, and what to do; None for weights.
_FOREIGN = (
    ("model_index.json", "a pipeline of diffusers: load the part to prune and give it to custom_network in Python"),
    ("open_clip_config.json", "a network of open_clip: load it and give it to custom_network in Python"),
    ("saved_model.pb", "a network of TensorFlow: give one of PyTorch"),
    ("params.json", "in the format of its authors: convert it to that of transformers"),
    ("consolidated.safetensors", "in the format of its authors: convert it to that of transformers"),
    *((f"*{suffix}", f"{FOREIGN_FORMATS[suffix]}, as a directory") for suffix in (".onnx", ".gguf")),
    ("*.safetensors", None),
    ("*.pt", None),
    ("*.pth", None),
    ("*.ckpt", None),
    ("*.bin", None),
)
_LARGEST_POINTER = 1024


def check_directory(directory: Path) -> None:
    """Raise UserError if ``directory`` is not a network of transformers or timm, with what it seems to be."""
    names = sorted(entry.name for entry in directory.iterdir())
    if not names:
        raise UserError(f"{directory} is an empty directory, without config.json: give the directory of a network")
    for name in ("config.json", *TOKENIZER_FILES, *PROCESSOR_FILES):
        # A tokenizer may be stored in two forms, and the other one be complete.
        if is_pointer(directory / name) and not (name.endswith(".model") and "tokenizer.json" in names):
            raise UserError(_pointer_error(directory / name))
    if _ADAPTER in names:
        raise UserError(_adapter_error(directory))
    if "config.json" in names:
        _check_library(directory / "config.json")
        return
    _check_foreign(directory)
    trained = [name for name in names if (directory / name / "config.json").is_file()]
    if trained and "modules.json" not in names:
        raise UserError(f"{directory} has no config.json, {directory / trained[-1]} has: give that")


def find_weights(directory: Path) -> Path:
    """Return the file of weights in ``directory``, or their index.

    Raises:
        UserError: there is no file that can be loaded (the message names other weights), or files of an index are
            missing.
    """
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    variants = [name for name in names if _VARIANT.fullmatch(name) and not SHARD.search(name)]
    name = next((name for name in (WEIGHTS, INDEX) if name in names), None)
    if name is None and len(variants) == 1:
        name = variants[0]
    if name is None:
        raise UserError(_no_weights_error(directory, names, variants))
    for file in shards(directory / name):
        if is_pointer(file):
            raise UserError(_pointer_error(file))
    return directory / name


def variant_of(weights: Path) -> str | None:
    """Return transformers' ``variant`` of a file of weights, as "fp16" for ``model.fp16.safetensors``."""
    match = _VARIANT.fullmatch(weights.name)
    return match and (match[1] or match[2])


def is_pointer(path: Path) -> bool:
    """Whether a file is a pointer of git-lfs to another one."""
    try:
        return (
            path.is_file()
            and path.stat().st_size <= _LARGEST_POINTER
            and require_regular(path).read_bytes().startswith(LFS_POINTER)
        )
    except OSError:
        return False


def _pointer_error(path: Path) -> str:
    return f"{path} is a pointer of git-lfs and not the file itself: run `git lfs pull` in {path.parent}"


def _check_library(config: Path) -> None:
    try:
        content = json.loads(require_regular(config).read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(content, dict) and "_class_name" in content and "model_type" not in content:
        raise UserError(
            f"{config.parent} holds a {str(content['_class_name'])[:40]} of diffusers: load it and give it to "
            "custom_network in Python"
        )


def _check_foreign(directory: Path) -> None:
    for pattern, description in _FOREIGN:
        file = min(directory.glob(pattern), default=None)
        if file and description:
            raise UserError(f"{directory} holds {file.name} and no config.json: it is {description}")
        if file:
            raise UserError(
                f"{directory} holds {file.name} and no config.json, which describes the network: add it, or name a "
                f"timm model, as in --model deit_small --weights {file}"
            )


def _no_weights_error(directory: Path, names: Sequence[str], variants: Sequence[str]) -> str:
    if variants:
        choices = " or ".join(f"--weights {directory / name}" for name in variants)
        return f"{directory} holds its weights in {len(variants)} forms: choose {choices}"
    if shard := next((name for name in names if SHARD.search(name) and name.endswith(".safetensors")), None):
        return f"{directory} holds {shard} without the index {INDEX}: fetch that, too"
    if other := next((name for name in names if name.endswith(".safetensors")), None):
        return f"{directory} holds {other} and no {WEIGHTS}: give --weights {directory / other}"
    pickles = [n for n in names if n.endswith((".bin.index.json", *PICKLES)) and not SHARD.search(n)]
    pickle = next((n for n in pickles if n.startswith("pytorch_model")), next(iter(pickles), None))
    # Files that trainers write next to weights are no weights.
    if pickle is not None and not pickle.startswith(("training_args", "optimizer", "scheduler", "rng_state")):
        path = directory / pickle
        if is_pointer(path):
            return _pointer_error(path)
        command = conversion_command(path, directory / WEIGHTS)
        return f"the weights of {directory} are in {pickle} (pickles are never loaded); convert it: {command}"
    if other := next((n for n in names if n.endswith((".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".tflite"))), None):
        return f"{directory} holds {other} and no {WEIGHTS}: only weights of PyTorch, as safetensors, are loaded"
    return f"the weights of {directory} cannot be found: it has no {WEIGHTS}"


def _adapter_error(directory: Path) -> str:
    try:
        config = json.loads(require_regular(directory / _ADAPTER).read_bytes())
        base, kind, task = (config.get(name) for name in ("base_model_name_or_path", "peft_type", "task_type"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return f"{directory / _ADAPTER} cannot be read: merge the adapter into its network, and give the result"
    what = f"{directory} is a peft adapter ({str(kind)[:40]}) of {str(base)[:200]}"
    if kind in _TOKEN_ADAPTERS:
        return f"{what}, which adds tokens and not weights: it cannot be merged; give {str(base)[:200]}"
    target = directory.with_name(f"{directory.name}-merged")
    return f"{what}: merge it, and give {target}: {_merge_command(directory, target, base, task)}"


def _merge_command(directory: Path, target: Path, base: object, task: object) -> str:
    """Return the shell command that merges an adapter into its network."""
    source, labels = str(directory), _label_count(directory)
    # The network's own head may have another size; the adapter's replaces it.
    has_head = labels is not None and task in ("SEQ_CLS", "TOKEN_CLS", None)
    more = f", num_labels={labels}, ignore_mismatched_sizes=True" if has_head else ""
    if str(task) in _PEFT_CLASSES:
        load = (
            f"from peft import AutoPeftModelFor{_PEFT_CLASSES[str(task)]} as M; m = M.from_pretrained({source!r}{more})"
        )
    else:
        auto = "AutoModelForImageClassification" if labels is not None else "AutoModel"
        load = (
            f"from transformers import {auto} as M; from peft import PeftModel; "
            f"m = PeftModel.from_pretrained(M.from_pretrained({str(base)!r}{more}), {source!r})"
        )
    code = f"{load}; m.merge_and_unload().save_pretrained({str(target)!r})"
    has_own = any((directory / name).is_file() for name in TOKENIZER_FILES)
    kind = "AutoTokenizer" if str(task) in _PEFT_CLASSES else "AutoProcessor"
    files = source if has_own else str(base)
    code += f"; from transformers import {kind} as P; P.from_pretrained({files!r}).save_pretrained({str(target)!r})"
    return python_command(code)


def _label_count(directory: Path) -> int | None:
    """Return the number of classes of the head that is saved with an adapter; None without a head."""
    try:
        with safe_open(require_regular(directory / "adapter_model.safetensors"), framework="pt") as file:
            heads = [n for n in file.keys() if re.search(r"(classifier|score|head)(\.\w+)*\.weight$", n)]  # noqa: SIM118
            return int(file.get_slice(heads[-1]).get_shape()[0]) if heads else None
    except (OSError, SafetensorError, IndexError):
        return None


def describe_file(path: Path) -> str:
    """Return the error message for a file given as ``--model``: what it is, and what to give instead."""
    if kind := FOREIGN_FORMATS.get(path.suffix.lower()):
        return f"--model {path} is {kind}, as a name or directory"
    return (
        f"--model {path} is a file: name the model of its weights, as in --model deit_small --weights {path}, or give "
        "a directory"
    )
