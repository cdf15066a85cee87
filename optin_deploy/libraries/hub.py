"""The model hub, which may be out of reach."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlparse

from huggingface_hub import constants

_CONNECT_SECONDS = 5.0


@contextmanager
def cached_if_unreachable() -> Iterator[None]:
    """Let the hub's client use its cache only when the hub cannot be reached; it would else retry for a minute."""
    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not _reachable()
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reachable() -> bool:
    # Behind a proxy only the client itself can tell.
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlparse(constants.ENDPOINT)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False
