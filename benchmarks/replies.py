"""The file of a model's replies to a benchmark: written batch by batch, and resumed after an interruption.

In:  replies.jsonl, lines {"id", "category", "prompt", "reply"}, and settings.json in the same folder.
Out: {id: reply text}, if the replies are those that would be made now, else a ValueError that says why not.

What made a reply is compared by digests, never by names: settings.json holds those of the model's files and
of the system prompt, each line that of the prompt's ids, so the entries and the wording of this code count.
Nothing needs torch.
"""

import json
from hashlib import sha256

from benchmarks.tables import read_outputs
from runtime.files import read_json, write_json, write_text

DIGESTS = ("weights", "config", "tokenizer", "system_prompt_text")  # keys of settings.json
COMPARED = ("bench", "paper_prompt", "max_new_tokens")  # others are names, for people to read
REMEDY = "choose another --out, or remove it"


def digest_ids(ids):
    """The SHA-256 of a list of ids, in hexadecimal."""
    return sha256(str(list(ids)).encode()).hexdigest()


def read_replies(file, entries, settings, prompts, skipped=()):
    """{id: reply text} of an earlier evaluation with these settings; an incomplete last line is cut off.

    entries: those that the file may answer, besides the `skipped` categories; prompts: {id: ids} of the
    replies to return. ValueError, naming what differs: replies of other settings or to other prompts, or a
    line that is no reply.
    """
    settings_file = file.with_name("settings.json")
    if not file.exists():
        return {}
    if not settings_file.exists():
        raise ValueError(f"{file} has no {settings_file.name} beside it, so what made it is unknown; "
                         f"{REMEDY}")
    earlier = read_json(settings_file)
    if not all(key in earlier for key in DIGESTS):
        raise ValueError(f"{settings_file} is of an earlier version and has no digests of weights and system "
                         f"prompt, so what made {file.name} is unknown; {REMEDY}")
    changed = [key for key in DIGESTS if earlier[key] != settings[key]]
    if changed:
        raise ValueError(f"{file} was made with other bytes of {', '.join(changed)}; {REMEDY}")
    for key in COMPARED:
        if earlier.get(key) != settings[key]:
            raise ValueError(f"{file} was made with {key} {earlier.get(key)!r}, not {settings[key]!r}; "
                             f"{REMEDY}")
    content = file.read_bytes()  # the incomplete line may end inside a character
    if not content.endswith(b"\n"):
        write_text(file, content[:content.rfind(b"\n") + 1].decode(errors="replace"))
    lines = read_outputs(file, entries, "reply", skipped)
    lines = {id: line for id, line in lines.items() if id in prompts}
    other = [id for id, line in lines.items() if line.get("prompt") != digest_ids(prompts[id])]
    if other:
        raise ValueError(f"{file}: {len(other)} of {len(lines)} replies, {other[0]} the first, are to other "
                         f"prompts, because the data or this code changed; {REMEDY}")
    return {id: line["reply"] for id, line in lines.items()}


def reply_line(entry, prompt, reply):
    """The line of `read_replies` for a reply to the ids `prompt`."""
    line = {"id": entry.id, "category": entry.category, "prompt": digest_ids(prompt), "reply": reply}
    return json.dumps(line, ensure_ascii=False) + "\n"


def answer_entries(answer, entries, prompts, replies, file, settings, *, room, batch_size):
    """Replies to the entries of a benchmark, {id: reply text}, the given `replies` among them.

    answer(list of ids): the texts of the replies to a batch of prompts; prompts: {id: ids}; room: tokens that
    a prompt may have. After every batch its replies are appended to `file`; `settings` are saved in
    settings.json in the same folder. ValueError if a prompt is too long.
    """
    replies, prompts = dict(replies), {id: ids for id, ids in prompts.items() if id not in replies}
    long = [id for id, prompt in prompts.items() if len(prompt) > room]
    if long:
        raise ValueError(f"{len(long)} of {len(prompts)} prompts, {long[0]} the first, have more than the "
                         f"{room} tokens that the model's positions leave beside --max_new_tokens")
    # Sorted, so that prompts of similar length share a batch; the longest first, so that a lack of memory
    # shows in the first batch.
    waiting = [entry for entry in entries if entry.id in prompts]
    waiting.sort(key=lambda entry: len(prompts[entry.id]), reverse=True)
    if replies:
        print(f"{file}: {len(replies)} replies are there, {len(waiting)} to go", flush=True)
    if not file.exists():
        write_json(file.with_name("settings.json"), settings)
    with open(file, "a", encoding="utf-8") as out:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start:start + batch_size]
            texts = answer([prompts[entry.id] for entry in batch])
            for entry, text in zip(batch, texts, strict=True):
                replies[entry.id] = text
                out.write(reply_line(entry, prompts[entry.id], text))
            out.flush()
            print(f"{min(start + batch_size, len(waiting))} of {len(waiting)} replies", flush=True)
    return replies
