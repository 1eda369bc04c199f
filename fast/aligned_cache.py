"""Equals sample.Cache: prompts read once and rows aligned at their last tokens, which is fast on a CPU.

The last tokens of all rows share one column of the cache, `end` - 1: a step writes one column, attention
multiplies one run of columns as it is, and a mask hides what lies left of a shorter row. The columns start
few and grow, because most replies end long before their limit. A prompt with several replies is kept apart,
once: the queries of all its running replies are rows of one product (Hydragen, arXiv 2402.05099). The result
o counts as one more token of each reply, with value o and, as its score, the log-sum-exp of the prompt's
scores. Its column is `end`, where nothing is written yet.

Axes: B rows being decoded, P prompts of these rows, H query heads, K key/value heads, Q query heads of one
key/value head, J = B·K, E head size, S columns of the cache, T positions of a shared prompt.
"""

from collections import Counter

import torch
import torch.nn.functional as F

FIRST_ROOM = 256  # tokens of a reply that fit before the cache has to grow
WORTH_SHARING = 2**13  # numbers of keys a row and layer; sharing that saves fewer costs more than it saves
PART = 8  # prompts, in the order in which they started, the shorter ones first, that are padded together
HIDDEN = torch.tensor(-1e30)  # is added to a score, whose weight is then zero
# SDPA's kernel on a CPU; SDPA itself does not return the log-sum-exp.
prompt_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def shared_prompts(slots, prompts, rows, size):
    """How many prompts are kept apart, 0 where that saves too little. size: numbers of a prompt's keys."""
    saved = slots - max(1, slots * prompts // rows)  # times that a prompt is not read in a step
    return min(slots, prompts) if saved * size >= slots * WORTH_SHARING else 0


class Cache:
    """keys: [layer, slot, K, E, S], values: [layer, slot, K, S, E], as batched products read them; shared:
    [layer, 2, prompt, T, K, E], keys and values of `prompts`, or None; users: running rows of each of these.
    Takes the memory that its rows need, so `memory_gib` must be None; `steps` and `kernel` change nothing."""

    def __init__(self, config, dtype, device, slots, rows, limit, steps, memory_gib, kernel):
        assert memory_gib is None, "a bound on memory needs pages"
        layers, K, E = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        dtype = torch.promote_types(dtype, torch.float32)  # batched products of few rows are slower in bf16
        prompts, longest = len({row.prompt for row in rows}), len(rows[-1].prompt.ids)
        room = min(limit + 1 - longest, FIRST_ROOM)
        self.slots, self.heads, self.prompts, self.users = slots, config.num_attention_heads, [], Counter()
        self.shared = self.arrangement = None
        if apart := shared_prompts(slots, prompts, len(rows), longest * K * E):
            self.shared = torch.zeros(layers, 2, apart, longest, K, E, dtype=dtype, device=device)
            longest, room = 0, room + 1
        self.end = self.longest_start = longest  # the most columns that a row starts with
        self.keys = torch.zeros(layers, slots, K, E, longest + room, dtype=dtype, device=device)
        self.values = torch.zeros(layers, slots, K, longest + room, E, dtype=dtype, device=device)

    def admit(self, row, running):
        return True

    def place(self, row, slot):
        kv, self.arrangement = row.prompt.kv, None
        if self.shared is None:
            held = slice(self.end - row.cached(), self.end)
            self.keys[:, slot, :, :, held] = kv[:, 0].permute(0, 2, 3, 1)
            self.values[:, slot, :, held] = kv[:, 1].transpose(1, 2)
        elif row.prompt not in self.prompts:
            self.shared[:, :, len(self.prompts), :kv.shape[2]] = kv
            self.prompts.append(row.prompt)
        self.users[row.prompt] += 1

    def drop_prompts(self, prompts):
        for prompt in prompts:
            prompt.kv = None

    def reserve(self, rows, steps):
        self.arrangement = self.arrangement or self.arrange(rows)
        if self.end + steps + (self.shared is not None) > self.keys.shape[4]:
            # Columns left of the longest row are cut off, unless a row may start with them.
            columns = [row.cached() - apart for row, apart in zip(rows, self.arrangement[0], strict=True)]
            left = self.end - max(self.longest_start, *columns)
            more, self.end = self.keys.shape[4] // 2 + steps, self.end - left
            self.keys = F.pad(self.keys, (-left, more))
            self.values = F.pad(self.values, (0, 0, -left, more))
        return None

    def arrange(self, rows):
        """Where queries of rows[i] in slot i meet their shared prompts, until another row starts or ends: the
        tokens of each row that are kept apart; `to`, queries of [B·H] in the order [P, row, Q, K], the first
        row again where a prompt has fewer than others; `back`, a place there of each query; and of every few
        prompts, padded to the longest, (places, keys and values [layer, 2, P, K, T, E], mask)."""
        if self.shared is None:
            return [0] * len(rows), None, None, None
        H, K, parts, slots_P = self.heads, self.keys.shape[2], [], {prompt: [] for prompt in self.prompts}
        for slot, row in enumerate(rows):
            slots_P[row.prompt].append(slot)
        most = max(map(len, slots_P.values()))
        slot_PG = torch.tensor([slots + slots[:1] * (most - len(slots)) for slots in slots_P.values()])
        to = (slot_PG[:, :, None, None] * H + torch.arange(H).view(K, H // K).T).flatten()
        back = torch.empty(len(rows) * H, dtype=torch.int64).scatter_(0, to, torch.arange(len(to)))
        for place_P in torch.arange(len(slots_P)).split(PART):
            places = slice(int(place_P[0]), int(place_P[-1]) + 1)
            length_P = torch.tensor([len(prompt.ids) - 1 for prompt in self.prompts[places]])
            T = max(1, int(length_P.max()))
            mask_PT = ((torch.arange(T) >= length_P[:, None]) * HIDDEN).to(self.shared.dtype)
            parts.append((places, self.shared[:, :, places, :T].transpose(3, 4), mask_PT[:, None, None]))
        return [len(row.prompt.ids) - 1 for row in rows], to, back, parts

    def attend(self, position_B):
        apart_B, to, back, parts = self.arrangement
        B, start_B, last = len(position_B), self.end - position_B + torch.tensor(apart_B), self.end
        self.end += 1
        visible, mask_J1S = slice(int(start_B.min()), self.end + (parts is not None)), None
        if visible.start < start_B.max():
            mask_BS = (torch.arange(visible.start, visible.stop) < start_B[:, None]) * HIDDEN
            mask_J1S = mask_BS.to(self.keys.dtype).repeat_interleave(self.keys.shape[2], 0)[:, None]

        @torch.autocast("cpu", enabled=False)
        def attend(layer, q_BHE, k_BKE, v_BKE):
            (H, E), K, q_BHE = q_BHE.shape[1:], k_BKE.shape[1], q_BHE.to(self.keys.dtype)
            keys_BKES, values_BKSE = self.keys[layer, :B], self.values[layer, :B]
            keys_BKES[..., last], values_BKSE[:, :, last] = k_BKE, v_BKE
            # The query heads of a key/value head are rows of one product: keys and values are read once.
            q_JQE, keys_JES = (q_BHE * E**-0.5).view(B * K, H // K, E), keys_BKES.flatten(0, 1)[..., visible]
            scores_JQS = q_JQE.bmm(keys_JES) if mask_J1S is None else torch.baddbmm(mask_J1S, q_JQE, keys_JES)
            if parts is not None:
                q_PKRE = q_BHE.reshape(B * H, E)[to].view(len(self.prompts), -1, K, E).transpose(1, 2)
                o_lse = zip(*(prompt_attention(q_PKRE[places], *kv[layer], attn_mask=mask_P11T)
                              for places, kv, mask_P11T in parts), strict=True)
                o_PRKE, lse_PRK = (torch.cat([x.transpose(1, 2) for x in each]) for each in o_lse)
                scores_JQS[..., -1] = lse_PRK.flatten()[back].view(B * K, H // K)
            weights_JQS = scores_JQS.softmax(-1)
            o_BHE = torch.bmm(weights_JQS, values_BKSE.flatten(0, 1)[:, visible]).view(B, H, E)
            if parts is not None:
                o_BHE.addcmul_(weights_JQS[..., -1].reshape(B, H, 1), o_PRKE.view(-1, E)[back].view(B, H, E))
            return o_BHE.to(k_BKE.dtype)

        return attend

    def release(self, row):
        self.arrangement = None
        self.users[row.prompt] -= 1
        if self.shared is not None and not self.users[row.prompt]:  # the last prompt takes the free place
            place, last = self.prompts.index(row.prompt), self.prompts.pop()
            if last is not row.prompt:
                self.prompts[place] = last
                self.shared[:, :, place] = self.shared[:, :, len(self.prompts)]

    def move(self, source, target):
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def close(self):
        self.keys = self.values = self.shared = self.arrangement = None
