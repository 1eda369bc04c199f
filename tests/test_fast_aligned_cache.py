"""fast/aligned_cache.py: a cache that starts small and grows gives the same replies, in no more memory."""

import pytest
import sampling
import torch
from sampling import assert_same, draw, ragged_prompts, toy_model

from fast import aligned_cache

sampled = sampling.sampled


@pytest.mark.parametrize("room", [0, 1, 10])
def test_a_cache_that_has_to_grow_gives_the_same_replies(sampled, monkeypatch, room):
    model, prompts, settings, wanted = sampled
    monkeypatch.setattr(aligned_cache, "FIRST_ROOM", room)
    assert_same(draw(model, prompts, 5, **settings), wanted)


def test_it_has_room_for_the_longest_prompt_and_the_first_tokens_of_a_reply():
    config, device = toy_model().config, torch.device("cpu")
    for most, room in ((5, 5), (1000, aligned_cache.FIRST_ROOM)):
        cache = aligned_cache.Cache(config, torch.float32, device, 3, 20, 20 + most - 1, 1, None, "cpu")
        assert cache.keys.shape == (2, 3, 2, 8, 20 + room) and cache.values.shape == (2, 3, 2, 20 + room, 8)


def test_columns_that_no_row_needs_are_cut_off_as_it_grows(sampled, monkeypatch):
    """Memory follows the longest row, not all tokens that were ever decoded."""
    monkeypatch.setattr(aligned_cache, "FIRST_ROOM", 8)
    widths, reserve = [], aligned_cache.Cache.reserve

    def watching(cache, rows, steps):
        row = reserve(cache, rows, steps)
        widths.append(cache.keys.shape[4])
        return row

    monkeypatch.setattr(aligned_cache.Cache, "reserve", watching)
    draw(sampled[0], ragged_prompts(40, 10), 2, max_new_tokens=12, batch_size=8)
    # A row holds at most 10 + 12 - 1 tokens; to grow adds half of the width and 1.
    assert len(widths) > 100 and max(widths) <= 2 * 21 + 2
