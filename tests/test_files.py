import errno
import os
from pathlib import Path

import pytest

from pspnet_fast.files import PART, check_target, replacing


def write(path, text, **options):
    with replacing(path, **options) as temporary:
        temporary.write_text(text)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fails_half_way():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fails_half_way()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "before"
    with replacing(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after"


class WrongError(ValueError):
    pass


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"absent/a\.txt: cannot be written: No such file or directory"):
        write(tmp_path / "absent" / "a.txt", "after")
    with pytest.raises(WrongError, match="absent.a.txt: cannot be written"):
        write(tmp_path / "absent" / "a.txt", "after", error=WrongError)


def test_the_ending_stays(tmp_path):
    """Writers that go by it see the right one."""
    with replacing(tmp_path / "a.onnx") as temporary:
        temporary.write_text("")
        assert temporary.suffix == ".onnx"
        assert temporary.name.startswith(PART)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    """And not those of a temporary one, which nobody else may read."""
    before = os.umask(umask)
    try:
        write(tmp_path / "a.txt", "text")
        write(tmp_path / "a.txt", "more", keep=tmp_path / "b.txt")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.txt", "b.txt")] == [mode, mode]


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Whoever knows which name is tried first gets another one; a link in the file's own place is replaced."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f"{PART}aaaaaaaa.txt").symlink_to(tmp_path / "precious")
    (tmp_path / "a.txt").symlink_to(tmp_path / "precious")
    names = iter(["aaaaaaaa", "bbbbbbbb", "cccccccc"])
    monkeypatch.setattr("tempfile._RandomNameSequence.__next__", lambda self: next(names))
    monkeypatch.setattr("tempfile._name_sequence", None)
    write(tmp_path / "a.txt", "text")
    assert next(names) == "cccccccc"
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "text"


@pytest.mark.parametrize("links", [True, False], ids=["hard_links", "no_hard_links"])
def test_what_was_there_is_kept(tmp_path, monkeypatch, links):
    def none(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if not links:
        monkeypatch.setattr(os, "link", none)
    path, keep = tmp_path / "a.txt", tmp_path / "b.txt"
    for text in ("1", "2", "3"):
        write(path, text, keep=keep)
    assert (path.read_text(), keep.read_text()) == ("3", "2")
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "b.txt"}


def test_what_was_there_is_kept_or_all_is_as_it_was(tmp_path, monkeypatch):
    """The copy does not fit either."""

    def none(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, keep = tmp_path / "a.txt", tmp_path / "b.txt"
    write(path, "1")
    write(path, "2", keep=keep)
    monkeypatch.setattr(os, "link", none)
    monkeypatch.setattr("shutil.copyfile", none)
    with pytest.raises(
        OSError, match="cannot be written: No space left on device; the a.txt that was there is untouched"
    ):
        write(path, "3", keep=keep)
    assert (path.read_text(), keep.read_text()) == ("2", "1")
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "b.txt"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("folder", {}, "folder: is a folder, give the name of a file$"),
        ("absent/b.txt", {}, "absent/b.txt: cannot be written: there is no folder .*absent$"),
        ("a.txt/b.txt", {}, "a.txt/b.txt: cannot be written: there is no folder .*a.txt$"),
        ("a.txt", {"sources": ["a.txt"]}, "a.txt: would overwrite a file that is read: give the result another name$"),
        ("link.txt", {"sources": ["a.txt"]}, "link.txt: would overwrite a file that is read"),
        ("folder/../a.txt", {"sources": ["b.txt", "a.txt"]}, "would overwrite a file that is read"),
        (
            "a.txt",
            {"overwrite": False},
            "a.txt: is there already: give the result another name, or --force to replace it$",
        ),
    ],
)
def test_a_target_that_cannot_be(folder, name, options, words):
    options = {**options, "sources": [folder / each for each in options.get("sources", ())]}
    with pytest.raises(WrongError, match=words):
        check_target(folder / name, WrongError, **options)
    with pytest.raises(OSError, match=words):
        check_target(folder / name, **options)
    assert (folder / "a.txt").read_text() == "text"


def test_a_target_in_a_folder_without_permission(folder):
    with pytest.raises(WrongError, match="self/a.txt: cannot be written: "):
        check_target(Path("/proc/self/a.txt"), WrongError)


@pytest.mark.parametrize(("name", "overwrite"), [("a.txt", True), ("b.txt", True), ("b.txt", False)])
def test_a_target_that_can_be(folder, name, overwrite):
    before = {p.name for p in folder.iterdir()}
    check_target(folder / name, sources=[folder / "absent.txt", folder / "folder"], overwrite=overwrite)
    assert {p.name for p in folder.iterdir()} == before
