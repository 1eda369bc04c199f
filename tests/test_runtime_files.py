"""runtime/files.py: a file is complete or absent, and every error is one line that names it."""

import errno
import os
from pathlib import Path

import pytest

from runtime import files
from runtime.files import (
    atomically,
    check_seal,
    lock,
    parse_json,
    read_json,
    read_text,
    seal,
    write_json,
    write_text,
)


def names(folder):
    return {file.name for file in folder.iterdir()}


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Atomic writes.


def test_a_file_has_its_new_content_only_when_the_block_has_ended(tmp_path):
    file = tmp_path / "deep" / "er" / "x"
    for old, new in ((None, "one"), ("one", "two")):
        with atomically(file) as temporary:
            temporary.write_text(new)
            assert temporary.parent == file.parent and temporary != file
            assert (file.read_text() if file.exists() else None) == old
        assert file.read_text() == new and names(file.parent) == {"x"}


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_error_in_the_block_the_file_is_as_before_and_nothing_else_is_left(tmp_path, old, error):
    file = tmp_path / "x"
    if old:
        file.write_text(old)
    for written in (True, False):
        with pytest.raises(error):
            with atomically(file) as temporary:
                if written:
                    temporary.write_text("half")
                raise error
        assert names(tmp_path) == ({"x"} if old else set())
        assert old is None or file.read_text() == old


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_an_error_of_the_disk_names_the_file_and_leaves_it_as_before(tmp_path, monkeypatch, step):
    def fail(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "x"
    file.write_text("old")
    if step == "fsync":
        monkeypatch.setattr(files, "fsync", fail)
    elif step == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ValueError) as caught:
        write_text(file, "new")
    assert one_line(caught) == f"{file}: cannot be written (No space left on device)"
    assert names(tmp_path) == {"x"} and file.read_text() == "old"


def test_an_error_without_a_number_keeps_its_text(tmp_path):
    with pytest.raises(ValueError) as caught:
        with atomically(tmp_path / "x"):
            raise OSError("the disk is on fire")
    assert one_line(caught) == f"{tmp_path / 'x'}: cannot be written (the disk is on fire)"


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = files.fsync, os.replace
    monkeypatch.setattr(files, "fsync", lambda path: calls.append(("fsync", path.read_text())) or fsync(path))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    write_text(tmp_path / "x", "all of it")
    assert calls == [("fsync", "all of it"), "replace"]


def test_a_temporary_file_of_a_killed_process_is_overwritten(tmp_path):
    (tmp_path / "x.tmp").write_text("much more text of a process that was killed")
    write_text(tmp_path / "x", "new")
    assert names(tmp_path) == {"x"} and (tmp_path / "x").read_text() == "new"


def test_a_folder_that_is_a_file_or_a_file_that_is_a_folder_is_one_line_that_names_it(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path in (tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(ValueError) as caught:
            write_text(path, "new")
        assert one_line(caught).startswith(f"{path}: cannot be written (")
    assert names(tmp_path) == {"file", "folder"} and (tmp_path / "file").read_text() == "kept"
    assert names(tmp_path / "folder") == {"full"}


# Reading.


def test_what_is_written_is_read_back(tmp_path):
    value = {"name": "Zoë", "list": [1, 2.5, None], "text": "a\nb"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value and "Zoë" in read_text(tmp_path / "x.json")
    write_text(tmp_path / "x", "\ufeffwith a byte order mark")
    assert read_text(tmp_path / "x") == "with a byte order mark"


def test_json_with_half_a_surrogate_pair_is_written_as_an_escape_and_read_back(tmp_path):
    write_json(tmp_path / "x.json", {"town": "\udc4a and Zoë"})
    assert read_json(tmp_path / "x.json") == {"town": "\udc4a and Zoë"}
    assert "\\udc4a and Zoë" in read_text(tmp_path / "x.json")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_text_that_is_missing_or_no_utf_8_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as UTF-8 text .*is the name right") as caught:
        read_text(tmp_path / "x")
    assert one_line(caught).startswith(f"{tmp_path / 'x'}: ")


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff", b"[" * 100_000, b"[]", b"3"])
def test_a_file_that_holds_no_json_object_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable JSON file|expected a JSON object") as caught:
        read_json(tmp_path / "x")
    assert one_line(caught).startswith(f"{tmp_path / 'x'}: ")


@pytest.mark.parametrize("text", ["", "{", "nul", "[" * 100_000])
def test_a_text_that_is_no_json_names_its_place_and_the_remedy(text):
    with pytest.raises(ValueError) as caught:
        parse_json(text, "data.jsonl:3", "one value a line")
    assert one_line(caught).startswith("data.jsonl:3: not JSON (")
    assert one_line(caught).endswith("; one value a line")
    assert parse_json("[1, 2]", "anywhere") == [1, 2]


# The seal and the lock of a folder.


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    seal(tmp_path)
    check_seal(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: (folder / "a").write_text("onf"), "a is damaged: its hash"),
    (lambda folder: (folder / "b").write_text("tw"), "b has 2 bytes, but 3 were saved"),
    (lambda folder: (folder / "a").unlink(), "no file 'a' in it"),
    (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json, which is written last"),
    (lambda folder: (folder / "manifest.json").write_text("{}"), "its manifest.json is damaged"),
    (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "its manifest.json is damaged"),
    (lambda folder: (folder / "manifest.json").write_text('{"a": 3}'), "its manifest.json is damaged"),
    (lambda folder: (folder / "manifest.json").write_text('{"../a": [3, ""]}'), r"no file '\.\./a' in it"),
])
def test_a_seal_finds_every_damage_and_says_which(sealed, damage, message):
    damage(sealed)
    with pytest.raises(ValueError, match=message) as caught:
        check_seal(sealed)
    one_line(caught)


def test_a_file_that_is_added_after_the_seal_does_not_break_it(sealed):
    (sealed / "notes.txt").write_text("of its owner")
    check_seal(sealed)


def test_a_folder_is_locked_until_the_file_is_closed(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(ValueError, match="another process is at work on this run") as caught:
        lock(tmp_path)
    assert one_line(caught).startswith(str(tmp_path))
    held.close()
    lock(tmp_path).close()
