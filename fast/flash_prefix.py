"""Equals model.shared_prefix_attention: two calls of FlashAttention over sequences of different lengths.

The first call takes the prompts, each over itself. The second takes each reply over [its prompt; itself], for
which a prompt's keys are copied. A single call would launch for each sequence the blocks of the longest one.

Axes: T packed tokens, H query heads, K key/value heads, E head size.
"""

import functools
import inspect
import itertools
from typing import NamedTuple

import torch


def shared_prefix_attention(groups):
    """attend(layer, q_THE, k_TKE, v_TKE) -> o_THE for bf16 or fp16 on a GPU, at least one token. groups: for
    each group (prompt length, [reply lengths]) in tokens, in the order of the pack."""
    @functools.cache  # once for all layers
    def calls(device):
        """([(queries, keys)] of the calls, index of each of the T tokens in their concatenated outputs)."""
        prompts, replies, keys, end = [], [], [], 0
        for prompt_length, reply_lengths in groups:
            prompts.append(torch.arange(end, end + prompt_length))
            end += prompt_length
            for length in reply_lengths:
                replies.append(torch.arange(end, end + length))
                keys.append(torch.cat((prompts[-1], replies[-1])))
                end += length
        pairs = [(prompts, prompts), (replies, keys)] if replies else [(prompts, prompts)]
        index_T = torch.cat(prompts + replies).argsort().to(device)
        return [(Runs.of(queries, device), Runs.of(keys, device)) for queries, keys in pairs], index_T

    def attend(layer, q_THE, k_TKE, v_TKE):
        pairs, index_T = calls(q_THE.device)
        return torch.cat([varlen_causal(q_THE, k_TKE, v_TKE, *pair) for pair in pairs])[index_T]

    return attend


class Runs(NamedTuple):
    """Sequences cut out of a pack: index of each token in it, int32 boundaries, tokens of the longest one."""

    index: torch.Tensor
    bounds: torch.Tensor
    longest: int

    @classmethod
    def of(cls, parts, device):
        lengths = [len(part) for part in parts]
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(torch.cat(parts).to(device), bounds, max(lengths))


@functools.cache  # a signature takes as long as a launch, and this is asked twice a layer
def shares_key_heads(varlen_attn):
    """Whether it lets query heads share a key head; that of torch 2.11 does not."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_causal(q_THE, k_TKE, v_TKE, queries, keys):
    """FlashAttention of each run of queries over its run of keys, where the last query sees the last key."""
    from torch.nn.attention.varlen import varlen_attn  # takes a second to import
    # Plain indexing: its gradient adds up the copies of a prompt in a fixed order.
    q, k, v = q_THE[queries.index], k_TKE[keys.index], v_TKE[keys.index]
    grouped = {"enable_gqa": True}
    if not shares_key_heads(varlen_attn):
        repeats, grouped = q.shape[1] // k.shape[1], {}
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    # The window (any key before, none after) is counted from the last query and the last key.
    return varlen_attn(q, k, v, queries.bounds, keys.bounds, queries.longest, keys.longest,
                       window_size=(-1, 0), **grouped)
