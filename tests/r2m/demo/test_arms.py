"""Pairs and reward models of the demo's arms, on a tiny model."""

import numpy as np
import pytest
import torch

from r2m.demo import arms, gold, start
from r2m.demo.arms import ARMS, Group
from tests.r2m.demo.world import CHANGED, small_world


@pytest.fixture
def world(tmp_path, monkeypatch):
    return small_world(tmp_path, monkeypatch)


def test_arms_differ_in_their_rewards_alone(world, tmp_path):
    group = Group(ARMS, world, tmp_path, seed=3, pairs=8, overrides=CHANGED)
    for t in (1, 2):
        group.round(t)
    record = {name: member.record for name, member in group.members.items()}
    assert list(record) == ["fixed", "labels", "r2m"]
    assert all(of_arm[0]["texts"] == record["fixed"][0]["texts"] for of_arm in record.values())
    fixed, labels, r2m = ([of_round["reward"] for of_round in of_arm] for of_arm in record.values())
    assert labels[0] == fixed[0] and labels[1] != fixed[1]  # it has learned after the first round
    assert r2m[0] != fixed[0]  # it reads the policy
    assert record["fixed"][0]["proxy"] == fixed[0] == record["r2m"][0]["proxy"]
    assert record["labels"][0]["row"]["labels/given"] == arms.LABELS * 2 == 12


def test_pairs_are_disjoint_and_labelled_by_gold(world):
    clean, flipped = (start.draw_pairs(world, 12, 5, share) for share in (0.0, 0.5))
    worth = gold.gold(world.standard(world.train.parts, gold.CLIP_OF_LABELS))
    assert all(worth[a] >= worth[b] for a, b in zip(*clean, strict=True))
    assert len({*clean.chosen, *clean.rejected}) == 24
    assert {*map(frozenset, zip(*clean, strict=True))} == {*map(frozenset, zip(*flipped, strict=True))}
    assert 0 < sum(a != b for a, b in zip(clean.chosen, flipped.chosen, strict=True)) < 12
    assert start.draw_pairs(world, 5, 5, 0.5).chosen == flipped.chosen[:5]
    with pytest.raises(ValueError, match="count is 100; expected at most"):
        start.draw_pairs(world, 100, 5, 0.0)


@pytest.mark.parametrize("reads_states", [False, True])
def test_rewards_of_start_samples_have_deviation_one_inside_prompts(world, reads_states):
    pairs = start.draw_pairs(world, 12, 5, 0.0)
    model = start.fit(world, pairs, backbone="same", reads_states=reads_states, floor=0.6).model
    samples = world.train
    parts = [start.feedback(samples, [i], "same") for i in range(len(samples.texts))]
    rewards = torch.cat([
        model.score(part.rte, part.hidden[None], weight=0.6) if reads_states else model.vanilla_score(part.rte)
        for part in parts
    ])  # fmt: skip
    assert rewards.view(-1, start.SAMPLES).var(1).mean().sqrt().item() == pytest.approx(1, rel=1e-3)
    assert rewards.mean().item() == pytest.approx(0, abs=1e-3)


def test_start_means_are_those_of_a_prompt_s_samples(world):
    parts = world.standard(world.train.parts).reshape(12, start.SAMPLES, 3)
    np.testing.assert_allclose(world.start_means[:, 1:], parts.mean(1))
    np.testing.assert_allclose(world.start_means[:, 0], parts.sum(-1).mean(1) / 3**0.5)
