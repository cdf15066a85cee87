"""The model card of a pruned network: the README.md of its checkpoint, by the conventions of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from optin_deploy.report import markdown, wording
from optin_deploy.report.schema import Report

# Which class of transformers loads a checkpoint, by its files.
_LOADERS = {
    "tokenizer_config.json": ("tokenizer", "AutoTokenizer"),
    "preprocessor_config.json": ("image_processor", "AutoImageProcessor"),
}
_SOUNDS = ("feature_extractor", "AutoFeatureExtractor")
_REFUSED = (
    "`AutoModel.from_pretrained` refuses these weights: layers are narrower than `config.json`, which is the dense "
    "network's, says, and some may be gone."
)
_SETTINGS = (
    *("flops", "latency", "latency_ms", "runtime", "batch_size", "criterion", "compensate", "rounds"),
    *("tokens", "sparsity", "precision", "seed"),
)


@dataclass(frozen=True)
class Facts:
    """Facts of a model card that are not in the report.

    Attributes:
        files: names in the folder that the card is for.
        base_model: id on the hub of what was pruned, if it has one.
        license: of what was pruned, if it is known.
        task: what the network is for, in the hub's words, if it is known.
    """

    files: Collection[str]
    base_model: str | None = None
    license: str | None = None
    task: str | None = None


def render(report: Report, facts: Facts) -> str:
    """Return the card: the hub's header, the verdict, how to load the network, its figures, and how it was made.

    A card is for others: of data it has the names, not where they lie.
    """
    report = _without_folders(report)
    title = f"{report.model.name}, pruned: {wording.change_of_flops(report)}"
    parts = [_header(report, facts), f"# {markdown.escaped(title)}", f"**{markdown.escaped(wording.verdict(report))}**"]
    parts += [*markdown.banners(report), "## Load", markdown.fenced(_loading(report, facts), "python")]
    if "config.json" in facts.files:
        parts.append(_REFUSED)
    parts += ["## Figures", *markdown.figures(report), "## How it was made"]
    parts += [_making(report), markdown.machine(report)]
    return "\n\n".join(parts) + "\n"


def _without_folders(report: Report) -> Report:
    calibration, evaluation = report.calibration, report.evaluation
    if not calibration.builtin:
        calibration = calibration.model_copy(update={"source": Path(calibration.source).name})
    if evaluation is not None:
        evaluation = evaluation.model_copy(update={"dataset": Path(evaluation.dataset).name})
    return report.model_copy(update={"calibration": calibration, "evaluation": evaluation})


def _header(report: Report, facts: Facts) -> str:
    onnx = ["onnx"] if any(name.endswith(".onnx") for name in facts.files) else []
    data = ModelCardData(
        base_model=facts.base_model,
        license=facts.license,
        library_name="optin-deploy",
        pipeline_tag=facts.task,
        tags=["optin-deploy", "pruned", *onnx],
    )
    return f"---\n{data.to_yaml()}\n---"


def _loading(report: Report, facts: Facts) -> str:
    custom = report.model.library == "custom"
    lines = ["import optin_deploy"]
    loaders = [_loader(report, name) for name in _LOADERS if name in facts.files]
    if loaders:
        lines.append(f"from transformers import {', '.join(loader for _, loader in loaders)}")
    arguments = '"path/to/this/folder"' + (", module=MyModule()" if custom else "")
    lines += ["", f"module = optin_deploy.load({arguments})" + ("  # the dense module is yours" if custom else "")]
    lines += [f'{name} = {loader}.from_pretrained("path/to/this/folder")' for name, loader in loaders]
    return "\n".join(lines)


def _loader(report: Report, file: str) -> tuple[str, str]:
    sounds = file == "preprocessor_config.json" and "input_features" in report.model.inputs
    return _SOUNDS if sounds else _LOADERS[file]


def _making(report: Report) -> str:
    data = report.calibration
    chosen = [f"{name}={report.settings[name]}" for name in _SETTINGS if report.settings.get(name) not in (None, "off")]
    return markdown.escaped(
        f"In one shot, without training, by optin-deploy {report.version} on {data.samples} unlabelled samples "
        f"({data.source}){': ' if chosen else ''}{', '.join(chosen)}."
    )
