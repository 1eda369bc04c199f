"""runtime/tensors.py: a save is complete, or the folder is as before. What reading refuses: test_model.py."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import tensors
from runtime.tensors import INDEX, identity, open_weights, write_tensors, write_weights

TENSORS = {f"w{i}": torch.arange(6.0).view(2, 3) + i for i in range(5)}  # 24 bytes each
OTHERS = {name: tensor + 100 for name, tensor in TENSORS.items()}
CONFIG = {"config.json": {"kind": "toy", "name": "ä"}}


def names(folder):
    return {file.name for file in folder.iterdir()}


def read(folder):
    return {name: part[:] for name, part in open_weights(folder).items()}


def assert_holds(folder, wanted):
    found = read(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == CONFIG["config.json"]


def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_fits_is_one_file_and_what_does_not_is_numbered_shards_with_an_index(tmp_path):
    write_weights(tmp_path / "one", TENSORS, CONFIG, 120)
    assert names(tmp_path / "one") == {"model.safetensors", "config.json"}
    write_weights(tmp_path / "more", TENSORS, CONFIG, 50)
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names(tmp_path / "more") == {INDEX, "config.json", *shards}
    index = json.loads((tmp_path / "more" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 120} and set(index["weight_map"].values()) == shards
    for folder in ("one", "more"):
        assert_holds(tmp_path / folder, TENSORS)


def test_a_tensor_larger_than_a_shard_is_a_shard_by_itself(tmp_path):
    write_weights(tmp_path, TENSORS, CONFIG, 1)
    assert len(list(tmp_path.glob("model-*-of-00005.safetensors"))) == 5
    assert_holds(tmp_path, TENSORS)


@pytest.mark.parametrize("dtype", tensors.DTYPES, ids=str)
def test_the_safetensors_package_reads_what_was_written(tmp_path, dtype):
    wanted = {"a": torch.tensor([[1.5, -2.0]], dtype=dtype), "b.c": torch.zeros(0, 3, dtype=dtype),
              "d": torch.tensor(3.0, dtype=dtype), "turned": torch.arange(6.0).view(2, 3).T.to(dtype)}
    write_tensors(tmp_path / "x", wanted)
    found = load_file(tmp_path / "x")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name
    assert int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") % 8 == 0  # where the numbers start


@pytest.mark.parametrize("old", [120, 50])
@pytest.mark.parametrize("new", [120, 50])
def test_weights_that_were_cut_otherwise_are_replaced_and_other_files_stay(tmp_path, old, new):
    write_weights(tmp_path, OTHERS, CONFIG, old)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors.tmp").write_text("of a process that was killed")
    write_weights(tmp_path, TENSORS, CONFIG, new)
    assert_holds(tmp_path, TENSORS)
    weights = 1 if new == 120 else 4
    assert len(names(tmp_path)) == 2 + weights and "tokenizer.json" in names(tmp_path)


# Errors: the old folder, or nothing.


@pytest.mark.parametrize("old", [None, 120, 50])
@pytest.mark.parametrize("new", [120, 50])
@pytest.mark.parametrize("step", ["write_tensors", "fsync"])
def test_a_save_that_fails_leaves_the_folder_as_it_was_and_names_the_file(tmp_path, monkeypatch, step, old,
                                                                         new):
    folder = tmp_path / "model"
    function, failed = getattr(tensors, step), 0
    for failing in range(1, 7):
        if old is not None:
            write_weights(folder, OTHERS, CONFIG, old)
        before, calls = names(folder) if folder.exists() else set(), []

        def fail(file, *more, calls=calls, failing=failing):
            calls.append(Path(file))
            function(file, *more)
            if len(calls) == failing:
                raise full_disk()

        with monkeypatch.context() as patch:
            patch.setattr(tensors, step, fail)
            try:
                write_weights(folder, TENSORS, CONFIG, new)
            except ValueError as error:
                file = str(calls[-1]).removesuffix(".tmp")
                assert str(error) == f"{file}: cannot be written (No space left on device)"
                failed += 1
            else:
                break
        assert names(folder) == before
        if old is not None:
            assert_holds(folder, OTHERS)
    # Every call failed once, and the first save without a failing call went through.
    assert failed == len(calls) > 0
    assert_holds(folder, TENSORS)


def test_an_error_of_another_kind_leaves_nothing_of_a_save_and_stays_as_it_is(tmp_path):
    write_weights(tmp_path, OTHERS, CONFIG, 50)
    before = names(tmp_path)
    with pytest.raises(KeyError):
        write_weights(tmp_path, TENSORS | {"counts": torch.ones(2, dtype=torch.int64)}, CONFIG, 120)
    assert names(tmp_path) == before
    assert_holds(tmp_path, OTHERS)


def test_a_folder_that_cannot_be_made_is_one_line_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"config\.json: cannot be written \(File exists\)"):
        write_weights(tmp_path / "file", TENSORS, CONFIG, 120)


@pytest.mark.parametrize(("old", "new"), [(120, 120), (120, 50), (50, 120)])
def test_a_process_that_is_killed_leaves_the_old_weights_or_the_new(tmp_path, monkeypatch, old, new):
    class Killed(BaseException):
        pass

    def stop_at(number, owner, name):
        function, calls = getattr(owner, name), []

        def patched(*arguments):
            calls.append(1)
            if len(calls) == number:
                raise Killed
            return function(*arguments)

        return patched

    seen = []
    for owner, name in ((os, "replace"), (Path, "unlink")):
        for number in range(1, 9):
            folder = tmp_path / f"{name}{number}"
            write_weights(folder, OTHERS, CONFIG, old)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, stop_at(number, owner, name))
                try:
                    write_weights(folder, TENSORS, CONFIG, new)
                except Killed:
                    pass
            found = read(folder)["w0"]
            wanted = TENSORS if torch.equal(found, TENSORS["w0"]) else OTHERS
            assert_holds(folder, wanted)
            seen.append(wanted is TENSORS)
    assert True in seen and False in seen


# Reading.


def test_only_the_rows_asked_for_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    part = open_weights(tmp_path)["w3"]
    assert part.get_shape() == [2, 3]
    assert torch.equal(part[1:2], TENSORS["w3"][1:2]) and torch.equal(part[...], TENSORS["w3"])


# Identity.


def test_identity_is_of_the_bytes_that_are_read_whatever_their_times_and_names_of_shards(tmp_path):
    write_weights(tmp_path / "a", TENSORS, CONFIG, 50)
    first = identity(tmp_path / "a")
    assert first.keys() == {"weights", "config", "tokenizer"} and {len(x) for x in first.values()} == {64}
    assert identity(tmp_path / "a", weights=False) == {key: first[key] for key in ("config", "tokenizer")}
    os.utime(tmp_path / "a/config.json", (0, 0))
    (tmp_path / "a/model-00001-of-00009.safetensors").write_bytes(b"named by no index")
    (tmp_path / "a/README.md").write_text("words")
    assert identity(tmp_path / "a") == first
    changes = {"model-00003-of-00003.safetensors": "weights", "config.json": "config",
               "tokenizer_config.json": "tokenizer", "generation_config.json": "tokenizer"}
    for name, part in changes.items():
        file = tmp_path / "a" / name
        content = file.read_bytes() if file.exists() else b""
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"{}")
        found = identity(tmp_path / "a")
        assert [key for key in first if found[key] != first[key]] == [part], name
        file.write_bytes(content) if content else file.unlink()
    assert identity(tmp_path / "a") == first


def test_a_file_that_cannot_be_digested_is_named(tmp_path):
    write_weights(tmp_path, TENSORS, CONFIG, 120)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: cannot be read \(No such file or directory\)"):
        identity(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: no readable tensors"):
        identity(tmp_path)
