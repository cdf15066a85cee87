"""What comes with the package, and what its command line does without torch. `make package` builds and installs it."""

import subprocess
import sys
from importlib import resources

import pytest

pytestmark = pytest.mark.slow


HEAVY = ("torch", "timm", "transformers", "onnx", "onnxruntime", "matplotlib")


def loaded(code: str) -> set[str]:
    """Which of the `HEAVY` packages a new process has loaded after ``code``."""
    told = f"{code}\nimport sys\nsys.stderr.write(' '.join(n for n in {HEAVY!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["prune-export", "--help"]])
def test_help_does_without_torch(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["optin-deploy", *{arguments!r}]
from optin_deploy.cli.main import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
"""
    assert loaded(code) == set()


def test_files_that_are_no_modules_come_along() -> None:
    for package, name in (
        ("optin_deploy", "py.typed"),
        ("exporters", "py.typed"),
        ("profilers", "py.typed"),
        ("optin_deploy.data", "builtin_sentences.txt"),
        ("optin_deploy.report", "template.html.j2"),
        ("optin_deploy.report", "style.css"),
        ("optin_deploy.sweeps", "template.html.j2"),
    ):
        assert resources.files(package).joinpath(name).is_file(), f"{package}/{name}"


def test_wrong_options_are_told_without_torch() -> None:
    assert not loaded("import optin_deploy.cli.main, optin_deploy.config.recipe")
