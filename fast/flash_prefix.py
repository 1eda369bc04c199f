"""Equals model.shared_prefix_attention: FlashAttention, over a prompt's keys gathered once for each reply."""

import functools
import inspect
import itertools
from typing import NamedTuple

import torch


def shared_prefix_attention(groups):
    """attend: as two calls of FlashAttention over sequences of many lengths.

    The first takes the prompts, each over itself; the second takes each reply over [its prompt; itself], so a
    prompt's keys are gathered once for every reply. Two calls and not one, because a call launches as many
    blocks for each sequence as its longest one needs.
    """
    @functools.cache  # once for all layers
    def calls(device):
        """[(queries, keys)] of the calls, and the place in their outputs of each of the T tokens."""
        prompts, replies, keys, end = [], [], [], 0
        for P, lengths in groups:
            prompts.append(torch.arange(end, end + P))
            end += P
            for R in lengths:
                replies.append(torch.arange(end, end + R))
                keys.append(torch.cat((prompts[-1], replies[-1])))
                end += R
        pairs = [(prompts, prompts), (replies, keys)] if replies else [(prompts, prompts)]
        place_T = torch.cat(prompts + replies).argsort().to(device)
        return [(Runs.of(queries, device), Runs.of(keys, device)) for queries, keys in pairs], place_T

    def attend(layer, q_THE, k_TKE, v_TKE):
        pairs, place_T = calls(q_THE.device)
        return torch.cat([varlen_causal(q_THE, k_TKE, v_TKE, *pair) for pair in pairs])[place_T]

    return attend


class Runs(NamedTuple):
    """Sequences of tokens of a pack: the index of each token, int32 boundaries, tokens of the longest."""

    index: torch.Tensor
    bounds: torch.Tensor
    longest: int

    @classmethod
    def of(cls, parts, device):
        lengths = [len(part) for part in parts]
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(torch.cat(parts).to(device), bounds, max(lengths))


def varlen_causal(q_THE, k_TKE, v_TKE, queries, keys):
    """FlashAttention of each run of queries over its run of keys, where the last query sees the last key."""
    from torch.nn.attention.varlen import varlen_attn  # takes a second to import
    # Plain indexing: its gradient adds up the copies of a prompt in a fixed order.
    q, k, v = q_THE[queries.index], k_TKE[keys.index], v_TKE[keys.index]
    grouped = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
        share, grouped = q.shape[1] // k.shape[1], {}
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    # The window, any key before and none after, is counted from the last query and the last key.
    return varlen_attn(q, k, v, queries.bounds, keys.bounds, queries.longest, keys.longest,
                       window_size=(-1, 0), **grouped)
