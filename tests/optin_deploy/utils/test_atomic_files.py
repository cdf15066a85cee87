import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optin_deploy.errors import UserError
from optin_deploy.utils.atomic_files import (
    atomic_directory,
    atomic_path,
    is_partial,
    link_or_copy,
    write_tensors,
    write_text,
)


def test_write_text_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("old", "neu: äöü"):
        write_text(path, text)
    assert path.read_text(encoding="utf-8") == "neu: äöü"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", fail)
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"1")
        assert not path.exists() and temporary.parent == tmp_path and is_partial(temporary)
    assert path.read_bytes() == b"1"
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_bytes(b"2")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"1"
    assert list(tmp_path.iterdir()) == [path]


def test_copies_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another device")

    (tmp_path / "a").write_text("1")
    monkeypatch.setattr("os.link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "made"
    with atomic_directory(path) as directory:
        (directory / "a").write_text("1")
        assert not path.exists()
    assert [p.name for p in path.iterdir()] == ["a"]
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "made") as directory:
        (directory / "a").write_text("1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_existing_path_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "made"
    path.mkdir() if kind == "directory" else path.touch()
    with pytest.raises(UserError, match="exists already"), atomic_directory(path):
        pytest.fail("must not be entered")


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    assert list(tmp_path.iterdir()) == [tmp_path / "t.safetensors"]
    found = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_tensors(small_disk / "t.safetensors", {"a": torch.zeros(100_000)})
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left on device"):
        write_text(small_disk / "t.txt", "x" * 100_000)
    assert not list(small_disk.iterdir())


def test_a_link_to_nothing_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "made").symlink_to("gone")
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "made"):
        pytest.fail("must not be entered")
