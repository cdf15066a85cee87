"""What is read of a model's folder for what is published of it."""

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from optin_deploy.models.hub import CARD_NAME, cached_if_unreachable, read_origin


@pytest.mark.parametrize(
    ("tags", "base_model"),
    [("[pruned, optin-deploy]", "their/model"), ("[pruned]", None), ("{a: 1}", None), ("null", None)],
)
def test_only_a_card_of_ours_tells_what_a_folder_was_made_of(tmp_path: Path, tags: str, base_model: str | None) -> None:
    (tmp_path / CARD_NAME).write_text(f"---\ntags: {tags}\nbase_model: their/model\nlicense: mit\n---\n# A model\n")
    found = read_origin(str(tmp_path), ())
    assert (found.base_model, found.license) == (base_model, "mit")


def test_a_card_that_is_none_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / CARD_NAME).write_text("---\ntags: 3\nlicense: mit\n---\n")
    found = read_origin(str(tmp_path), ())
    assert (found.base_model, found.license) == (None, None)


@pytest.mark.parametrize("endpoint", ["http://x:abc", "http://[::1", f"http://{'n' * 300}.x"])
def test_an_endpoint_that_is_no_address_cannot_be_reached(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with cached_if_unreachable("some/model"):
        assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_a_card_that_is_no_regular_file_tells_nothing(kind: str, tmp_path: Path) -> None:
    card = tmp_path / CARD_NAME
    os.mkfifo(card) if kind == "pipe" else card.symlink_to("/dev/zero")
    assert read_origin(str(tmp_path), ()).license is None
