"""Policy and reward model in different processes: the same round as in one."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from r2m.config import R2M
from r2m.integrations import remote
from r2m.integrations.remote import Pools, RewardModel, pool_packed
from r2m.method.reward_model import R2MRewardModel
from r2m.method.updater import R2MUpdater
from r2m_kernels import merge_pools_with_gradient

EXAMPLES = Path(__file__).parents[2] / "examples"
LENGTHS = torch.tensor([5, 1, 9, 30, 2, 17, 8, 3])  # one sequence has a last position alone: no feedback
TEXTS = ["w1 w2"] * 8, [f"w{i + 3} w{i + 9}" for i in range(8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    runpy.run_path(str(EXAMPLES / "own_rloo.py"))["save_tiny_models"](folder)
    return folder


def reward_model(models, heads):
    torch.manual_seed(0)
    return R2MRewardModel.from_pretrained(
        models / "reward_model", policy=models / "policy", inner_width=32, num_heads=heads
    )


def hidden_states(seed):
    torch.manual_seed(seed)
    return [torch.randn(length, 64) for length in LENGTHS]


def padded(parts):
    hidden = pad_sequence(parts, batch_first=True)
    return hidden, torch.arange(hidden.shape[1]) < LENGTHS[:, None] - 1


@pytest.mark.parametrize("heads", [1, 2])
def test_pools_of_packed_sequences_make_the_round_of_the_updater(models, heads, tmp_path):
    local = reward_model(models, heads)
    local.save_pretrained(tmp_path / "r2m")
    settings, start = R2M(learning_rate=1e-2), copy.deepcopy(local)
    apart = RewardModel(tmp_path / "r2m", models / "policy", 4, 4, settings)
    updater = R2MUpdater(local, settings, total_steps=4, num_generations=4)
    sampled, refreshed = hidden_states(1), hidden_states(2)

    u, g = apart.begin_round(*TEXTS, 3)
    rewards = apart.score(pool_packed(u, g, torch.cat(sampled), LENGTHS))
    metrics = apart.step(pool_packed(u, g, torch.cat(refreshed), LENGTHS))

    updater.begin_round(local.embed(*TEXTS), 3)
    expected = updater.score(slice(None), *padded(sampled))
    updater.collect(slice(None), *padded(refreshed))
    assert metrics == pytest.approx(updater.step(expected), rel=1e-4)
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)
    for (name, ours), theirs, before in zip(
        apart.model.named_parameters(), local.parameters(), start.parameters(), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-3 * (theirs - before).norm(), name


def test_a_saved_reward_model_goes_on_as_if_it_had_not_stopped(models, tmp_path):
    reward_model(models, 1).save_pretrained(tmp_path / "r2m")

    def make():
        return RewardModel(tmp_path / "r2m", models / "policy", 2, 4, R2M(learning_rate=1e-2))

    def play(model, t):
        u, g = model.begin_round(*TEXTS, t)
        pools = pool_packed(u, g, torch.cat(hidden_states(t)), LENGTHS)
        model.score(pools)
        model.step(pools)

    whole, resumed = make(), make()
    play(whole, 1)
    whole.save(tmp_path / "saved")
    resumed.load(tmp_path / "saved")
    for model in (whole, resumed):
        play(model, 2)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(FileNotFoundError, match=r"without .*optimizer\.pt; expected one that was written with R2M"):
        resumed.load(tmp_path / "r2m")


@pytest.mark.parametrize("ranks", [2, 3])
def test_pools_of_slices_merge_to_those_of_the_whole(monkeypatch, ranks):
    torch.manual_seed(0)
    total, pool, made = int(LENGTHS.sum()), remote.attention_pool_with_gradient, []
    u, g, hidden = torch.randn(8, 16), torch.randn(16), torch.randn(total + -total % ranks, 16)
    hidden[total:] = torch.nan  # what fills up the last slice
    whole = pool_packed(u, g, hidden[:total], LENGTHS)
    # What `group` does among processes: tests/kernels/test_sharded_pool.py.
    monkeypatch.setattr(
        remote,
        "attention_pool_with_gradient",
        lambda *inputs, group, **options: made.append(pool(*inputs, **options)) or made[-1],
    )
    for rank, part in enumerate(hidden.chunk(ranks)):
        monkeypatch.setattr(remote.dist, "get_rank", lambda group, rank=rank: rank)
        pool_packed(u, g, part, LENGTHS, group="some ranks")
    merged = merge_pools_with_gradient(*map(torch.stack, zip(*made, strict=True)), g, scale=1.0)
    torch.testing.assert_close(Pools(*(t[::2] for t in merged)), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "generations", "message"),
    [
        ({"feedback": "head"}, 4, "r2m.feedback is 'head'; expected 'trained' or 'frozen'"),
        ({"source": "noise"}, 4, "r2m.source is 'noise'; expected 'policy'"),
        ({"positions": "response"}, 4, "r2m.positions is 'response'; expected 'all'"),
        ({"standardize": True}, 4, "r2m.standardize is True; expected False"),
        ({}, 1, "num_generations is 1; expected at least 2"),
    ],
)
def test_what_needs_more_than_pools_is_refused(settings, generations, message):
    with pytest.raises(ValueError, match=message):
        remote.check_settings(R2M(**settings), generations)
