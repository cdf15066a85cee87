import os
from pathlib import Path

import pytest

from optin_deploy.errors import UserError
from optin_deploy.utils.paths import check_exists, check_writable, require_regular


def test_regular_follows_links(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert require_regular(tmp_path / "link") == tmp_path / "link"
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path, tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="no regular file"):
            require_regular(wrong)
    with pytest.raises(FileNotFoundError):
        require_regular(tmp_path / "none")


def test_a_place_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for right in (tmp_path, tmp_path / "new", tmp_path / "new" / "in" / "it", tmp_path / ("n" * 200)):
        check_writable(right)
    for wrong in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "new" / ("n" * 300), tmp_path / ("n" * 250)):
        with pytest.raises(UserError, match=f"^--output {wrong} (cannot be made|is a file)"):
            check_writable(wrong, f"--output {wrong}")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_place_that_may_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="permission"):
        check_writable(tmp_path / "new")


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    check_exists(tmp_path, "data")
    check_exists(None, "data")
    with pytest.raises(UserError, match=r"none does not exist"):
        check_exists(tmp_path / "none", "data")
