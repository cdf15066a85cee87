"""Samples in files, read and checked: tables, texts, tensors."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.places import regular
from optin_deploy.preprocessing import TextPreprocessing

# What tensors are made of that the network's own type can be made of: no 8-bit floats, no complex numbers.
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_READ = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_INTEGERS, torch.bool)


def check_texts(texts: Sequence[str], preprocessing: TextPreprocessing, path: Path | None) -> None:
    """Raise UserError for a text without tokens: no network takes a sequence of length 0."""
    bare = preprocessing.without_tokens(texts)
    if bare:
        raise UserError(
            f"{path}: {len(bare)} of {len(texts)} texts give no tokens, the first of them {bare[0][:40]!r}: remove them"
        )


def is_table(path: Path | None) -> bool:
    """Whether a file's name is one of a CSV or TSV file."""
    return path is not None and path.suffix.lower() in (".csv", ".tsv")


def read_table(path: Path) -> list[list[str]]:
    """Rows of a CSV or TSV file, empty ones left out; UserError when it cannot be read or is empty."""
    try:
        with regular(path).open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".tsv":
                rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            else:
                # Not strict, a quote that is never closed would swallow all lines behind it.
                rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table in UTF-8: {error}") from error
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows


def table_columns(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The named columns of a CSV or TSV file, row by row.

    A column is a name of the header line; numbers count from 1 and mean that there is no header line.
    """
    rows, columns = read_table(path), [c.strip() for c in columns]
    if all(c.isdecimal() for c in columns):
        indices = [int(c) - 1 for c in columns]
        width = min(len(row) for row in rows)
        wrong = [c for c, i in zip(columns, indices, strict=True) if not 0 <= i < width]
        if wrong:
            raise UserError(f"{path} has no column {wrong[0]}: its rows have {width} columns, counted from 1")
        return [[row[i] for i in indices] for row in rows]
    header, body = [name.strip() for name in rows[0]], rows[1:]
    for name in columns:
        if name not in header:
            raise UserError(
                f"{path} has no column {name!r} in its header ({', '.join(header)[:120]}); name one of these, or give "
                "column numbers from 1 if there is no header line"
            )
    if not body:
        raise UserError(f"{path} holds a header and no rows")
    indices = [header.index(name) for name in columns]
    short = next((i for i, row in enumerate(body, 2) if len(row) <= max(indices)), None)
    if short:
        raise UserError(f"{path}, row {short}: too few columns for {', '.join(columns)}")
    return [[row[i] for i in indices] for row in body]


def read_texts(path: Path, column: str | None) -> list[str]:
    """Distinct texts of a text file (one a line) or of columns of a CSV or TSV file, in order."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: a text network calibrates on a text file, CSV, TSV, .npz or .safetensors")
    if is_table(path):
        if column is None:
            raise UserError(
                f"{path} is a table: name its text column with --calibration-column (a number if it has no header)"
            )
        texts = [cell for row in table_columns(path, column.split(",")) for cell in row]
    else:
        try:
            # Not splitlines, which takes form feeds and the like for ends of lines.
            texts = regular(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text in UTF-8: {error}") from error
    texts = [text for text in dict.fromkeys(text.strip() for text in texts) if text]
    if not texts:
        raise UserError(f"{path} holds no texts")
    return texts


def read_tensors(network: Network, path: Path) -> dict[str, Tensor]:
    """The network's inputs by name ``(samples, …)``; UserError for a file that cannot be read or does not fit."""
    try:
        if path.suffix.lower() == ".npz":
            # np.load would take a pickle or a single array by the same name.
            with regular(path).open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            tensors = load_file(regular(path))
    except Exception as error:  # zip files, numpy's headers and safetensors each have their own types
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"calibration tensors {path} cannot be read: {told}") from error
    _check_tensors(network, path, tensors)
    return {name: tensors[name].to(sample.dtype) for name, sample in network.inputs.items()}


def selecting(tensors: Mapping[str, Tensor]) -> Callable[[list[int]], dict[str, Tensor]]:
    """What makes a batch of inputs of rows of ``tensors``."""
    return lambda rows: {name: tensor[rows] for name, tensor in tensors.items()}


def _check_tensors(network: Network, path: Path, tensors: Mapping[str, Tensor]) -> None:
    rows = {len(t) if t.dim() else 0 for t in tensors.values()}
    for name, sample in network.inputs.items():
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name!r}; it has {', '.join(tensors) or 'none'}")
        given, first = tuple(tensors[name].shape), 2 if name in network.sequence_inputs else 1
        if len(given) != sample.dim() or given[first:] != tuple(sample.shape[first:]):
            wanted = ", ".join(["samples", "sequence"][:first] + [str(n) for n in sample.shape[first:]])
            raise UserError(f"{path}: {name} has shape {given}, the network takes ({wanted})")
        if 0 in given[1:]:
            raise UserError(f"{path}: {name} has shape {given}: give sequences of at least one token")
        if tensors[name].dtype not in _READ:
            read = ", ".join(_named(dtype) for dtype in _READ)
            raise UserError(f"{path}: {name} holds {_named(tensors[name].dtype)}; convert it to what is read: {read}")
        if tensors[name].is_floating_point() and not sample.is_floating_point():
            raise UserError(f"{path}: {name} holds {tensors[name].dtype}, the network takes integers")
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} holds NaN or infinity")
    _check_mask(network, path, tensors)
    lengths = {name: tensors[name].shape[1] for name in network.sequence_inputs}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path}: the sequences have different lengths: {lengths}")
    if len(rows) != 1 or not min(rows):
        raise UserError(
            f"{path}: tensors need one first axis of samples, at least one long; found lengths {sorted(rows)}"
        )


def _check_mask(network: Network, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A sample that is padding alone gives NaN or nothing, and with it all that is summed over samples."""
    if network.token_mask is None:
        return
    padding = (tensors[network.token_mask] == 0).flatten(1).all(1).nonzero().flatten().tolist()
    if padding:
        raise UserError(
            f"{path}: {network.token_mask} is 0 everywhere in {len(padding)} of its samples, the first of them number "
            f"{padding[0]} from 0: remove them"
        )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
