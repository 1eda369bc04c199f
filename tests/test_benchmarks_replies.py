"""The file of replies: read, cut, refused. tests/test_eval.py has the refusals through the command line."""

from types import SimpleNamespace

import pytest

from benchmarks.replies import COMPARED, DIGESTS, digest_ids, read_replies, reply_line
from runtime.files import write_json

ENTRIES = [SimpleNamespace(id=id, category="c") for id in "ab"]
PROMPTS = {"a": [3, 1], "b": [3, 11]}
SETTINGS = {key: f"{key}/1" for key in (*DIGESTS, *COMPARED, "model")}


@pytest.fixture
def file(tmp_path):
    write_json(tmp_path / "settings.json", SETTINGS)
    lines = [reply_line(entry, PROMPTS[entry.id], "Malmö\n") for entry in ENTRIES]
    (tmp_path / "replies.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "replies.jsonl"


def test_a_written_line_is_read_again(file):
    assert read_replies(file, ENTRIES, SETTINGS, PROMPTS) == {"a": "Malmö\n", "b": "Malmö\n"}
    assert read_replies(file.with_name("none"), ENTRIES, SETTINGS, PROMPTS) == {}


def test_a_reply_that_was_cut_inside_a_character_is_generated_again(file):
    content = file.read_bytes()
    file.write_bytes(content[:content.rindex("ö".encode()) + 1])
    assert read_replies(file, ENTRIES, SETTINGS, PROMPTS) == {"a": "Malmö\n"}
    assert file.read_bytes() == content[:content.index(b"}\n") + 2]


def test_only_replies_to_the_given_prompts_are_returned_and_checked(file):
    assert read_replies(file, ENTRIES, SETTINGS, {"b": [3, 11]}) == {"b": "Malmö\n"}
    with pytest.raises(ValueError, match="1 of 2 replies, b the first, are to other prompts"):
        read_replies(file, ENTRIES, SETTINGS, {"a": [3, 1], "b": [31, 1]})
    assert read_replies(file, ENTRIES[:1], SETTINGS, {"a": [3, 1]}, skipped=["c"]) == {"a": "Malmö\n"}
    with pytest.raises(ValueError, match="unknown id 'b'"):
        read_replies(file, ENTRIES[:1], SETTINGS, {"a": [3, 1]}, skipped=["d"])


@pytest.mark.parametrize("key", [*DIGESTS, *COMPARED])
def test_what_differs_is_named_and_names_of_files_do_not_count(file, key):
    read_replies(file, ENTRIES, SETTINGS | {"model": "elsewhere"}, PROMPTS)
    with pytest.raises(ValueError, match=f"was made with (other bytes of )?{key}.*--out") as caught:
        read_replies(file, ENTRIES, SETTINGS | {key: "2"}, PROMPTS)
    assert "\n" not in str(caught.value)


def test_the_digest_of_ids_depends_on_where_they_begin_and_end():
    ids = [1, 21, 3], [12, 1, 3], [1, 2, 13], [1, 21], []
    assert len({digest_ids(each) for each in ids}) == 5 and digest_ids((1, 21)) == digest_ids([1, 21])
