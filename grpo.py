"""GRPO and SFT as pure functions: advantages, tree packs, token log-probs, losses.

In:  rewards, token ids, hidden states. Out: one scalar loss to differentiate, and statistics of parts.

    A_i  = (r_i - mean(r_1..r_G)) / (std(r_1..r_G) + 1e-6)           advantages, eq. 4 (arXiv 2505.00024)
    π(t) = softmax(logits / temperature)[t]                          always the tempered distribution
    ρ    = exp(log π - log π_old)                                    per token
    k3   = exp(d) - d - 1,  d = log π_ref - log π                    KL(π ‖ π_ref), never negative
    loss = Σ_tokens( -min(ρ A, clip(ρ, 1-ε_low, 1+ε_high) A) + β k3 ) / denominator       eq. 3, negated

Arguments of `grpo_loss` and `token_weights` choose other losses than the paper's; docs/losses.md lists them.

Two differences from the paper's code. The denominator is the number of reply tokens of the whole optimizer
update (its mini-batch, all ranks, groups with equal rewards included), known before the first backward. The
paper's code takes the mean within each micro-batch, so that its gradient depends on the packing. And a
group's prompt is computed once: a pack is a sequence of trees, each a prompt followed by its replies
(arXiv 2506.05433).

Axes: P prompts, G rollouts a prompt, N = P·G, T packed tokens, L reply tokens that carry loss (the stop token
included), D width, V vocabulary rows, C one chunk of L.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from runtime.kernel import choose_kernel

CHUNK_LOGITS = 2**25  # logits that exist at once in the reference, 128 MiB in fp32
CHUNK_TOKENS = 256  # tokens computed at once: with a small vocabulary, their logits stay in a CPU's cache
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: no sound update has such a ratio, and exp overflows fp32 at 88


def group_advantages(rewards_PG, normalize="std"):
    """Advantage of each rollout within its group (eq. 4): float [P, G] in, float [P, G] out.

    normalize "std" divides by the unbiased standard deviation plus 1e-6 (the paper); "none" only subtracts
    the mean (arXiv 2503.20783). A group whose rewards are equal or not all finite gets exactly zero.
    ValueError for G < 2, where every advantage would be zero.
    """
    if rewards_PG.dim() != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(f"rewards of shape {list(rewards_PG.shape)}: expected [P, G] with G >= 2 rollouts")
    if normalize not in ("std", "none"):
        raise ValueError(f"normalize is {normalize!r}; choose 'std' or 'none'")
    rewards_PG = rewards_PG if rewards_PG.is_floating_point() else rewards_PG.float()
    adv_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)  # eq. 4
    if normalize == "std":
        adv_PG = adv_PG / (rewards_PG.std(1, keepdim=True) + 1e-6)
    # The mean of equal rewards can differ from them by rounding, which division by 1e-6 would amplify.
    return torch.where(has_spread(rewards_PG)[:, None], adv_PG, 0.0)


def has_spread(rewards_PG):
    """Whether the rewards of a group differ, all of them finite: bool [P]. Only such groups teach."""
    return (rewards_PG != rewards_PG[:, :1]).any(1) & rewards_PG.isfinite().all(1)


def choose_groups(rewards_PG, wanted, may_draw):
    """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): the groups that a step trains on, as ascending
    indices into the P >= wanted groups drawn for it so far; None if further ones must be drawn first.

    They are the first `wanted` groups with spread. If these are too few and no more may be drawn, the first
    groups without spread take the places left. Equal rewards give equal groups."""
    spread_P = has_spread(rewards_PG).tolist()
    assert len(spread_P) >= wanted, "fewer groups than a step has"
    if sum(spread_P) < wanted and may_draw:
        return None
    # The sort is stable: groups with spread come first, both kinds in the order in which they were drawn.
    return sorted(sorted(range(len(spread_P)), key=lambda p: not spread_P[p])[:wanted])


@dataclass
class Pack:
    """The trees of one micro-batch. All tensors are int64.

    tokens_T, positions_T: arguments of the model's forward; groups: argument of `shared_prefix_attention`;
    predictor_L: index into T of the hidden state that predicts reply token l; targets_L: the id of token l;
    reply_L: the reply that token l belongs to, counted over all replies in their order.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    groups: list
    predictor_L: torch.Tensor
    targets_L: torch.Tensor
    reply_L: torch.Tensor

    def to(self, device):
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Pack(groups=self.groups, **tensors)


