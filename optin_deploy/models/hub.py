"""The model hub, which may be out of reach, and its conventions for what is in a model's folder."""

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
from optin_deploy.utils.paths import regular

CARD_NAME = "README.md"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_CONNECT_SECONDS = 5.0


@contextmanager
def cached_if_unreachable(model: str) -> Iterator[None]:
    """Let the hub's client use its cache only when the hub cannot be reached; it would else retry for a minute.

    For a local directory nobody is asked.
    """
    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or Path(model).is_dir() or not _reachable()
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reachable() -> bool:
    # Behind a proxy only the client itself can tell.
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        address = urlparse(constants.ENDPOINT)
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS):
            return True
    except (OSError, ValueError):  # the second where HF_ENDPOINT is no address
        return False


def read_file(model: str, name: str) -> bytes | None:
    """A file of a local directory or model id; None where there is none or it cannot be had."""
    try:
        path = Path(model, name) if Path(model).is_dir() else Path(hf_hub_download(model, name))
        return regular(path).read_bytes()
    except (EntryNotFoundError, OSError):
        return None


def read_files(model: str, names: Iterable[str]) -> dict[str, bytes]:
    """Those of the named files of a local directory or model id that there are."""
    found = {name: read_file(model, name) for name in names}
    return {name: content for name, content in found.items() if content is not None}


def read_origin(model: str, names: Iterable[str]) -> Origin:
    """The origin of the weights of a local directory or model id, with those of the named files that there are.

    What a local directory was made of is told by its card where that is ours; other cards name what was trained on.
    """
    told = _card_header(read_file(model, CARD_NAME))
    # A card that others wrote may hold anything there.
    tags = told.get("tags")
    base_model = str(told.get("base_model", "")) if isinstance(tags, list) and "optin-deploy" in tags else ""
    license_name = told.get("license")
    return Origin(
        base_model=(base_model or None) if Path(model).is_dir() else model,
        license=license_name if isinstance(license_name, str) else None,
        files=read_files(model, names),
    )


def _card_header(card: bytes | None) -> dict[str, Any]:
    """What the header of a model card says; nothing where it has none that can be read."""
    if card is None:
        return {}
    try:
        return ModelCard(card.decode("utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, YAMLError):
        return {}
