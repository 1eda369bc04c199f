"""Sampling replies: key/value cache, decode attention, token sampling, `generate`; CLI to try a model.

In:  a model, prompts as token ids, one seed a prompt. Out: n rollouts a prompt, with the sampled ids and
the log-prob of each under the distribution it was drawn from. Ids go on to training as they are; text is
for the reward and people.

    token  ~ softmax(logits / temperature)          drawn by inverting its cumulative sum at u
    u      = hash(seed of the prompt, number of the sample, position in the reply) / 2^53

The noise is a pure function of those three numbers, so a reply depends neither on its batch mates nor on
their order. Each prompt is computed once for its n replies, and its keys and values are copied to their
rows. Rows are aligned at their last token, so that every row of a batch writes the same cache slot; a mask
hides what lies left of a prompt.

Axes: P prompts, T packed tokens, B rows being decoded, D width, H query heads, K key/value heads, E head
size, S cache slots, V vocabulary rows.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import load_hf, packed_attention

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number: 2^64 / golden ratio
PREFILL_TOKENS = 2**14  # prompt tokens computed at once: their MLP activations would fill the memory
FIRST_ROOM = 256  # slots for reply tokens before the cache has to grow
POLL_EVERY = 4  # tokens a row between two questions whether to stop


class Stopped(Exception):
    """`should_stop` said so: what was generated so far is dropped."""


@dataclass
class Rollout:
    """One sampled reply: `ids`, with the stop id where it `finished`, and each one's log-prob in nats."""

    prompt_ids: list
    ids: list = field(default_factory=list)
    logp: list = field(default_factory=list)
    finished: bool = False


def mix(x):
    """A bijective hash of int64 tensors: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


def fold(key, number):
    """The key that `number` leads to from `key`; both int64 tensors or numbers, broadcast."""
    return mix(key + GOLDEN * (torch.as_tensor(number) + 1))


def prompt_seeds(seed, step, first, count):
    """Seeds of prompts first … first + count - 1 of the global batch of one step: int64 [count]."""
    return fold(fold(fold(0, seed), step), torch.arange(first, first + count))


def uniform(key_B, position):
    """u in [0, 1), float64 [B], for one position of the reply of each row."""
    return ((fold(key_B, position) >> 11) & (2**53 - 1)).double() / 2**53


def sample_tokens(logits_BV, temperature, u_B, top_p=1.0):
    """Draw one token a row by inverse CDF. Returns (ids_B, logp_B).

    temperature 0 takes the most likely token. logp_B is the token's log-prob under the whole tempered
    softmax (at temperature 0: the plain one), in nats. 0 < top_p < 1 draws from the smallest set of tokens
    that holds that much probability (arXiv 1904.09751); its log-probs are not those of the truncated
    distribution: for inference only.
    """
    logp_BV = torch.log_softmax(logits_BV.float() / (temperature or 1.0), -1)
    if temperature == 0:
        ids_B1 = logp_BV.argmax(-1, keepdim=True)
    else:
        p_BV = logp_BV.exp()
        if top_p < 1:
            sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
            before_BV = sorted_BV.cumsum(-1) - sorted_BV
            p_BV = torch.zeros_like(p_BV).scatter(1, order_BV, sorted_BV.where(before_BV < top_p, 0.0))
        cdf_BV = p_BV.cumsum(-1, dtype=torch.float64)
        # right=True steps over tokens of probability zero, whose cdf equals their neighbour's.
        ids_B1 = torch.searchsorted(cdf_BV, u_B[:, None] * cdf_BV[:, -1:], right=True)
        ids_B1 = ids_B1.clamp_(max=logits_BV.shape[1] - 1)
    return ids_B1[:, 0], logp_BV.gather(1, ids_B1)[:, 0]


class Cache:
    """Keys and values of B rows: the tokens of row b are slots end - length_b … end - 1.

    A layer has one [B·K, E, S] tensor of keys and one [B·K, S, E] of values: in this order a batched product
    reads any run of slots without copying it. The first prefill makes them, in the model's dtype.
    """

    def __init__(self, lengths_B, room):
        self.lengths_B = lengths_B
        self.end = int(lengths_B.max())
        self.room = room
        self.keys, self.values, self.mask_B1S = [], [], None

    def prefill_attend(self, bounds, rows_of_prompt):
        """attend for packed prompts: causal, and copies each one's keys and values to its rows."""
        attend_packed = packed_attention(bounds)

        def attend(layer, q_THE, k_TKE, v_TKE):
            B, (_, K, E) = len(self.lengths_B), k_TKE.shape
            if layer == len(self.keys):
                self.keys.append(k_TKE.new_zeros(B * K, E, self.end + self.room))
                self.values.append(v_TKE.new_zeros(B * K, self.end + self.room, E))
            keys_BKES, values_BKSE = (x[layer].unflatten(0, (B, K)) for x in (self.keys, self.values))
            for start, stop, rows in zip(bounds, bounds[1:], rows_of_prompt, strict=False):
                slots = slice(self.end - (stop - start), self.end)
                keys_BKES[rows, :, :, slots] = k_TKE[start:stop].permute(1, 2, 0)
                values_BKSE[rows, :, slots] = v_TKE[start:stop].transpose(0, 1)
            return attend_packed(layer, q_THE, k_TKE, v_TKE)

        return attend

    def start_decoding(self):
        """Build the mask: 0 where a row has a token or will have one, -inf left of its prompt."""
        slots, K = self.keys[0].shape[2], self.keys[0].shape[0] // len(self.lengths_B)
        empty_BS = torch.arange(slots) < (self.end - self.lengths_B)[:, None]
        mask_BS = torch.where(empty_BS, -torch.inf, 0.0)
        self.mask_B1S = mask_BS.repeat_interleave(K, 0)[:, None].to(self.keys[0])

    def attend(self, layer, q_BHE, k_BKE, v_BKE):
        """attend for one new token a row, which becomes slot `end - 1`; `advance` made room for it."""
        (B, H, E), K = q_BHE.shape, k_BKE.shape[1]
        keys, values, end = self.keys[layer], self.values[layer], self.end
        keys[:, :, end - 1] = k_BKE.reshape(B * K, E)
        values[:, end - 1] = v_BKE.reshape(B * K, E)
        # The H/K query heads of a key/value head are rows of one product: keys and values are read once.
        q = q_BHE.reshape(B * K, H // K, E)
        scores = torch.baddbmm(self.mask_B1S[:, :, :end], q, keys[:, :, :end], alpha=E**-0.5)
        return torch.bmm(scores.softmax(-1).to(values.dtype), values[:, :end]).view(B, H, E)

    def advance(self):
        """Make room for the next token of every row; more slots, by half, when they run out."""
        self.end += 1
        self.lengths_B = self.lengths_B + 1
        slots = self.mask_B1S.shape[2]
        if self.end > slots:
            more = slots // 2 + 1
            for layer in range(len(self.keys)):
                self.keys[layer] = F.pad(self.keys[layer], (0, more))
                self.values[layer] = F.pad(self.values[layer], (0, 0, 0, more))
            self.mask_B1S = F.pad(self.mask_B1S, (0, more))

    def keep(self, rows):
        """Drop all rows but these, and the slots left of the longest of them."""
        K = self.keys[0].shape[0] // len(self.lengths_B)
        heads = (rows[:, None] * K + torch.arange(K)).flatten().to(self.mask_B1S.device)
        self.lengths_B = self.lengths_B[rows]
        left = self.end - int(self.lengths_B.max())
        self.end -= left
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer][heads, :, left:]
            self.values[layer] = self.values[layer][heads, left:]
        self.mask_B1S = self.mask_B1S[heads, :, left:]


