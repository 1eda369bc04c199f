"""Every setting of train.py with its unit and source, and a strict loader.

In:  a command line; a YAML file overrides the defaults, --section.key=value overrides both.
Out: a frozen Config. An unknown key, a value of another type or an impossible value is a ValueError of one
     line that names the key, what is wrong and what is right.

"Paper" is arXiv 2505.00024, Table 6; "code" is its released training script. Their values are the defaults.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from reward import CHAT_FORMATS, SCHEMES


@dataclass(frozen=True)
class ModelSettings:
    path: str = ""  # Hugging Face folder or hub name: the policy at step 0 and the KL reference
    init: str = "trained"  # weights: trained | random, of the shape in config.json: to measure speed
    precision: str = "auto"  # of matrix products: bf16 | fp32 | auto: see runtime.sharding.choose_device
    lora_rank: int | None = None  # LoRA: only adapters of this rank beside all linear layers are trained
    lora_alpha: float = 16.0  # the adapters' product counts alpha / rank (LLaMA-Factory: twice the rank)
    kernel: str = "auto"  # reference: plain PyTorch | fast: the twins in fast/ | auto: fast where it can run


@dataclass(frozen=True)
class DataSettings:
    train: str = ""  # JSON lines of examples, as data.py writes them
    heldout: str | None = None  # JSON lines of held-out examples; null: split from train by heldout_fraction
    heldout_fraction: float = 0.1  # share of train that is held out (code: 10 %, shuffled; here by seed)
    system_prompt: str | None = None  # text file with {tools}; null: the project's own wording
    chat_format: str = "auto"  # chatml | llama3 | auto: by the tokens of the tokenizer (docs/chat_formats.md)
    max_prompt_tokens: int = 4096  # longer prompts are dropped and counted, never truncated (paper)
    max_dropped_share: float = 0.05  # an error if a larger share of the prompts is dropped


@dataclass(frozen=True)
class RolloutSettings:
    n: int = 5  # replies a prompt: the group size G (paper)
    temperature: float = 0.7  # of sampling, and of every log-prob in training (paper)
    top_p: float = 1.0  # must be 1: training takes log-probs of the full softmax (paper)
    max_new_tokens: int = 8192  # tokens a reply, stop token included (paper)
    batch_size: int = 256  # replies decoded at once
    kv_memory_gib: float | None = None  # of the KV cache; null: the free memory of a GPU, no limit on a CPU
    refill: int = 0  # further batches that a step may draw to find groups with spread (arXiv 2503.14476)


@dataclass(frozen=True)
class GrpoSettings:
    reward: str = "binary"  # scheme of reward.score (paper: binary)
    normalize: str = "std"  # advantages: std (eq. 4) | none (centred only)
    ratio: str = "token"  # token (paper) | sequence: its geometric mean over a reply (arXiv 2507.18071)
    clip: str = "ppo"  # ppo (paper) | cispo: clipped weight times log-prob (arXiv 2506.13585)
    average: str = "token"  # over tokens | reply: their means | constant: over max_new_tokens a reply
    clip_low: float = 0.2  # the ratio is clipped below 1 - clip_low (code)
    clip_high: float = 0.2  # the ratio is clipped above 1 + clip_high (code)
    kl_coef: float = 1e-3  # weight of KL(policy, reference) (paper); 0: no reference model is loaded
    reference_on_cpu: bool = True  # reference shards in host memory; a GPU gets one block at a time (code)


@dataclass(frozen=True)
class TrainSettings:
    epochs: float = 7.0  # passes over the training set (paper); used if steps is null
    steps: int | None = None  # steps of the run; null: from epochs
    max_minutes: float | None = None  # the run ends after so many minutes of steps, earlier runs included
    threads: int | None = None  # CPU threads of each rank; null: OMP_NUM_THREADS, else all usable cores
    timeout_minutes: float = 60.0  # longest wait for another rank before the job ends
    prompts_per_step: int = 1024  # prompts (grpo) or examples (sft) a step (paper)
    updates_per_step: int = 4  # mini-batches a step, one optimizer update each (code: 256 prompts an update)
    micro_batch_tokens: int = 30720  # packed tokens of one forward and backward: limits memory (code)
    activation_checkpointing: bool = False  # recompute blocks in backward: less memory, a third more time
    lr: float = 1e-6  # peak learning rate of AdamW (paper)
    schedule: str = "constant"  # constant (paper) | cosine: to a tenth of lr over the steps | cosine_time: or
    # over max_minutes, whichever end first; it cannot resume exactly, because it follows the clock
    warmup: float = 0.0  # share of all steps in which lr rises linearly from 0 (paper: none)
    weight_decay: float = 0.01  # decoupled, of matrices only
    beta2: float = 0.999  # decay of AdamW's second moment; the first is 0.9
    grad_clip: float = 1.0  # a gradient of a larger norm is scaled down to it (code)


@dataclass(frozen=True)
class EvalSettings:
    every: int | None = 10  # steps between evaluations (paper); null: none in between
    ends: bool = True  # also before the first step and after the last; false: at neither of the two
    examples: int = 500  # held-out examples an evaluation, evenly spaced in the set
    max_new_tokens: int = 2048  # tokens a reply, stop token included


@dataclass(frozen=True)
class LogSettings:
    rollouts_every: int = 10  # steps between files of rollouts
    tokens: bool = False  # these files also hold the text, log-probs and entropy of each reply token
    tracker: str = "none"  # none | tensorboard | wandb


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = 10  # steps between checkpoints; one more after the last step (paper)
    keep: int | None = None  # how many of the newest checkpoints are kept; null: all


@dataclass(frozen=True)
class Config:
    stage: str = "grpo"  # grpo | sft
    seed: int = 0  # of the data order and the sampling noise
    out: str = ""  # run folder, which is created
    resume: bool | str = "auto"  # auto: resume if `out` holds a run | true: it must | false: it must not
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    log: LogSettings = field(default_factory=LogSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)


def load_config(argv):
    """The Config of a command line: at most one YAML file and any number of --section.key=value. ValueError:
    a file that is missing or not YAML, an unknown key (the nearest is named), a value that cannot work."""
    known, given, files, words = dict(leaves(Config)), {}, [], iter(argv)
    for word in words:
        if not word.startswith("--"):
            files.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        text = text if equals else next(words, "--")
        if not equals and text.startswith("--"):
            raise ValueError(f"{word}: expected --section.key=value")
        # Text is not parsed as YAML: --out=2026 is a name, not a number.
        is_text = known.get(key) is str or (known.get(key) == str | None and text != "null")
        given[key] = (text if is_text else parse_yaml(text, word), f"--{key}")
    if len(files) > 1:
        raise ValueError(f"two configuration files ({', '.join(files)}); give one")
    values = {key: (value, f"{file}: {key}") for file in files for key, value in read_yaml(file)} | given
    for key, (_, where) in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            near = near or [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
            raise ValueError(f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
    config = Config()
    for key, (value, where) in values.items():
        config = with_value(config, key, coerce(value, where, known[key]))
    check(config)
    return config


def read_yaml(file):
    """Yield (dotted key, value) of a YAML file. ValueError: unreadable, not YAML, not sections with keys."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({getattr(error, 'strerror', 'not UTF-8 text')})") from None
    tree = parse_yaml(text, file) or {}
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected sections with keys, not {type(tree).__name__}")
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", leaf) for key, leaf in value.items())
        # A known section whose keys are all commented out is read as null and sets nothing.
        elif value is not None or not dataclasses.is_dataclass(typing.get_type_hints(Config).get(name)):
            yield str(name), value


