"""The optional features of benchmarks/science, against the same rounds written out."""

import itertools

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_trainer import PAIRS, PROMPTS, K, N, hidden_states, make_config, small_policy

from benchmarks.science import optional
from benchmarks.science.optional import AgreementGate, HumanReplay
from r2m import R2MTrainer
from r2m.fitting.pairs import embed_pairs, tokenize_pairs
from r2m_kernels import time_weight
from r2m_kernels.grebt import reference as grebt_reference


@pytest.fixture
def make(reward_checkpoint, tmp_path):
    numbers = itertools.count()

    def build(trainer, *, config=None, **settings):
        policy = small_policy()
        config = make_config(tmp_path / f"run-{next(numbers)}", rounds=3, learning_rate=1e-2, **(config or {}))
        return trainer(
            policy, tiny.reward_model(reward_checkpoint, policy), tiny.tokenizer(), PROMPTS, config, **settings
        )

    return build


def until_aligned(trainer, t):
    """Round t but for the update of the reward model: its samples, its annotations and its metrics."""
    row: dict = {}
    rollout = trainer.sample(t)
    batch = tiny.apart(trainer).annotate(rollout, t, row)
    trainer.optimize_policy(rollout, batch, t, row)
    return rollout, batch, row


def weights(trainer):
    return [p.detach().clone() for p in trainer.reward_model.parameters()]


def test_human_replay_adds_bradley_terry_on_pairs_at_the_rounds_weight(make, monkeypatch):
    monkeypatch.setattr(optional, "REPLAYED_PAIRS", 2)
    monkeypatch.setattr(optional, "REPLAY_WEIGHT", 0.5)
    trainer = make(HumanReplay, human_pairs=PAIRS)
    _, batch, row = until_aligned(trainer, 2)
    generator = torch.Generator().manual_seed(trainer.config.seed * 1_000_003 + 2)
    some = [PAIRS[i] for i in torch.randperm(3, generator=generator)[:2].tolist()]
    model, weight = trainer.reward_model, time_weight(2, 3, 0.6)

    rollout = tokenize_pairs(trainer.policy, trainer.tokenizer, some)
    hidden = hidden_states(trainer.policy, rollout)
    rewards = model.score(embed_pairs(model, some), hidden, weight=weight, mask=rollout.feedback_mask)
    human_loss = -F.logsigmoid(rewards[:2] - rewards[2:]).mean()
    absorbed, updater = trainer.updater._absorbed, trainer.updater
    own = model.reward(absorbed, updater._pooled, updater._gradient, weight, lse=updater._lse).view(N, K)
    loss, _ = grebt_reference.grebt_loss(own, alpha=0.3, eps=1e-2, pair_scores=batch.scores.view(N, K))
    trained = updater.optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss.mean() + 0.5 * human_loss, trained, retain_graph=True)
    norm = torch.stack([g.norm() for g in gradients]).norm()

    trainer.align_reward_model(batch, 2, row)
    assert row["optional/human_loss"] == pytest.approx(human_loss.item(), rel=1e-4)
    assert row["rm/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_agreement_gate_trains_on_the_groups_whose_pair_the_initial_model_picks_too(make):
    trainer = make(AgreementGate)
    _, batch, row = until_aligned(trainer, 1)
    scores = batch.scores.view(N, K)
    # The first group's pair as the initial model would have it, the second's the other way round.
    batch.initial.copy_(torch.stack([scores[0], -scores[1]]).flatten())
    updater = trainer.updater
    own = trainer.reward_model.reward(
        updater._absorbed, updater._pooled, updater._gradient, updater.weight, lse=updater._lse
    )
    loss, _ = grebt_reference.grebt_loss(own.view(N, K)[:1], alpha=0.3, eps=1e-2, pair_scores=scores[:1])
    trained = updater.optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss.sum(), trained, retain_graph=True)
    trainer.align_reward_model(batch, 1, row)
    assert row["optional/agreement"] == 0.5
    assert row["grebt/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["rm/grad_norm"] == pytest.approx(torch.stack([g.norm() for g in gradients]).norm().item(), rel=1e-3)


def test_agreement_gate_trains_nothing_where_no_group_agrees(make):
    trainer = make(AgreementGate)
    _, batch, row = until_aligned(trainer, 1)
    batch.initial.copy_(-batch.scores)
    before = weights(trainer)
    trainer.align_reward_model(batch, 1, row)
    assert row["optional/agreement"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


@pytest.mark.parametrize("trainer", [HumanReplay, AgreementGate])
def test_a_whole_run_differs_from_plain_r2m(make, trainer):
    settings = {"human_pairs": PAIRS} if trainer is HumanReplay else {}
    (plain, changed) = make(R2MTrainer), make(trainer, **settings)
    plain.train(), changed.train()
    assert any(not torch.equal(a, b) for a, b in zip(weights(plain), weights(changed), strict=True))