# Generation.


@torch.no_grad()
def generate(model, prompts, n, *, max_new_tokens, temperature, stop_ids, seeds_P, top_p=1.0, vocab_size=None,
             batch_size=256, progress=None, on_token=None, should_stop=None):
    """Sample n replies to each prompt: len(prompts)·n rollouts, prompt-major.

    prompts: lists of ids; max_new_tokens: tokens a reply, the stop id included; temperature: 0 is greedy;
    stop_ids: ids that end a reply; seeds_P: one integer a prompt; top_p: for inference only (see
    `sample_tokens`); vocab_size: ids that have a token, others are never drawn; batch_size: rows decoded at
    once; progress: the name of a progress bar, shown on a terminal; on_token(i, id): called for every token
    of rollout i; should_stop(): asked every few tokens, `Stopped` is raised where it is true. ValueError
    where a setting is out of range, a prompt is empty, leaves no room for a reply or holds an id that the
    model does not have.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}: they "
                         "must be at least 1, at least 0, and above 0 but at most 1")
    limit, ids = model.config.max_position_embeddings, model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit - max_new_tokens:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} the "
                             f"model's {limit} positions leave room for 1 to {limit - max_new_tokens}")
        if max(prompt) >= ids:
            raise ValueError(f"prompt {i} holds id {max(prompt)}, but the model's last is {ids - 1}; is this "
                             "the model's own tokenizer?")
    assert len(seeds_P) == len(prompts), f"{len(seeds_P)} seeds for {len(prompts)} prompts"
    rollouts = [Rollout(prompt) for prompt in prompts for _ in range(n)]
    key_N = fold(torch.as_tensor(seeds_P, dtype=torch.int64)[:, None], torch.arange(n)).flatten()
    # Prompts of like length share a batch, so that few slots are empty.
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt_ids))
    disable = None if progress else True  # None: shown on a terminal only
    with tqdm(total=len(rollouts), desc=progress, disable=disable, leave=False, unit="reply") as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            decode_batch(model, rollouts, rows, n, key_N[rows], max_new_tokens=max_new_tokens,
                         temperature=temperature, stop_ids=frozenset(stop_ids), top_p=top_p,
                         vocab_size=vocab_size, bar=bar, on_token=on_token, should_stop=should_stop)
    return rollouts


def prefill(model, rollouts, rows, n, room):
    """Compute each prompt of these rows once. Returns (hidden_BD of the last prompt tokens, their Cache)."""
    device = model.embed_tokens.weight.device
    # The rows of a prompt are neighbours, and prompts come in the order of their length.
    rows_of_prompt = [list(group) for _, group in groupby(range(len(rows)), lambda b: rows[b] // n)]
    cache = Cache(torch.tensor([len(rollouts[row].prompt_ids) for row in rows]), room)
    at_once = max(1, PREFILL_TOKENS // cache.end)
    hidden = []
    for first in range(0, len(rows_of_prompt), at_once):
        part = rows_of_prompt[first:first + at_once]
        prompts = [rollouts[rows[its_rows[0]]].prompt_ids for its_rows in part]
        bounds = [0, *accumulate(map(len, prompts))]
        tokens_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions_T = torch.cat([torch.arange(len(prompt), device=device) for prompt in prompts])
        hidden_TD = model(tokens_T, positions_T, cache.prefill_attend(bounds, part))
        hidden += [hidden_TD[end - 1].expand(len(its), -1) for end, its in zip(bounds[1:], part, strict=True)]
    cache.start_decoding()
    return torch.cat(hidden), cache


def decode_batch(model, rollouts, rows, n, key_B, *, max_new_tokens, temperature, stop_ids, top_p, vocab_size,
                 bar, on_token, should_stop):
    """Fill `rollouts[row]` for every row of one batch: prefill, then a token a row until all have ended."""
    weight_VD = model.head_weight()[:vocab_size]
    hidden_BD, cache = prefill(model, rollouts, rows, n, room=min(max_new_tokens, FIRST_ROOM))
    device = hidden_BD.device
    for position in range(max_new_tokens):
        if should_stop and position % POLL_EVERY == 0 and should_stop():
            raise Stopped
        u_B = uniform(key_B, position).to(device)
        ids_B, logp_B = sample_tokens(hidden_BD @ weight_VD.T, temperature, u_B, top_p)
        alive = []
        for b, (row, token, logp) in enumerate(zip(rows, ids_B.tolist(), logp_B.tolist(), strict=True)):
            rollout = rollouts[row]
            if rollout.finished:
                continue
            rollout.ids.append(token)
            rollout.logp.append(logp)
            rollout.finished = token in stop_ids
            if on_token:
                on_token(row, token)
            if rollout.finished or position == max_new_tokens - 1:
                bar.update()
            else:
                alive.append(b)
        if not alive:
            break
        # Dropping rows copies the cache, so it waits until a quarter of them have ended.
        if len(alive) <= 0.75 * len(rows):
            keep_B = torch.tensor(alive)
            cache.keep(keep_B)
            rows, key_B, ids_B = [rows[b] for b in alive], key_B[keep_B], ids_B[keep_B.to(device)]
        cache.advance()
        hidden_BD = model(ids_B, (cache.lengths_B - 1).to(device), cache.attend)


# Command line.


def main(argv=None):
    from data import Chat, Example
    from reward import parse_reply

    parser = argparse.ArgumentParser(description="Ask a model: streams its reply, prints the tool calls.")
    parser.add_argument("model", help="folder in the Hugging Face layout, or a hub name")
    parser.add_argument("query", help="what the user says")
    parser.add_argument("--tools", required=True, help="JSON file: a list of tool schemas")
    parser.add_argument("--system_prompt", help="text file with {tools}; default: the project's own wording")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        tools = read_tools(args.tools)
        chat = Chat(args.model, args.system_prompt)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_hf(args.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
        example = Example("query", "query", tools, [{"role": "user", "content": args.query}], [])
        shown, ids = "", []

        def show(row, token):
            nonlocal shown
            ids.append(token)
            text = chat.decode([i for i in ids if i not in chat.stop_ids])
            # Half a character decodes to U+FFFD: wait for the rest of it.
            if not text.endswith("\ufffd"):
                print(text[len(shown):], end="", flush=True)
                shown = text

        rollout, = generate(model, [chat.encode_prompt(example)], 1, max_new_tokens=args.max_new_tokens,
                            temperature=args.temperature, stop_ids=chat.stop_ids, top_p=args.top_p,
                            vocab_size=chat.vocab_size, seeds_P=prompt_seeds(args.seed, 0, 0, 1),
                            on_token=show)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print()
    if not rollout.finished:
        print(f"(cut off after {args.max_new_tokens} tokens)")
    calls, error = parse_reply(chat.decode(rollout.ids))
    if calls is None:
        print(f"no calls: {error}")
    for call in calls or []:
        print(f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})")


def read_tools(path):
    """The list of tool schemas in a JSON file; ValueError where it is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            tools = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable JSON ({error})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and "name" in tool for tool in tools):
        raise ValueError(f'{path}: expected a JSON list of tool schemas, each an object with a "name"')
    return tools


if __name__ == "__main__":
    main()
