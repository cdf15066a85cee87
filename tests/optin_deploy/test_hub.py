"""What is read of a model's folder for what is published of it."""

from pathlib import Path

import pytest

from optin_deploy.libraries.hub import CARD_NAME, read_origin


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
