"""The model hub, which may be unreachable, and its conventions for the files of a model."""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from huggingface_hub import ModelCard, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from yaml import YAMLError

from optin_deploy.network import Origin
from optin_deploy.utils.paths import require_regular

CARD_NAME = "README.md"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "normalizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
_CONNECT_SECONDS = 5.0


@contextmanager
def cached_if_unreachable(model: str) -> Iterator[None]:
    """Use only the cache of the hub's client if the hub is unreachable; the client would otherwise retry for a minute.

    For a local directory no connection is tried. timm has no option ``local_files_only``, so the client's own constant
    is set while the context is open.
    """
    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or Path(model).is_dir() or not _reachable()
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reachable() -> bool:
    # A proxy can only be tested by the client itself.
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        address = urlparse(constants.ENDPOINT)
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS):
            return True
    except (OSError, ValueError):  # ValueError: HF_ENDPOINT is not an address
        return False


def read_file(model: str, name: str) -> bytes | None:
    """Return a file of a local directory or model id; None if it does not exist or cannot be read."""
    try:
        path = Path(model, name) if Path(model).is_dir() else Path(hf_hub_download(model, name))
        return require_regular(path).read_bytes()
    except (EntryNotFoundError, OSError):
        return None


def read_files(model: str, names: Iterable[str]) -> dict[str, bytes]:
    """Return the files with these names that exist in a local directory or model id."""
    files = ((name, read_file(model, name)) for name in names)
    return {name: content for name, content in files if content is not None}


def read_origin(model: str, names: Iterable[str]) -> Origin:
    """Return the origin of the weights of a local directory or model id, with the existing files of ``names``.

    The base model of a local directory is read from its card only if optin-deploy wrote it: in other cards the field
    names the model that was fine-tuned.
    """
    header = _card_header(read_file(model, CARD_NAME))
    # Cards written by others may hold values of any type.
    tags, license_name = header.get("tags"), header.get("license")
    base_model = str(header.get("base_model", "")) if isinstance(tags, list) and "optin-deploy" in tags else ""
    return Origin(
        base_model=(base_model or None) if Path(model).is_dir() else model,
        license=license_name if isinstance(license_name, str) else None,
        files=read_files(model, names),
    )


def _card_header(card: bytes | None) -> dict[str, Any]:
    """Return the header of a model card; empty if it cannot be read."""
    if card is None:
        return {}
    try:
        return ModelCard(card.decode("utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, YAMLError):
        return {}
