"""Which sequences share a pass: all of them run once, in passes that fit, and little of it is padding."""

import random
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.round import review_length
from r2m.batching import Tokens, computed, cut, longest_first

SIZES = st.one_of(st.integers(1, 9), st.integers(1, 300).map(Tokens))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=24), SIZES, st.integers(1, 4))
def test_every_sequence_runs_once_in_passes_that_fit(lengths, size, group):
    lengths = lengths * group  # so that they come out even
    order = longest_first(lengths, group)
    micro_batches = cut([lengths[i] for i in order], size, group)
    rows = [[order[i] for i in chain(*parts)] for parts in micro_batches]
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    for parts, taken in zip(micro_batches, rows, strict=True):
        groups = {row // group for row in taken}
        assert len(taken) == len(groups) * group
        tokens = computed([lengths[i] for i in order], parts)
        if isinstance(size, int):
            assert len(parts) == -(-len(taken) // size)
            assert len(groups) == 1 or len(taken) <= size
        else:
            assert len(groups) == 1 or tokens <= size.number
        if group == 1:
            assert len(parts) == 1


def test_a_pass_ends_where_padding_would_exceed_its_share_or_tokens_the_budget():
    lengths = [300, 300, 290, 288, 100, 100, *[90] * 30]
    parts = [[lengths[i] for i in part] for (part,) in cut(lengths, Tokens(1920))]
    assert parts == [[300, 300, 290, 288], [100, 100, 90, 90, 90], [90] * 21, [90] * 6]


def reviews(n, responses, seed=0):
    """Lengths as the benchmark draws them, at 512 + 512 tokens."""
    rng = random.Random(seed)
    return [
        prompt + review_length(rng, 512)
        for prompt in [review_length(rng, 512) for _ in range(n)]
        for _ in range(responses)
    ]


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("budget", [8192, 16384])
def test_lengths_of_reviews_take_at_most_115_percent_of_their_tokens(n, group, budget):
    lengths = reviews(n, 8)
    assert max(lengths) > 1.9 * sum(lengths) / len(lengths)
    bounds = [lengths[i] for i in longest_first(lengths, group)]
    tokens = sum(computed(bounds, parts) for parts in cut(bounds, Tokens(budget), group))
    assert tokens <= 1.15 * sum(lengths)
