"""Where an ONNX file has its weights: a file may name others to be read, and these must lie beside it."""

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def reading_elsewhere(path: Path) -> str:
    """Why the ONNX file ``path`` must not be opened, in one line: it reads files that do not lie in its own directory,
    and a runtime would follow it there. Empty where it does not, or where there is no file.

    Refused are absolute locations, ``..``, links, and what is no file.
    """
    if not path.is_file() or not _names_files(path):
        return ""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # the parser's own types
        return f"{path} is no ONNX file"
    locations = {entry.value for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"}
    outside = sorted(location for location in locations if not _is_beside(path.parent, location))
    if not outside:
        return ""
    return f"{path} has weights in {outside[0]!r}, which is no file in its own directory: save it with them beside it"


def _names_files(path: Path) -> bool:
    """Whether it may: most files do not, and need not be parsed to tell."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"location") >= 0


def _tensors(message: Any) -> Iterator[Any]:
    """All tensors of a model: in its graphs, their subgraphs, functions, attributes and sparse tensors."""
    for _, value in message.ListFields():
        for each in [value] if hasattr(value, "ListFields") else value if _holds_messages(value) else ():
            if each.DESCRIPTOR.name == "TensorProto":
                yield each
            else:
                yield from _tensors(each)


def _holds_messages(value: Any) -> bool:
    return not isinstance(value, (str, bytes, int, float)) and len(value) > 0 and hasattr(value[0], "ListFields")


def _is_beside(directory: Path, location: str) -> bool:
    if "\0" in location or PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
        return False
    parts = PureWindowsPath(location).parts
    places = [directory.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    return bool(parts) and ".." not in parts and not any(map(Path.is_symlink, places)) and places[-1].is_file()
