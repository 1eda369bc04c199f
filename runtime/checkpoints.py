"""Checkpoints of a run folder: written under a temporary name, verified before use, chosen on resume.

checkpoints/step_000010/ is a Hugging Face folder with the tokenizer, plus

    adapter/          with LoRA: the adapter in PEFT's format; the weights beside it are merged
    optimizer.state   AdamW's moments in the safetensors format. Not named *.safetensors, because vLLM would
                      take it for weights
    training.json     the state of the step boundary, the settings, digests of the data and the base model
    manifest.json     sizes and hashes of the other files, written last (runtime/files.py)

While it is written its name ends in .tmp. A checkpoint that fails verification is skipped, and never deleted.
"""

import os
import shutil

import torch

from runtime.adapters import has_adapters, write_adapter
from runtime.files import check_seal, fsync, read_json, seal, write_json
from runtime.ranks import is_first_rank
from runtime.sharding import own_rows
from runtime.tensors import open_tensors, write_tensors

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json",
                   "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# Settings that may change on resume: file paths (their contents are fingerprinted), evaluation, logging and
# checkpoint settings, and what changes results by rounding only (memory limits, the kernel).
MAY_CHANGE = ("out", "resume", "data.train", "data.heldout", "data.system_prompt", "eval.", "log.",
              "checkpoint.", "train.max_minutes", "train.timeout_minutes", "train.micro_batch_tokens",
              "train.activation_checkpointing", "train.threads", "rollout.batch_size",
              "rollout.kv_memory_gib", "grpo.reference_on_cpu", "model.kernel")


def incompatible_keys(earlier, now):
    """Keys whose change from `earlier` would alter the training trajectory, so the run cannot be resumed.
    Both are {dotted key: value}. Steps and minutes may change unless the learning rate depends on them."""
    may_change = MAY_CHANGE
    if now["train.schedule"] == "constant" and now["train.warmup"] == 0:
        may_change += ("train.steps", "train.epochs")
    if now["train.schedule"] == "cosine_time":
        may_change = tuple(key for key in may_change if key != "train.max_minutes")
    earlier, now = ({**settings, "model.precision": precision_in_words(settings["model.precision"])}
                    for settings in (earlier, now))
    return [key for key in now if now[key] != earlier[key] and not key.startswith(may_change)]


def precision_in_words(written):
    """"bf16" or "fp32" from the precision in a config.yaml. An earlier version wrote "auto" there, which was
    bf16 on a GPU and fp32 on every CPU; now what was chosen is written."""
    return {"auto": "bf16" if torch.cuda.is_available() else "fp32"}.get(written, written)


def precision_of_run(run, asked, read_settings):
    """model.precision: `asked`, but "auto" in a folder with a run is that of the run on every machine."""
    file = run / "config.yaml"
    if asked != "auto" or not file.exists():
        return asked
    return precision_in_words(dict(read_settings(file)).get("model.precision", "auto"))


