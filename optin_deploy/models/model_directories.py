"""Directories given as a model: which file holds the weights, and what a directory is that holds none to be loaded."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from optin_deploy.errors import UserError
from optin_deploy.models.hub import PROCESSOR_FILES, TOKENIZER_FILES
from optin_deploy.models.pickles import SUFFIXES as PICKLES
from optin_deploy.models.pickles import conversion, python_command
from optin_deploy.models.weight_files import INDEX_SUFFIX, LFS_POINTER, SHARD, shards
from optin_deploy.utils.paths import regular

WEIGHTS, INDEX = "model.safetensors", f"model.safetensors{INDEX_SUFFIX}"
_VARIANT = re.compile(r"model\.([^.]+)\.safetensors|model\.safetensors\.index\.([^.]+)\.json")
_ADAPTER = "adapter_config.json"
_OF_TASK = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
}
_OF_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "CPT")
# A file that shows what a directory without config.json is -> what to do.
_KNOWN = (
    ("model_index.json", "a pipeline of diffusers: load the part to prune and give it to custom_network in Python"),
    ("open_clip_config.json", "a network of open_clip: load it and give it to custom_network in Python"),
    ("saved_model.pb", "a network of TensorFlow, of which PyTorch runs none"),
    ("params.json", "in the format of its authors: convert it to that of transformers"),
    ("consolidated.safetensors", "in the format of its authors: convert it to that of transformers"),
    ("*.onnx", "an exported ONNX graph: give the directory of the network that it was exported from"),
    ("*.gguf", "quantized weights for llama.cpp: give the directory that they were made of"),
    ("*.safetensors", None),
    ("*.pt", None),
    ("*.pth", None),
    ("*.ckpt", None),
    ("*.bin", None),
)
_LARGEST_POINTER = 1024


def check_directory(directory: Path) -> None:
    """Raise UserError where ``directory`` shows that it is no network of transformers or timm, and what it is."""
    names = sorted(entry.name for entry in directory.iterdir())
    if not names:
        raise UserError(f"{directory} is an empty directory, without config.json: give that of a network")
    for name in ("config.json", *TOKENIZER_FILES, *PROCESSOR_FILES):
        # Of two forms of a tokenizer, the other may be whole.
        if is_pointer(directory / name) and not (name.endswith(".model") and "tokenizer.json" in names):
            raise UserError(_pointer_told(directory / name))
    if _ADAPTER in names:
        raise UserError(_adapter_told(directory))
    if "config.json" in names:
        _check_library(directory / "config.json")
        return
    _check_foreign(directory)
    trained = [name for name in names if (directory / name / "config.json").is_file()]
    if trained and "modules.json" not in names:
        raise UserError(f"{directory} has no config.json, {directory / trained[-1]} has: give that")


def weights_in(directory: Path) -> Path:
    """The file of weights in ``directory``, or their index.

    Raises:
        UserError: there is none that is loaded, and what there is instead; or files of an index are missing.
    """
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    variants = [name for name in names if _VARIANT.fullmatch(name) and not SHARD.search(name)]
    found = next((name for name in (WEIGHTS, INDEX) if name in names), None)
    if found is None and len(variants) == 1:
        found = variants[0]
    if found is None:
        raise UserError(_without_weights(directory, names, variants))
    for file in shards(directory / found):
        if is_pointer(file):
            raise UserError(_pointer_told(file))
    return directory / found


def variant_of(weights: Path) -> str | None:
    """What transformers calls ``variant`` of a file of weights, as "fp16" of ``model.fp16.safetensors``."""
    found = _VARIANT.fullmatch(weights.name)
    return None if found is None else found.group(1) or found.group(2)


def is_pointer(path: Path) -> bool:
    """Whether there is a pointer of git-lfs in the place of a file."""
    try:
        return (
            path.is_file()
            and path.stat().st_size <= _LARGEST_POINTER
            and regular(path).read_bytes().startswith(LFS_POINTER)
        )
    except OSError:
        return False


def _pointer_told(path: Path) -> str:
    return f"{path} is a pointer of git-lfs and not the file itself: run `git lfs pull` in {path.parent}"


def _check_library(config: Path) -> None:
    try:
        told = json.loads(regular(config).read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(told, dict) and "_class_name" in told and "model_type" not in told:
        raise UserError(
            f"{config.parent} holds a {str(told['_class_name'])[:40]} of diffusers: load it and give it to "
            "custom_network in Python"
        )


def _check_foreign(directory: Path) -> None:
    for pattern, told in _KNOWN:
        found = sorted(directory.glob(pattern))
        if found and told is not None:
            raise UserError(f"{directory} holds {found[0].name} and no config.json: it is {told}")
        if found:
            raise UserError(
                f"{directory} holds {found[0].name} and no config.json, which says what network it is: add it, or name "
                f"a timm model, as in --model deit_small --weights {found[0]}"
            )


def _without_weights(directory: Path, names: Sequence[str], variants: Sequence[str]) -> str:
    if variants:
        choices = " or ".join(f"--weights {directory / name}" for name in variants)
        return f"{directory} holds its weights in {len(variants)} forms: choose {choices}"
    if shard := next((name for name in names if SHARD.search(name) and name.endswith(".safetensors")), None):
        return f"{directory} holds {shard} without {INDEX}, which says what is in which file: fetch that, too"
    if other := next((name for name in names if name.endswith(".safetensors")), None):
        return f"{directory} holds {other} and no {WEIGHTS}: give --weights {directory / other}"
    pickles = [n for n in names if n.endswith((".bin.index.json", *PICKLES)) and not SHARD.search(n)]
    pickle = next((n for n in pickles if n.startswith("pytorch_model")), next(iter(pickles), None))
    # What trainers leave beside weights.
    if pickle is not None and not pickle.startswith(("training_args", "optimizer", "scheduler", "rng_state")):
        path = directory / pickle
        if is_pointer(path):
            return _pointer_told(path)
        command = conversion(path, directory / WEIGHTS)
        return f"the weights of {directory} are in {pickle} (pickles are never loaded); convert it: {command}"
    if other := next((n for n in names if n.endswith((".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".tflite"))), None):
        return f"{directory} holds {other} and no {WEIGHTS}: only weights of PyTorch, as safetensors, are loaded"
    return f"the weights of {directory} cannot be found: it has no {WEIGHTS}"


def _adapter_told(directory: Path) -> str:
    try:
        told = json.loads(regular(directory / _ADAPTER).read_bytes())
        base, kind, task = (told.get(name) for name in ("base_model_name_or_path", "peft_type", "task_type"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return f"{directory / _ADAPTER} cannot be read: merge the adapter into its network, and give the result"
    what = f"{directory} is a peft adapter ({str(kind)[:40]}) of {str(base)[:200]}"
    if kind in _OF_TOKENS:
        return f"{what}, which adds tokens and not weights: it cannot be merged; give {str(base)[:200]}"
    target = directory.with_name(f"{directory.name}-merged")
    return f"{what}: merge it, and give {target}: {_merging(directory, target, base, task)}"


def _merging(directory: Path, target: Path, base: Any, task: Any) -> str:
    """The command that merges an adapter."""
    source, labels = str(directory), _labels(directory)
    # The head of the network itself may be of another size: that of the adapter replaces it.
    headed = labels is not None and task in ("SEQ_CLS", "TOKEN_CLS", None)
    more = f", num_labels={labels}, ignore_mismatched_sizes=True" if headed else ""
    if task in _OF_TASK:
        load = f"from peft import AutoPeftModelFor{_OF_TASK[task]} as M; m = M.from_pretrained({source!r}{more})"
    else:
        auto = "AutoModelForImageClassification" if labels is not None else "AutoModel"
        load = (
            f"from transformers import {auto} as M; from peft import PeftModel; "
            f"m = PeftModel.from_pretrained(M.from_pretrained({str(base)!r}{more}), {source!r})"
        )
    code = f"{load}; m.merge_and_unload().save_pretrained({str(target)!r})"
    has_own = any((directory / name).is_file() for name in TOKENIZER_FILES)
    kind = "AutoTokenizer" if task in _OF_TASK else "AutoProcessor"
    files = source if has_own else str(base)
    code += f"; from transformers import {kind} as P; P.from_pretrained({files!r}).save_pretrained({str(target)!r})"
    return python_command(code)


def _labels(directory: Path) -> int | None:
    """How many classes a head has that is saved with an adapter."""
    try:
        with safe_open(regular(directory / "adapter_model.safetensors"), framework="pt") as file:
            heads = [n for n in file.keys() if re.search(r"(classifier|score|head)(\.\w+)*\.weight$", n)]  # noqa: SIM118
            return int(file.get_slice(heads[-1]).get_shape()[0]) if heads else None
    except (OSError, SafetensorError, IndexError):
        return None


def file_told(path: Path) -> str | None:
    """What a file given as a model is, where that is no network that can be pruned; None where that is unknown."""
    kinds = {
        ".onnx": "an exported ONNX graph: give the network that it was exported from, as a name or directory",
        ".gguf": "of quantized weights for llama.cpp: give the directory that it was made of",
        ".pt2": "an exported program: give the module that it was exported from to custom_network in Python",
        ".tflite": "an exported graph: give the network that it was exported from, as a name or directory",
        ".engine": "a built engine: give the network that it was built from, as a name or directory",
    }
    told = kinds.get(path.suffix.lower())
    return f"--model {path} is {told}" if told else None
