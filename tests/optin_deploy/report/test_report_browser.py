"""The pages in headless Chromium, where that and axe-core are present (`make browser` installs the latter)."""

import base64
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from optin_deploy.report import Report
from optin_deploy.report.web_page import render

ROOT = Path(__file__).parents[3]
MODULES = Path(os.environ.get("OPTIN_BROWSER_MODULES", ROOT / "build" / "browser" / "node_modules"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.skipif(
        not (CHROMIUM and shutil.which("node") and (MODULES / "axe-core").is_dir()),
        reason="needs Chromium and axe-core",
    ),
    pytest.mark.slow,
]


def findings(*pages: Path) -> list[dict[str, str]]:
    script = ROOT / "tests" / "browser" / "check.mjs"
    command = ["node", str(script), "--modules", str(MODULES), "--chromium", str(CHROMIUM), *map(str, pages)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_nothing_is_wrong_with_a_report(data: dict[str, Any], tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(picture, "png")
    png = base64.b64encode(picture.getvalue()).decode()
    data["pictures"] = [{"output": "map", "image": png, "dense": png, "pruned": png}]
    data["evaluation"]["dataset"] = "/a/long/path/" + "without/any/blank/" * 8 + "dev.csv"
    data["warnings"] = ["Something to know before any figure is read."]
    data["gates"][0]["passed"] = False
    page = tmp_path / "report.html"
    page.write_text(render(Report.model_validate(data)), encoding="utf-8")
    assert findings(page) == []


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!DOCTYPE html><html lang='en'><title>A page</title><main><h1>A page</h1><img src='https://example.invalid/a.png'>"
        "<p style='color: #eee; background: #fff; width: 900px'>pale and wide</p></main>"
        "<script>console.warn('told')</script>",
        encoding="utf-8",
    )
    found = " ".join(item["what"] for item in findings(page) if item["view"] == "phone-light")
    for part in (
        "console: warn",
        "request: https://example.invalid/a.png",
        "overflow: ",
        "color-contrast",
        "image-alt",
    ):
        assert part in found
