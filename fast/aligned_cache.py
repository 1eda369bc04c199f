"""Equals sample.Cache: rows aligned at their last tokens, which is fast on a CPU.

The last tokens of all rows share one position of the cache, `end` - 1. So a step writes one column, attention
multiplies one run of columns as it is, and a mask hides what lies left of a shorter row. The cache starts
small and grows, because most replies end long before their limit.

Axes: B rows being decoded, H query heads, K key/value heads, Q query heads of one key/value head, J = B·K,
E head size, S positions of a cache slot.
"""

import torch
import torch.nn.functional as F

FIRST_ROOM = 256  # tokens of a reply that fit before the cache has to grow


class Cache:
    """keys: [layer, slot, K, E, S], values: [layer, slot, K, S, E], as batched products read them. Takes the
    memory that its rows need, so `memory_gib` must be None; `steps` and `kernel` change nothing."""

    def __init__(self, config, dtype, device, slots, longest_prompt, limit, steps, memory_gib, kernel):
        assert memory_gib is None, "a bound on memory needs pages"
        layers, K, E = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.slots, self.end, self.longest_prompt = slots, longest_prompt, longest_prompt
        S = longest_prompt + min(limit + 1 - longest_prompt, FIRST_ROOM)
        self.keys = torch.zeros(layers, slots, K, E, S, dtype=dtype, device=device)
        self.values = torch.zeros(layers, slots, K, S, E, dtype=dtype, device=device)

    def admit(self, row, running):
        return True

    def place(self, row, slot):
        held = slice(self.end - row.cached(), self.end)
        self.keys[:, slot, :, :, held] = row.prompt.kv[:, 0].permute(0, 2, 3, 1)
        self.values[:, slot, :, held] = row.prompt.kv[:, 1].transpose(1, 2)

    def drop_prompts(self, prompts):
        for prompt in prompts:
            prompt.kv = None

    def reserve(self, rows, steps):
        if self.end + steps > self.keys.shape[4]:
            # Columns left of the longest row are cut off, unless the longest prompt may need them.
            left = self.end - max(self.longest_prompt, *(row.cached() for row in rows))
            more, self.end = self.keys.shape[4] // 2 + steps, self.end - left
            self.keys = F.pad(self.keys, (-left, more))
            self.values = F.pad(self.values, (0, 0, -left, more))
        return None

    def attend(self, position_B):
        B, start_B = len(position_B), self.end - position_B
        self.end += 1
        visible = slice(int(start_B.min()), self.end)
        mask_BS = (torch.arange(visible.start, visible.stop) < start_B[:, None]) * torch.tensor(-1e30)
        mask_J1S = mask_BS.to(self.keys.dtype).repeat_interleave(self.keys.shape[2], 0)[:, None]

        def attend(layer, q_BHE, k_BKE, v_BKE):
            (H, E), K = q_BHE.shape[1:], k_BKE.shape[1]
            keys_BKES, values_BKSE = self.keys[layer, :B], self.values[layer, :B]
            keys_BKES[..., visible.stop - 1], values_BKSE[:, :, visible.stop - 1] = k_BKE, v_BKE
            # The query heads of a key/value head are rows of one product: keys and values are read once.
            q_JQE, keys_JES = q_BHE.reshape(B * K, H // K, E), keys_BKES.flatten(0, 1)
            scores_JQS = torch.baddbmm(mask_J1S, q_JQE, keys_JES[..., visible], alpha=E**-0.5)
            values_JSE = values_BKSE.flatten(0, 1)[:, visible]
            return torch.bmm(scores_JQS.softmax(-1).to(values_JSE.dtype), values_JSE).view(B, H, E)

        return attend

    def release(self, row):
        pass

    def move(self, source, target):
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def close(self):
        self.keys = self.values = None
