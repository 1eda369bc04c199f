"""Hugging Face folders as files: finding one, reading safetensors by rows, writing them a tensor at a time.

In:  a folder or hub name. Out: {name: slice}, of which a rank reads only its rows. model.py checks the names.
"""

import contextlib
import json
import os
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from runtime.files import atomically, digest, fsync, read_json, writing
from runtime.ranks import is_first_rank

INDEX = "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # as peft names them
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")  # text to ids, stop ids
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def resolve(path, patterns=("*.json", "*.safetensors", "*.txt", "*.jinja")):
    """The local folder of a model: `path` itself if it is one, else the hub's snapshot of such files.
    ValueError for a folder that holds a LoRA adapter and no model."""
    folder = Path(path)
    if not os.path.isdir(path):
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=list(patterns)))
        except (ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path}: no local folder, and the hub gave no such model ({reason})") from None
    if not (folder / "config.json").exists():
        refuse_adapter(folder)
    return folder


def refuse_adapter(folder):
    for name in ADAPTER:
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: a LoRA adapter without its model; merge the two (in peft: "
                             "merge_and_unload, then save_pretrained) and give that folder")


def identity(folder, weights=True):
    """What a model folder holds, by its bytes: {"weights", "config", "tokenizer"}, a SHA-256 each.

    Weights are the files that `open_weights` reads, config is config.json, tokenizer every one of TEXT_FILES
    that exists. weights=False leaves the weights out. ValueError where a file cannot be read. Each is read
    from start to end (15 GB for a 7B); nothing is cached: a copy may have size and times of another file.
    """
    texts = [name for name in TEXT_FILES if (folder / name).exists()]
    files = {"config": ["config.json"], "tokenizer": texts}
    if weights:
        open_weights(folder)  # what is not complete is refused before gigabytes of it are read
        files = {"weights": weight_files(folder), **files}
    try:
        return {part: sha256("".join(digest(folder / name) for name in names).encode()).hexdigest()
                for part, names in files.items()}
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror}); is the folder "
                         "complete?") from None


def weight_files(folder):
    """The names of the safetensors files of a folder: model.safetensors, or every shard that its index names.
    ValueError, with advice, where other tools left the weights in another form."""
    files = ["model.safetensors"]
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else [None]
        for file in files:
            if not isinstance(file, str) or file != os.path.basename(file) or file in ("", ".", ".."):
                raise ValueError(f"{folder / INDEX}: weight_map names {file!r}, not a file of this folder; "
                                 "refused")
    elif not (folder / files[0]).exists():
        refuse_adapter(folder)
        shards, older = sorted(folder.glob("*.safetensors")), sorted(folder.glob("*.bin"))
        if shards:
            raise ValueError(f"{folder}: holds {shards[0].name}, but neither {files[0]} nor {INDEX}, which "
                             "says what is where; copy it from where the weights came from, or rename a "
                             f"single file to {files[0]}")
        if older:
            raise ValueError(f"{older[0]}: weights of torch.save are not loaded, because they can hold code; "
                             "save the model as safetensors (in transformers: from_pretrained, then "
                             "save_pretrained)")
    return sorted(set(files))


def open_weights(folder):
    """{name: slice} of the tensors of a folder."""
    return {name: part for file in weight_files(folder) for name, part in open_tensors(folder / file).items()}


def open_tensors(file):
    """{name: slice} of a safetensors file: `slice[rows]` reads only these."""
    try:
        opened = safe_open(file, framework="pt")
        return {name: opened.get_slice(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: no readable tensors ({error}); is it all there?") from None


def write_weights(folder, tensors, texts, max_shard_bytes):
    """Collective: write {name: tensor} as model.safetensors, or as numbered shards with an index where they
    take more than `max_shard_bytes`, and then `texts`, {file name: JSON value}.

    No file takes its final name before all are on the disk: an error while writing, a ValueError that names
    the file, leaves the folder as it was. Other weights that the folder held are removed.
    """
    folder = Path(folder)
    if not is_first_rank():
        write_tensors(folder, tensors)
        return
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weights = {"model.safetensors": shards[0]}
    if len(shards) > 1:
        weights = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": x for i, x in enumerate(shards, 1)}
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, shard in weights.items() for name in shard}
        texts = {INDEX: {"metadata": {"total_size": total}, "weight_map": weight_map}, **texts}
    with contextlib.ExitStack() as stack:
        # The stack renames in reverse order: weights, then the index that refers to them, the config last.
        files = reversed([*weights, *texts])
        temporary = {file: stack.enter_context(atomically(folder / file)) for file in files}
        # A full disk shows here, before the first rename replaces a part of the old folder.
        for file, content in (weights | texts).items():
            with writing(folder / file):
                if file in weights:
                    write_tensors(temporary[file], content)
                else:
                    temporary[file].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                fsync(temporary[file])
    # After the renames, so that a crash leaves a folder that loads; the old index first, because it takes
    # precedence over the new model.safetensors.
    for old in sorted(folder.glob("model*.safetensors*"), reverse=True):
        if old.name not in weights | texts:
            with writing(old):
                old.unlink()


def write_tensors(file, tensors):
    """Collective: write {name: tensor} as safetensors. Rank 0 writes; shards are gathered a tensor at a time.
    The format: 8 bytes with the length of a JSON header, the header, the numbers of the tensors in order."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    with open(file if is_first_rank() else os.devnull, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            gather = tensor.full_tensor if hasattr(tensor, "full_tensor") else tensor.detach
            # No variable keeps a full tensor while the next one is gathered.
            out.write(gather().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
