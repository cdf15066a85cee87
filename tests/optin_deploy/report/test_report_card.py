import ast
import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from optin_deploy.report import Report, wording
from optin_deploy.report.model_card import Facts, render

TEXT = ("config.json", "tokenizer_config.json", "model.safetensors", "optin.json")


def test_the_hub_reads_the_header(report: Report) -> None:
    facts = Facts(TEXT, base_model="someone/dense", license="mit", task="text-classification")
    data = ModelCard(render(report, facts)).data
    assert (data.base_model, data.license, data.pipeline_tag) == ("someone/dense", "mit", "text-classification")
    assert (data.library_name, data.tags) == ("optin-deploy", ["optin-deploy", "pruned"])


def test_what_is_not_known_is_not_said(report: Report) -> None:
    data = ModelCard(render(report, Facts(("model.onnx",)))).data.to_dict()
    assert data == {"library_name": "optin-deploy", "tags": ["optin-deploy", "pruned", "onnx"]}


@pytest.mark.parametrize(
    ("library", "files", "expected"),
    [
        ("timm", (), []),
        ("custom", (), ["module=MyModule()"]),
        ("transformers", TEXT, ["AutoTokenizer.from_pretrained"]),
        ("transformers", ("config.json", "preprocessor_config.json"), ["AutoImageProcessor.from_pretrained"]),
    ],
)
def test_it_says_how_to_load(report: Report, library: str, files: tuple[str, ...], expected: list[str]) -> None:
    model = report.model.model_copy(update={"library": library})
    card = render(report.model_copy(update={"model": model}), Facts(files))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ast.parse(code)
    assert all(part in code for part in ["optin_deploy.load(", *expected])
    assert ("`AutoModel.from_pretrained`" in card) == ("config.json" in files)


def test_it_has_the_figures_and_no_folders(report: Report, data: dict[str, Any]) -> None:
    private = {**data["calibration"], "source": "/home/me/secret/texts.txt", "builtin": False}
    card = render(Report.model_validate({**data, "calibration": private}), Facts(()))
    assert "texts.txt" in card and "secret" not in card and report.command not in card
    assert wording.verdict(report).split(" ")[0] in card
    assert all(f"{item.summary.pruned.p50_ms:.3g}" in card for item in report.profile)
