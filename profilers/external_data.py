"""External weights of an ONNX file: they must be in files next to it."""

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from onnx import TensorProto


def reading_elsewhere(path: Path) -> str:
    """Return why the ONNX file ``path`` must not be opened, in one line; "" if it may be, or if there is no file.

    A file that reads files outside its own directory is refused, because a runtime would follow it there. Refused are
    absolute locations, ``..``, links, and anything that is not a file.
    """
    if not path.is_file() or not _may_name_files(path):
        return ""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # the parser's own types
        return f"{path} is not an ONNX file"
    locations = {entry.value for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"}
    outside = sorted(location for location in locations if not _is_next_to(path.parent, location))
    if not outside:
        return ""
    return f"{path} has weights in {outside[0]!r}, which is not a file in its own directory: save them next to it"


def _may_name_files(path: Path) -> bool:
    """Return False for the many files without external weights, which then need not be parsed."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"location") >= 0


def _tensors(message: "Message") -> "Iterator[TensorProto]":
    """Yield all tensors of a model: in its graphs, their subgraphs, functions, attributes and sparse tensors."""
    for _, value in message.ListFields():
        for child in [value] if hasattr(value, "ListFields") else value if _holds_messages(value) else ():
            if child.DESCRIPTOR.name == "TensorProto":
                yield child
            else:
                yield from _tensors(child)


def _holds_messages(value: Any) -> bool:
    return not isinstance(value, (str, bytes, int, float)) and len(value) > 0 and hasattr(value[0], "ListFields")


def _is_next_to(directory: Path, location: str) -> bool:
    if "\0" in location or PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
        return False
    parts = PureWindowsPath(location).parts
    paths = [directory.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    return bool(parts) and ".." not in parts and not any(map(Path.is_symlink, paths)) and paths[-1].is_file()