class StrictLoader(yaml.SafeLoader):
    """YAML, except that a duplicate key is an error; in plain YAML the last one wins."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text, where):
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None


def leaves(cls, prefix=""):
    """Yield (dotted key, type) of every setting."""
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def coerce(value, where, kind):
    """`value` as the type `kind`, else ValueError. A float may be an integer, or 1e-6, a text in YAML 1.1."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in options and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    if type(value) not in options:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        expected = " or ".join(names.get(option, "null") for option in options)
        raise ValueError(f"{where} is {value!r}; expected {expected}")
    return value


def with_value(config, key, value):
    """A copy of a config in which the dotted key has the value."""
    name, _, rest = key.partition(".")
    part = with_value(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: part})


def flat(config):
    """{dotted key: value} of every setting."""
    return {key: functools.reduce(getattr, key.split("."), config) for key, _ in leaves(Config)}


def check(config):
    """ValueError for a value that cannot work; the message names one that can."""
    choices = {"stage": ("grpo", "sft"), "resume": ("auto", True, False), "grpo.normalize": ("std", "none"),
               "grpo.ratio": ("token", "sequence"), "grpo.clip": ("ppo", "cispo"),
               "grpo.average": ("token", "reply", "constant"),
               "model.precision": ("auto", "bf16", "fp32"), "model.init": ("trained", "random"),
               "train.schedule": ("constant", "cosine", "cosine_time"),
               "model.kernel": ("auto", "reference", "fast"), "data.chat_format": ("auto", *CHAT_FORMATS),
               "grpo.reward": SCHEMES, "log.tracker": ("none", "tensorboard", "wandb")}
    required = ("out", "model.path", "data.train")
    may_be_zero = ("seed", "rollout.refill", "grpo.kl_coef", "train.weight_decay")
    shares = ("data.max_dropped_share", "data.heldout_fraction", "train.warmup", "train.beta2")
    for key, value in flat(config).items():
        if key in required and not value:
            raise ValueError(f"{key} is not set; give it in the YAML file or as --{key}=…")
        if key in choices and value not in choices[key] and (key, value) != ("model.kernel", "triton"):
            raise ValueError(f"{key} is {value!r}; choose one of {', '.join(map(str, choices[key]))}")
        if value is None or isinstance(value, bool | str):
            continue
        if key in shares and not 0 <= value < 1:
            raise ValueError(f"{key} is {value}; it is a share, from 0 to below 1")
        if not (0 < value < float("inf") or value == 0 and key in shares + may_be_zero):
            raise ValueError(f"{key} is {value}; it must be {'0 or ' if key in may_be_zero else ''}above 0")
    c, r, t = config, config.rollout, config.train
    longest = c.data.max_prompt_tokens + r.max_new_tokens
    rules = (
        (c.seed >= 2**63, f"seed is {c.seed}; it must be below 2^63: keys of the noise are 64-bit numbers"),
        (r.n < 2, f"rollout.n is {r.n}; a group needs at least 2 replies to compare"),
        (r.top_p != 1, f"rollout.top_p is {r.top_p}; it must be 1: training scores the whole softmax"),
        (t.prompts_per_step % t.updates_per_step, f"train.updates_per_step is {t.updates_per_step}; it must "
                                                  f"divide train.prompts_per_step, {t.prompts_per_step}"),
        (c.grpo.ratio == "sequence" and c.grpo.clip == "cispo",
         "grpo.clip is cispo, but grpo.ratio is sequence; choose grpo.clip ppo or grpo.ratio token"),
        (t.micro_batch_tokens < longest,
         f"train.micro_batch_tokens is {t.micro_batch_tokens}; it must hold the longest prompt and reply: "
         f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}"),
        (t.schedule == "cosine_time" and t.max_minutes is None,
         "train.schedule is cosine_time, but train.max_minutes is null; set the minutes, or choose cosine"),
        (c.data.heldout is None and not c.data.heldout_fraction,
         "data.heldout is null and data.heldout_fraction 0: nothing to evaluate on; set one"),
    )
    for broken, message in rules:
        if broken:
            raise ValueError(message)


def check_fits(config, *, ranks=None, examples=None, positions=None):
    """ValueError where a Config does not fit what is known later: the number of ranks, of training examples,
    and of positions of the model, in tokens. None: not known yet."""
    prompts_per_step = config.train.prompts_per_step
    prompts = prompts_per_step // config.train.updates_per_step
    longest = config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.eval.max_new_tokens)
    if ranks is not None and prompts < ranks:
        raise ValueError(f"train.prompts_per_step / train.updates_per_step is {prompts} prompts an update, "
                         f"fewer than the {ranks} ranks; raise train.prompts_per_step or start fewer")
    if examples is not None and examples < prompts_per_step:
        raise ValueError(f"train.prompts_per_step is {prompts_per_step}, but there are only {examples} "
                         "training examples; choose a number up to that")
    if positions is not None and longest > positions:
        raise ValueError(f"a prompt and a reply may take {longest} tokens, but {config.model.path} has "
                         f"{positions} positions; lower data.max_prompt_tokens, "
                         "rollout.max_new_tokens or eval.max_new_tokens")


def number_of_steps(config, examples):
    """Steps of a run on so many training examples."""
    return config.train.steps or math.ceil(config.train.epochs * examples / config.train.prompts_per_step)