def newest_checkpoint(run, resume, state_keys, read_settings, settings, defaults, fingerprint):
    """The checkpoint that a run folder resumes from: (its folder, the state of its step boundary, skipped
    checkpoint folders). Folder None and state {} mean a start from step 0. Prints what it chose and skipped.

    resume: True demands a run in the folder; state_keys: what the state consists of; read_settings(file): the
    (key, value) pairs of a config.yaml; settings, defaults: {dotted key: value} of this run, and of settings
    that an older version did not write; fingerprint: {key: digest} of the data and the base model. ValueError
    where the folder's run has other settings, data or base, and where there are checkpoints but none can be
    used. A digest that an older version did not write is not compared, and one line says so.
    """
    if not (run / "config.yaml").exists():
        if resume is True:
            raise ValueError(f"{run} holds no run to go on with; leave out --resume=true")
        return None, {}, set()
    earlier = defaults | dict(read_settings(run / "config.yaml"))
    if differing := incompatible_keys(earlier, settings):
        raise ValueError(f"{run} holds a run with another {', '.join(differing)}; set as in its "
                         "config.yaml to go on, or choose another --out")
    found = [path for path in run.glob("checkpoints/step_*") if path.suffix != ".tmp"]
    skipped = set()
    for folder in sorted(found, key=lambda path: (path.name[:11], not path.suffix), reverse=True):
        try:
            check_seal(folder)
            training = {"cursor": 0} | read_json(folder / "training.json")  # an older version has none
            if not {*state_keys, "config", "fingerprint"} <= training.keys():
                raise ValueError("its training.json is of another version")
            if folder.name[:11] != f"step_{training['step']:06d}":
                raise ValueError(f"it is of step {training['step']}")
            if differing := incompatible_keys(defaults | training["config"], settings):
                raise ValueError(f"it is of a run with another {', '.join(differing)}")
        except (ValueError, OSError) as error:
            print(f"passed over {folder}: {error}")
            skipped.add(folder)
            continue
        known = training["fingerprint"]
        if unknown := [key for key in fingerprint if key not in known]:
            print(f"{folder} is of an earlier version, without digests of {', '.join(unknown)}: whether they "
                  "have changed is not known; the next checkpoint records them")
        changed = [key for key in fingerprint if known.get(key, fingerprint[key]) != fingerprint[key]]
        if changed:
            raise ValueError(f"{folder}: the contents of {', '.join(changed)} have changed since; going "
                             "on would be another run. Restore them, or start anew with another --out")
        print(f"going on from {folder}")
        return folder, {name: training[name] for name in state_keys}, skipped
    if found:
        raise ValueError(f"{run}: no checkpoint of this run can be used, see above; nothing was "
                         "changed. Restore one, or start anew with another --out")
    print(f"no checkpoint in {run}: starting from step 0")
    return None, {}, skipped


def write_state(folder, model, optimizer, save_model, base, save_prompt=None):
    """Collective: write weights, moments, and the tokenizer of the folder `base`; the adapters of LoRA too.
    save_model(model, folder) writes the weights; save_prompt(folder), on rank 0, the prompt that belongs to
    them. Tensors are gathered one at a time, and rank 0 writes."""
    save_model(model, folder)  # must come first: state_dict() reshards what an interrupted rollout gathered
    if has_adapters(model):
        write_adapter(folder, model, base)
    moments = {f"{name}.{key}": moment for name, parameter in model.named_parameters()
               if parameter.requires_grad for key, moment in optimizer.state[parameter].items()}
    write_tensors(folder / "optimizer.state", moments)
    for name in TOKENIZER_FILES:
        if is_first_rank() and (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    if save_prompt and is_first_rank():
        save_prompt(folder)


def publish(temporary, training, metrics_file, skipped, keep):
    """Complete a written checkpoint: add training.json, seal it, give it its final name, and delete the
    oldest ones beyond `keep` (None: all are kept). For rank 0.

    metrics_file is fsynced first, so that no checkpoint counts rows which are not on the disk. `skipped`
    folders neither count nor are deleted; one that had this checkpoint's name is moved to *.replaced."""
    final = temporary.with_suffix("")
    write_json(temporary / "training.json", training)
    seal(temporary)
    fsync(metrics_file)
    if final.exists():
        replaced = final.with_suffix(".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(temporary, final)
    fsync(final.parent)
    skipped.discard(final)
    valid = sorted(set(final.parent.glob("step_??????")) - skipped)
    for old in valid[:-keep] if keep else []:
        shutil.rmtree(old)


def read_moments(folder, model, optimizer):
    """Fill the optimizer's state from a checkpoint. Each rank reads its own rows."""
    slices = open_tensors(folder / "optimizer.state")
    for name, parameter in ((n, p) for n, p in model.named_parameters() if slices and p.requires_grad):
        state = optimizer.state[parameter] = {"step": slices[f"{name}.step"][...].to(parameter.device)}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(parameter)
            values, rows = own_rows(state[key])
            values.copy_(slices[f"{name}.{key}"][rows])
