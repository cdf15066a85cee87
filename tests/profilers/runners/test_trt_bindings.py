"""What our code calls of TensorRT, read from its source, against the signatures of the installed bindings.

TensorRT itself is not installed where tests run. TensorRT for RTX is, and has the same classes.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

trt = pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).parents[3]
FILES = ("profilers/runners/trt.py", "profilers/layer_profilers/trt.py", "exporters/trt_engine_worker.py")
# The class of the bindings that a name in our code stands for.
CLASSES = {
    "self._runtime": "Runtime",
    "runtime": "Runtime",
    "self._engine": "ICudaEngine",
    "engine": "ICudaEngine",
    "loaded": "ICudaEngine",
    "self._context": "IExecutionContext",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "loaded.create_engine_inspector()": "EngineInspector",
}
# Each runtime has these names for values of other kinds in some functions.
NOT_BINDINGS = {("exporters/trt_engine_worker.py", "engine")}
# Newer or older than the bindings that are installed here; the code asks before it uses them.
OPTIONAL = {"nptype"}


def uses(file: str) -> Iterator[tuple[str, str, ast.Call | None]]:
    """Class or "" for the module, member, and the call if it is one, of every use in a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        name = ast.unparse(node.value)
        if name in ("trt", "self._trt"):
            yield "", node.attr, calls.get(id(node))
        elif re.fullmatch(r"(self\._)?trt\.\w+", name):
            yield name.rpartition(".")[2], node.attr, calls.get(id(node))
        elif name in CLASSES and (file, name) not in NOT_BINDINGS:
            yield CLASSES[name], node.attr, calls.get(id(node))


USES = [(file, *use) for file in FILES for use in uses(file)]


def test_uses_are_found() -> None:
    members = {(cls, member) for _, cls, member, _ in USES}
    assert {("ICudaEngine", "create_execution_context"), ("BuilderFlag", "TF32")} < members
    assert {("IExecutionContext", "execute_async_v3"), ("IExecutionContext", "report_to_profiler")} < members


@pytest.mark.parametrize(
    ("file", "cls", "member", "call"), USES, ids=[f"{Path(f).stem}-{c}.{m}-{i}" for i, (f, c, m, _) in enumerate(USES)]
)
def test_the_bindings_have_what_is_used(file: str, cls: str, member: str, call: ast.Call | None) -> None:
    owner = getattr(trt, cls) if cls else trt
    if member in OPTIONAL or member.startswith("__"):
        return
    assert hasattr(owner, member), f"{file}: {cls or 'the module'} has no {member}"
    if call is not None and cls:
        numbers = [*signatures(getattr(owner, member))]
        given = len(call.args)
        assert not numbers or any(least <= given <= most for least, most in numbers), (file, member, given, numbers)


def signatures(method: object) -> Iterator[tuple[int, int]]:
    """Fewest and most positional arguments, without self, of each overload in a method's documentation."""
    documentation = re.sub(r"<[^>]*>", "DEFAULT", inspect.getdoc(method) or "")
    for found in re.finditer(r"^(?:\d+\. )?\w+\(self: [^,)]+(?:, (.*?))?\) -> ", documentation, re.MULTILINE):
        arguments = found[1].split(", ") if found[1] else []
        optional = sum(" = " in argument for argument in arguments)
        yield len(arguments) - optional, len(arguments)