def pack(prompts_P, replies_P_G, first_reply=0):
    """Pack groups as trees: each prompt once, then its replies, whose positions start at the prompt's length.

    prompts_P: lists of ids; replies_P_G: for each prompt, any number of lists of ids; none may be empty. The
    first token of *every* reply is predicted by the prompt's last position, so `predictor_L` is not a shift
    by one. `reply_L` counts from `first_reply`.
    """
    tokens, positions, groups, predictor, targets, reply_of = [], [], [], [], [], []
    for prompt, replies in zip(prompts_P, replies_P_G, strict=True):
        assert len(prompt) > 0 and all(len(reply) > 0 for reply in replies), "an empty prompt or reply"
        tokens += prompt
        positions += range(len(prompt))
        last_of_prompt = len(tokens) - 1
        for reply in replies:
            predictor += [last_of_prompt, *range(len(tokens), len(tokens) + len(reply) - 1)]
            targets += reply
            reply_of += [first_reply] * len(reply)
            tokens += reply
            positions += range(len(prompt), len(prompt) + len(reply))
            first_reply += 1
        groups.append((len(prompt), [len(reply) for reply in replies]))

    def int64(numbers):
        return torch.tensor(numbers, dtype=torch.int64)

    return Pack(int64(tokens), int64(positions), groups, int64(predictor), int64(targets), int64(reply_of))


def pack_micro_batches(prompts_P, replies_P_G, max_tokens):
    """Split groups into packs of at most `max_tokens` tokens, in order; `reply_L` counts over all packs.

    prompts_P, replies_P_G: as in `pack`. A group longer than `max_tokens` is split into parts, each with the
    prompt again. A reply is never split: all of its tokens are in one pack, which the sequence ratio of
    `grpo_loss` needs. ValueError where a prompt with one of its replies is already too long.
    """
    packs, prompts, replies, size, first, index = [], [], [], 0, 0, 0
    for prompt, group in zip(prompts_P, replies_P_G, strict=True):
        group_tokens = len(prompt) + sum(map(len, group))
        starts_group = True
        for reply in group:
            if len(prompt) + len(reply) > max_tokens:
                raise ValueError(f"a prompt of {len(prompt)} and a reply of {len(reply)} tokens exceed the "
                                 f"{max_tokens} tokens of a micro-batch; raise train.micro_batch_tokens")
            needed = len(reply) + (len(prompt) if starts_group else 0)
            # A group that fits into one pack starts a new one rather than being split.
            wanted = group_tokens if starts_group and group_tokens <= max_tokens else needed
            if prompts and size + wanted > max_tokens:
                packs.append(pack(prompts, replies, first))
                prompts, replies, size, first, starts_group = [], [], 0, index, True
            if starts_group:
                prompts.append(prompt)
                replies.append([])
                size += len(prompt)
                starts_group = False
            replies[-1].append(reply)
            size += len(reply)
            index += 1
    if prompts:
        packs.append(pack(prompts, replies, first))
    return packs


@dataclass
class MicroBatch:
    """One pack and the inputs of its loss, one float for each of its L reply tokens."""

    pack: Pack
    adv_L: torch.Tensor
    sampled_logp_L: torch.Tensor
    weight_L: torch.Tensor | None = None
    old_logp_L: torch.Tensor | None = None
    ref_logp_L: torch.Tensor | None = None
    rollout_L: torch.Tensor | None = None  # which of the step's N rollouts a token belongs to; on the CPU

    @classmethod
    def empty(cls, device):
        """Without tokens, but with a graph down to every weight: for a rank that has fewer micro-batches."""
        none_L = torch.zeros(0, device=device)
        return cls(pack([], []).to(device), none_L, none_L, rollout_L=torch.zeros(0, dtype=torch.int64))


def make_micro_batches(rollouts_N, adv_PG, trained_P, micro_batch_tokens, device, average="token"):
    """The micro-batches of the groups `trained_P` (indices into P), in order, on `device`.
    rollouts_N: prompt-major, each with prompt_ids, ids and logp (of the sampler); micro_batch_tokens: the
    most tokens of a pack; average: as in `token_weights`. ValueError as in `pack_micro_batches`."""
    P, G = adv_PG.shape
    groups_P = [rollouts_N[p * G:(p + 1) * G] for p in trained_P]
    packs = pack_micro_batches([group[0].prompt_ids for group in groups_P],
                               [[rollout.ids for rollout in group] for group in groups_P], micro_batch_tokens)
    adv_N = adv_PG[trained_P].flatten()
    index_N = torch.arange(P * G).view(P, G)[trained_P].flatten()
    sampled = [logp for group in groups_P for rollout in group for logp in rollout.logp]
    weight_L, _ = token_weights([rollout.ids for group in groups_P for rollout in group], average)
    sizes = [len(part.targets_L) for part in packs]
    of_tokens = [x_L.to(device).split(sizes) for x_L in (torch.tensor(sampled), weight_L)]
    return [MicroBatch(part.to(device), adv_N[part.reply_L].to(device), *parts_L,
                       rollout_L=index_N[part.reply_L])
            for part, *parts_L in zip(packs, *of_tokens, strict=True)]


