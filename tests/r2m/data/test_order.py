"""What a round takes, and in which order, follows from the seed and the round."""

import pytest

from r2m.data.order import minibatch_order, prompts_of_round


def test_every_epoch_has_an_order_of_its_own_that_nothing_before_decides():
    orders = [minibatch_order(8, seed, t, epoch) for seed in (0, 1) for t in (1, 2) for epoch in (1, 2)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert orders == [minibatch_order(8, seed, t, epoch) for seed in (0, 1) for t in (1, 2) for epoch in (1, 2)]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_rounds_pass_over_all_prompts_again_and_again(count):
    picked = [i for t in range(1, 11) for i in prompts_of_round(5, count, 3, t)]
    passes = [picked[start : start + 5] for start in range(0, 10 * count - 4, 5)]
    assert all(sorted(one) == list(range(5)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
