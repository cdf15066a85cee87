"""The layers of the code: an import goes to a lower layer, or stays in its folder."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. Folders of one layer do not import each other.
LAYERS = (
    {"errors"},
    {"nn"},
    {"network", "utils"},
    {"distributed", "structure"},
    {"data", "search", "compensation"},
    {"criteria", "evaluation"},
    {"config", "tokens"},
    {"models", "analysis"},
    {"pruning"},
    {"export"},
    {"latency", "report"},
    {"run", "api_results"},
    {"sweeps", "api"},
    {"cli"},
    {"__main__"},
)
# The package's own names, which are imported when they are used.
LAZY = {"__init__"}


def imported(file: Path) -> set[str]:
    """Dotted names of all that a file imports, at the top or in a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def arrows(package: str) -> dict[tuple[str, str], list[str]]:
    """Imports between the rooms (files and folders at the top) of a package: (from, to) -> files that do it."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        room = file.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for name in imported(file):
            head, _, rest = name.partition(".")
            if head == package and (target := rest.partition(".")[0]) and target != room:
                found.setdefault((room, target), []).append(str(file.relative_to(ROOT)))
    return found


def test_imports_of_optin_deploy_go_to_lower_layers() -> None:
    level = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    upward = {
        f"{room} -> {target}": files
        for (room, target), files in arrows("optin_deploy").items()
        if room not in LAZY and level[target] >= level[room]
    }
    assert not upward


def test_there_are_few_rooms() -> None:
    rooms = {path.stem for path in (ROOT / "optin_deploy").iterdir() if path.suffix == ".py" or path.is_dir()}
    rooms = {room for room in rooms if not room.startswith("__")}
    assert rooms == set().union(*LAYERS) - {"__main__"}
    assert len(rooms) <= 25


@pytest.mark.parametrize("package", ["exporters", "profilers"])
def test_exporters_and_profilers_know_nothing_of_pruning(package: str) -> None:
    for file in sorted((ROOT / package).rglob("*.py")):
        assert not {name for name in imported(file) if name.split(".")[0] == "optin_deploy"}, file


def test_exporters_need_one_file_of_profilers() -> None:
    """Both refuse ONNX files that name weights elsewhere; profilers know nothing of exporters."""
    lent = {
        name
        for file in sorted((ROOT / "exporters").rglob("*.py"))
        for name in imported(file)
        if name.split(".")[0] == "profilers"
    }
    assert lent == {"profilers.external_data.reading_elsewhere"}
    for file in sorted((ROOT / "profilers").rglob("*.py")):
        assert not {name for name in imported(file) if name.split(".")[0] == "exporters"}, file


def test_no_file_shadows_a_library() -> None:
    libraries = sys.stdlib_module_names | {
        "torch", "timm", "transformers", "onnx", "onnxruntime", "tensorrt", "triton", "rich", "typer", "peft",
    }  # fmt: skip
    files = [file for package in ("optin_deploy", "exporters", "profilers") for file in (ROOT / package).rglob("*.py")]
    shadowing = [str(file.relative_to(ROOT)) for file in files if file.stem in libraries - {"__main__"}]
    assert [file for file in shadowing if not file.endswith(("__init__.py", "__main__.py"))] == []
