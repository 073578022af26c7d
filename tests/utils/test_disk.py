"""Files and folders are whole or absent."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.utils.errors import DpoError
from dpo_cli.utils.files import atomic_dir, atomic_write, remove_leftovers, sha256


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def everything_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def write_private(file: Path, text: str) -> None:
    """As safetensors writes: readable by the owner alone."""
    file.write_text(text)
    file.chmod(0o600)


def test_file_is_there_only_after_the_block(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file"
    with atomic_write(file) as temporary:
        temporary.write_text("new")
        assert not file.exists()
        assert temporary.stat().st_dev == file.parent.stat().st_dev  # else the rename would copy
    assert file.read_text() == "new"
    assert everything_in(tmp_path) == {"a", "a/b", "a/b/file"}


def test_file_replaces_an_old_one_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with atomic_write(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_file_of_a_failed_block_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(error), atomic_write(file) as temporary:
        temporary.write_text("half")
        raise error
    assert file.read_text() == "old"
    assert everything_in(tmp_path) == {"file"}


def test_failure_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "file"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "folder"):
        raise ZeroDivisionError
    assert everything_in(tmp_path) == set()


def test_failed_rename_leaves_nothing_of_ours(tmp_path: Path) -> None:
    """The name is taken by something of the other kind."""
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_text("old")
    with pytest.raises(DpoError, match="folder cannot be written: "), atomic_write(tmp_path / "folder") as temporary:
        temporary.write_text("new")
    with pytest.raises(DpoError, match="file cannot be written: "), atomic_dir(tmp_path / "file") as temporary:
        (temporary / "file").write_text("new")
    assert everything_in(tmp_path) == {"folder", "folder/inside", "file"}


def test_folder_that_is_there_gives_way_when_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "folder" / "old").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "folder"):
        raise ZeroDivisionError
    assert everything_in(tmp_path) == {"folder", "folder/old"}
    with atomic_dir(tmp_path / "folder") as temporary:
        (temporary / "new").write_text("new")
    assert everything_in(tmp_path) == {"folder", "folder/new"}


def test_folder_is_put_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder" / "old").mkdir(parents=True)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "folder" and target == tmp_path / "folder":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(DpoError, match="Input/output error"), atomic_dir(tmp_path / "folder") as temporary:
        (temporary / "new").write_text("new")
    assert everything_in(tmp_path) == {"folder", "folder/old"}


def test_folder_is_there_only_after_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "folder"
    with atomic_dir(folder) as temporary:
        (temporary / "file").write_text("new")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("below")
        assert not folder.exists()
    assert (folder / "sub" / "file").read_text() == "below"
    assert everything_in(tmp_path) == {"a", "a/folder", "a/folder/file", "a/folder/sub", "a/folder/sub/file"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_folder_of_a_failed_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(error), atomic_dir(tmp_path / "folder") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("half")
        raise error
    assert everything_in(tmp_path) == {"other"}


def test_what_a_killed_process_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """A new process may have the old one's id: in a container it has nearly always."""
    with atomic_dir(tmp_path / "folder") as temporary:
        leftover = temporary.parent.name
    (tmp_path / "folder").rmdir()
    (tmp_path / leftover).mkdir()
    (tmp_path / leftover / "half").write_text("of the killed process")
    with atomic_dir(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("new")
    assert everything_in(tmp_path) - {leftover, f"{leftover}/half"} == {"folder", "folder/file"}


def test_modes_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    with atomic_write(tmp_path / "file") as temporary:
        write_private(temporary, "x")
    with atomic_dir(tmp_path / "folder") as temporary:
        write_private(temporary / "file", "x")
        (temporary / "sub").mkdir()
        write_private(temporary / "sub" / "file", "x")
    for file in ("file", "folder/file", "folder/sub/file"):
        assert mode(tmp_path / file) == 0o666 & ~umask, file
    for folder in ("folder", "folder/sub"):
        assert mode(tmp_path / folder) == 0o777 & ~umask, folder
    assert os.umask(umask) == umask  # and the process's own is as before


def test_sha256(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_folder_that_vanishes_while_leftovers_are_looked_for_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank finishes its file meanwhile."""
    (tmp_path / ".about.json.x.tmp").mkdir()
    (tmp_path / "sub" / ".old.tmp").mkdir(parents=True)
    os.utime(tmp_path / "sub" / ".old.tmp", (0, 0))
    scandir = os.scandir

    def vanishing(path: Any) -> Any:
        if str(path).endswith(".about.json.x.tmp"):
            os.rmdir(path)  # noqa: PTH106
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    remove_leftovers(tmp_path, older_than=3600.0)
    assert not list(tmp_path.rglob("*.tmp")) and (tmp_path / "sub").is_dir()