def token_logprobs(hidden_LD, weight_VD, targets_L, temperature, vocab_size=None, kernel="auto"):
    """(logp_L, entropy_L): log-probability of each target under softmax(hidden · weightᵀ / temperature), and
    the entropy of that softmax, both in nats.

    hidden_LD, weight_VD: floats of one dtype, or of any under autocast; targets_L: int64 below `vocab_size`;
    temperature > 0; vocab_size: number of ids that have a token: the rows beyond, with which Qwen pads its
    vocabulary, are left out. Both results are at least fp32; logp_L <= 0 has gradients for hidden and weight,
    entropy_L >= 0 has none. kernel: "reference", the definition; "fast", its twin in fast/; "auto", the twin
    on a GPU, else the definition, printed once. ValueError where "fast" cannot run.
    """
    assert temperature > 0, "the tempered distribution of greedy decoding is not defined"
    if choose_kernel(kernel, hidden_LD.device.type, "token log-probs") == "gpu":
        from fast import logprobs
        return logprobs.token_logprobs(hidden_LD, weight_VD, targets_L, temperature, vocab_size)
    return token_logprobs_reference(hidden_LD, weight_VD, targets_L, temperature, vocab_size)


def token_logprobs_reference(hidden_LD, weight_VD, targets_L, temperature, vocab_size=None):
    """The definition of `token_logprobs`, in plain PyTorch: same arguments, shapes and results.

    It works in chunks of tokens, which backward computes again if all [L, V] logits are too many at once.
    """
    weight_VD = weight_VD[:vocab_size]

    def chunk_logprobs(hidden_CD, weight_VD, targets_C):
        logits_CV = hidden_CD @ weight_VD.T
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        logits_CV = logits_CV if temperature == 1 else logits_CV / temperature
        # log_softmax subtracts the maximum first and so cannot round to a positive log-probability.
        logp_CV = F.log_softmax(logits_CV, -1)
        entropy_C = -logp_CV.detach().exp().mul_(logp_CV.detach()).sum(-1)
        return logp_CV.gather(1, targets_C[:, None])[:, 0], entropy_C

    most = max(1, CHUNK_LOGITS // len(weight_VD))
    size = min(most, CHUNK_TOKENS)
    parts = zip(hidden_LD.split(size), targets_L.split(size), strict=True)
    if len(targets_L) <= most:
        chunks = [chunk_logprobs(hidden_CD, weight_VD, targets_C) for hidden_CD, targets_C in parts]
    else:
        chunks = [checkpoint(chunk_logprobs, hidden_CD, weight_VD, targets_C, use_reentrant=False)
                  for hidden_CD, targets_C in parts]
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def token_weights(replies, average, limit=None):
    """The weight of each reply token in a loss and the denominator of the sum: (weight_L, denominator).

    replies: anything with the lengths n of N replies; weight_L: float64, their tokens in order. average:
    "token": 1, over Σ n (the paper; DAPO, arXiv 2503.14476); "reply": 1/n, over N (DeepSeekMath, arXiv
    2402.03300, eq. 3); "constant": 1, over N · limit, the most tokens of a reply (Dr. GRPO, arXiv
    2503.20783); without limit its denominator is None. ValueError for others. A weight depends on its own
    reply only; a loss takes the denominator of its whole update: all ranks, groups without spread too.
    """
    lengths = [len(reply) for reply in replies]
    denominators = {"token": sum(lengths), "reply": len(lengths), "constant": limit and len(lengths) * limit}
    if average not in denominators:
        raise ValueError(f"average is {average!r}; choose 'token', 'reply' or 'constant'")
    weights = [1 / n if average == "reply" else 1.0 for n in lengths for _ in range(n)]
    return torch.tensor(weights, dtype=torch.float64), denominators[average]


def grpo_loss(logp_L, old_logp_L, ref_logp_L, adv_L, *, clip_low, clip_high, kl_coef, denominator,
              ratio="token", clip="ppo", reply_L=None, weight_L=None):
    """The clipped policy-gradient loss with a KL penalty (eq. 3) of one part of an optimizer update.

    logp_L: log-probs of the policy in nats, with gradient; old_logp_L: of the policy that sampled;
    ref_logp_L: of the reference model, or None without one (then kl_coef must be 0); adv_L: each token's
    advantage, that of its reply; weight_L (None: 1), denominator: see `token_weights`.
    ratio: "token", ρ of eq. 3; "sequence", its geometric mean over the tokens of a reply, which reply_L
    numbers and which must be whole (GSPO, arXiv 2507.18071, eq. 7). clip: "ppo", eq. 3; "cispo",
    -clip(ρ) A log π without a gradient of clip(ρ) (arXiv 2506.13585, eq. 4). ValueError for others.
    Returns (loss, stats): losses of parts sum to that of the update, stats (detached; `*_sum` over tokens,
    without weights) merge by runtime.metrics.merge_stats.
    """
    if (ratio, clip) not in (("token", "ppo"), ("sequence", "ppo"), ("token", "cispo")):
        raise ValueError(f"no loss has the ratio {ratio!r} with the clip {clip!r}; choose token or sequence "
                         "with ppo, or token with cispo")
    assert denominator > 0, "an optimizer update without reply tokens"
    assert ref_logp_L is not None or kl_coef == 0, "a KL penalty needs a reference model"
    assert reply_L is not None or ratio == "token", "a ratio of replies needs reply_L"
    # Broadcasting would silently accept one number for all tokens.
    given = [x for x in (old_logp_L, ref_logp_L, adv_L, reply_L, weight_L) if x is not None]
    assert all(x.shape == logp_L.shape for x in given), "one number for each reply token"
    log_ratio_L = logp_L - old_logp_L.detach()
    if ratio == "sequence":
        log_ratio_L = mean_over_reply(log_ratio_L, reply_L)  # eq. 7 of GSPO
    ratio_L = log_ratio_L.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain_L, clipped_L = ratio_L * adv_L, ratio_L.clamp(1 - clip_low, 1 + clip_high) * adv_L
    if clip == "ppo":
        # eq. 3: the lower of the plain and the clipped objective
        loss_L, clipped_off_L = -torch.minimum(plain_L, clipped_L), clipped_L < plain_L
    else:
        loss_L, clipped_off_L = -clipped_L.detach() * logp_L, clipped_L != plain_L  # eq. 4 of CISPO
    kl_L = torch.zeros_like(logp_L)
    if ref_logp_L is not None:
        d_L = (ref_logp_L.detach() - logp_L).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        # eq. 3: k3; a loss of k1, -d, would not pull to the reference. expm1: exact digits near zero
        kl_L = torch.expm1(d_L) - d_L
    if kl_coef:
        loss_L = loss_L + kl_coef * kl_L
    if weight_L is not None:
        loss_L = loss_L * weight_L.to(loss_L.dtype)
    loss = loss_L.sum() / denominator

    with torch.no_grad():
        stats = {
            "loss": loss.detach(), "tokens": torch.tensor(float(len(logp_L))),
            "kl_sum": kl_L.sum(), "ratio_sum": ratio_L.sum(),
            # Without tokens, the bounds of the ratio: they do not change the extremes of other parts.
            "ratio_max": extreme(ratio_L, torch.max, 0.0),
            "ratio_min": extreme(ratio_L, torch.min, math.exp(MAX_LOG_RATIO)),
            "clip_low_sum": (clipped_off_L & (ratio_L < 1)).float().sum(),
            "clip_high_sum": (clipped_off_L & (ratio_L > 1)).float().sum(),
            "log_ratio_abs_max": extreme(log_ratio_L.abs(), torch.max, 0.0),
        }
    return loss, stats


def mean_over_reply(x_L, reply_L):
    """For each token the mean of x over the tokens of its reply; reply_L: int64, equal for these alone."""
    _, reply_L, lengths_N = reply_L.unique(return_inverse=True, return_counts=True)
    mean_N = x_L.new_zeros(len(lengths_N)).index_add(0, reply_L, x_L) / lengths_N
    return mean_N.index_select(0, reply_L)


def extreme(x_L, function, empty):
    """function(x_L), torch.max or torch.min, or the number `empty` where there are no tokens."""
    return function(x_L) if len(x_L) else x_L.new_tensor(empty)


def sft_loss(logp_L, denominator):
    """Supervised fine-tuning: -Σ logp_L, in nats, over `denominator`, the reply tokens of the update."""
    assert denominator > 0, "an optimizer update without reply tokens"
    return -logp_L.sum() / denominator
