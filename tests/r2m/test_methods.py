"""Baselines, ablations and controls as configs of the trainer."""

import itertools
import math

import pytest
import tiny
import torch
from test_trainer import PAIRS, K, N, changed, copies, hidden_states, small_policy, with_adapter, without_costs

from r2m import R2MTrainer
from r2m.algorithms import ALGORITHMS, Algorithm
from r2m.config import config_from_dict
from r2m.fitting import pairs as fitting
from r2m.fitting.bradley_terry import pair_accuracy
from r2m.fitting.pairs import embed_pairs, tokenize_pairs
from r2m.method import updater
from r2m.method.reward_model import saved_config
from r2m_kernels.grebt import reference as grebt_reference

PROMPTS = ["hello ", "what is it? ", "a b", "xyz"]
BETA = 0.3


@pytest.fixture
def make(reward_checkpoint, tmp_path):
    """A float32 trainer on fresh tiny models; keywords that it does not know are keys of the config."""
    numbers = itertools.count()

    def build(*, policy=None, generator=None, held_out_pairs=None, eval_prompts=None, **settings):
        values = {
            "rounds": 2, "prompts_per_round": N, "num_generations": K, "micro_batch_size": 4, "precision": "float32",
            "learning_rate": 1e-2, "output_dir": str(tmp_path / f"run-{next(numbers)}"),
            "generation": {"max_new_tokens": 5, "max_prompt_tokens": 40, "eos_token_ids": list(range(1, 50))},
            "r2m": {"learning_rate": 1e-2}, "kl": {"beta": BETA},
        }  # fmt: skip
        for key, value in settings.items():
            values[key] = values[key] | value if isinstance(values.get(key), dict) else value
        policy = small_policy() if policy is None else policy
        return R2MTrainer(
            policy,
            tiny.reward_model(reward_checkpoint, policy),
            tiny.tokenizer(),
            PROMPTS,
            config_from_dict(values),
            generator=generator,
            held_out_pairs=held_out_pairs,
            eval_prompts=eval_prompts,
        )

    return build


def move(policy):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)


def log_probs_of(model, rollout):
    logits = model(
        input_ids=rollout.input_ids, attention_mask=rollout.attention_mask, position_ids=rollout.position_ids
    ).logits
    log_p = (logits[:, -rollout.completion_mask.shape[1] - 1 : -1] / 0.7).log_softmax(-1)
    return log_p.gather(-1, rollout.completion_ids[..., None])[..., 0] * rollout.completion_mask


def rewards_of(trainer, rollout, weight, model=None):
    """Equations 1-3 with the hidden states of `model`, by default the policy."""
    rte = trainer.reward_model.embed(rollout.prompts, rollout.completions)
    hidden = hidden_states(trainer.policy if model is None else model, rollout)
    return trainer.reward_model.score(rte, hidden, weight=weight, mask=rollout.feedback_mask).detach()


# ---- every one of them runs ----

METHODS = {
    "remax": {"algorithm": "remax"},
    "remax, KL in the reward, cut groups": {"algorithm": "remax", "kl": {"placement": "reward"}, "micro_batch_size": 3},
    "reinforce++": {"algorithm": "reinforce++", "kl": {"placement": "reward"}, "minibatches": 2},
    "head": {"r2m": {"feedback": "head"}},
    "reference": {"r2m": {"source": "reference"}},
    "noise": {"r2m": {"source": "noise"}},
    "scale anchor": {"r2m": {"scale_anchor": True}},
    "scale anchor, frozen": {"r2m": {"feedback": "frozen", "scale_anchor": True}},
}


@pytest.mark.parametrize("new_policy", [small_policy, with_adapter])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_run_can_be_resumed_and_every_metric_is_finite(make, settings, new_policy):
    settings = {"rounds": 3, "checkpoints": {"every": 1, "keep": 3}, "eval_prompts": PROMPTS[:2]} | settings
    straight = make(policy=new_policy(), held_out_pairs=PAIRS, **settings)
    rows = straight.train()
    for row in rows:
        assert [name for name, value in row.items() if not math.isfinite(value)] == []
        assert row.keys() >= {"grebt/loss", "reward/group_std", "policy/kl"}
        assert ("rm/grad_norm" in row) == straight.config.r2m.trains
        assert row["policy/grad_norm"] > 0 or row["policy/clip_share"] > 0  # all of the last step's
    resumed = make(policy=new_policy(), held_out_pairs=PAIRS, **settings)
    again = resumed.train(resume_from=straight.run.folder / "checkpoint-1")
    assert without_costs(again[-2:]) == without_costs(rows[-2:])
    assert changed(resumed.policy, copies(straight.policy)) == set()
    assert changed(resumed.reward_model, copies(straight.reward_model)) == set()


@pytest.mark.parametrize("feedback", ["none", "frozen"])
@pytest.mark.parametrize("algorithm", ["remax", "reinforce++"])
def test_one_response_to_a_prompt_is_enough(make, algorithm, feedback):
    trainer = make(
        algorithm=algorithm,
        kl={"placement": "reward"},
        num_generations=1,
        prompts_per_round=4,
        micro_batch_size=3,
        held_out_pairs=PAIRS,
        r2m={"feedback": feedback},
    )
    before = copies(trainer.policy)
    for row in trainer.train():
        assert [name for name, value in row.items() if not math.isfinite(value)] == []
        assert not [name for name in row if name.startswith(("reward/group", "reward/degenerate", "grebt/"))]
        assert ("rm/attended_tokens" in row) == (feedback == "frozen")
    assert changed(trainer.policy, before)


# ---- ReMax ----


@pytest.mark.parametrize("placement", ["loss", "reward"])
@pytest.mark.parametrize("feedback", ["none", "trained", "head"])
def test_remax_subtracts_the_score_of_the_greedy_response(make, feedback, placement):
    trainer = make(
        algorithm="remax", r2m={"feedback": feedback}, kl={"placement": placement}, missing_eos_penalty=2.0, rounds=5
    )
    scale = 0.5 if feedback == "trained" else 1.0  # as r2m.scale_anchor may have set it
    trainer.updater.scale = scale
    t, weight = 2, math.cos(math.pi * 2 / 5) / 2 + 0.5 if feedback == "trained" else 1.0
    move(trainer.policy)
    move(trainer.reward_model.head)
    trainer.scorer.initial_head.load_state_dict(trainer.reward_model.head.state_dict())
    rollout = trainer.sample(t)
    greedy = rollout.greedy
    assert greedy.prompts == trainer.prompts_of_round(t)
    assert torch.equal(greedy.input_ids, trainer.sample(t).greedy.input_ids)  # nothing is drawn
    best = trainer.policy(**{
        name: getattr(greedy, name) for name in ("input_ids", "attention_mask", "position_ids")
    }).logits[:, -greedy.completion_mask.shape[1] - 1 : -1].argmax(-1)  # fmt: skip
    assert torch.equal(best[greedy.completion_mask], greedy.completion_ids[greedy.completion_mask])

    batch = tiny.apart(trainer).annotate(rollout, t, {})
    scores = scale * rewards_of(trainer, rollout, weight) - 2.0 * (~rollout.finished)
    baseline = scale * rewards_of(trainer, greedy, weight) - 2.0 * (~greedy.finished)
    torch.testing.assert_close(batch.scores, scores, rtol=1e-4, atol=1e-5)
    kl = (log_probs_of(trainer.policy, rollout) - log_probs_of(small_policy(), rollout)).sum(-1).detach()
    assert kl.abs().min() > 1e-3
    expected = scores - baseline.repeat_interleave(K) - (BETA * kl if placement == "reward" else 0)
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-4)


def test_remax_scores_in_its_first_epoch_though_groups_are_cut(make):
    whole, apart = (make(algorithm="remax", micro_batch_size=3) for _ in range(2))
    assert whole.first_epoch == 1
    apart.first_epoch = 0
    assert without_costs(whole.train()) == without_costs(apart.train())
    assert changed(whole.policy, copies(apart.policy)) == set()


def test_remax_needs_a_generator_that_can_be_greedy(make):
    with pytest.raises(ValueError, match="algorithm is 'remax', and generator is a function, which only samples"):
        make(algorithm="remax", generator=lambda prompt_ids, k: [[7, 1]] * (len(prompt_ids) * k))


def test_remax_without_its_greedy_responses_is_an_error(make):
    trainer = make(algorithm="remax")
    rollout = trainer.sample(1)
    rollout.greedy = None
    with pytest.raises(ValueError, match=r"rollout\.greedy is None; expected the greedy responses"):
        tiny.apart(trainer).annotate(rollout, 1, {})


def test_a_greedy_reward_that_is_not_finite_stops_the_run(make, monkeypatch):
    trainer = make(algorithm="remax")
    monkeypatch.setattr(trainer.scorer, "score_apart", lambda rte, *_: torch.full((len(rte),), torch.nan))
    with pytest.raises(FloatingPointError, match="phase annotate, round 1: a greedy response's reward is not finite"):
        trainer.train()


# ---- REINFORCE++ ----


def test_the_steps_of_reinforce_plus_plus_are_those_written_out(make):
    settings = {"algorithm": "reinforce++", "kl": {"placement": "reward"}, "micro_batch_size": 4}
    trainer, row = make(epochs=3, clip_range=0.1, missing_eos_penalty=1.0, max_grad_norm=0.5, **settings), {}
    assert trainer.first_epoch == 0
    move(trainer.policy)
    rollout = trainer.sample(1)
    batch = tiny.apart(trainer).annotate(rollout, 1, row)
    exact = small_policy()
    exact.load_state_dict(copies(trainer.policy))
    trainer.optimize_policy(rollout, batch, 1, row)

    mask = rollout.completion_mask
    with torch.no_grad():
        old, reference = (log_probs_of(model, rollout) for model in (exact, small_policy()))
    scores = batch.rewards - 1.0 * (~rollout.finished)
    assert 0 < rollout.finished.sum() < N * K
    returns = torch.zeros_like(old)
    for i, t in mask.nonzero().tolist():
        returns[i, t] = scores[i] - BETA * (old - reference)[i, t:].sum()
    advantages = (returns - returns[mask].mean()) / (returns[mask].std(correction=0) + 1e-4) * mask
    torch.testing.assert_close(batch.advantages, advantages, rtol=1e-3, atol=1e-3)

    optimizer = torch.optim.AdamW(exact.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(3):
        ratio = (log_probs_of(exact, rollout) - old).exp()
        objective = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)
        losses.append(-((objective * mask).sum(-1) / mask.sum(-1)).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(exact.parameters(), 0.5)
        optimizer.step()
    assert row["policy/loss"] == pytest.approx(sum(losses).item() / 3, rel=1e-3, abs=1e-4)
    assert row["policy/clip_share"] > 0
    for name, p in trainer.policy.named_parameters():
        torch.testing.assert_close(p, exact.get_parameter(name), rtol=0, atol=2e-4, msg=name)


# ---- an algorithm of one's own ----


def test_a_new_algorithm_is_a_row_and_a_function(make, monkeypatch):
    def centred(credit):
        groups = credit.scores.view(-1, credit.num_generations)
        return (groups - groups.mean(-1, keepdim=True)).flatten()

    monkeypatch.setitem(ALGORITHMS, "centred", Algorithm(centred, ratio="token", compares="group"))
    trainer = make(algorithm="centred", kl={"placement": "reward"})
    assert trainer.first_epoch == 1
    _, _, batch = trainer.round(1)
    scores = (batch.scores - BETA * batch.kl).view(N, K)
    torch.testing.assert_close(batch.advantages.view(N, K), scores - scores.mean(-1, keepdim=True))
    assert all(math.isfinite(x) for row in make(algorithm="centred").train() for x in row.values())
    with pytest.raises(ValueError, match="num_generations is 1; the responses of a group are compared by centred"):
        make(algorithm="centred", num_generations=1, r2m={"feedback": "none"})


# ---- the head alone ----


def test_the_head_learns_from_grebt_on_the_vanilla_rewards_and_nothing_else_moves(make, monkeypatch):
    trainer = make(r2m={"feedback": "head", "weight_decay": 0.1, "max_grad_norm": 0.5, "alpha": 0.4})
    model = trainer.reward_model
    with torch.no_grad():
        for weight in model.attention.parameters():  # nothing of it is computed
            weight.fill_(torch.nan)
    monkeypatch.setattr("r2m.policy.passes.HiddenStateTap", lambda *args: pytest.fail("hidden states were tapped"))
    phi = model.head.weight.detach().clone().requires_grad_()
    bias, optimizer = model.head.bias.detach().clone(), torch.optim.AdamW([phi], lr=1e-2, weight_decay=0.1)
    for t in (1, 2):
        rollout, row = trainer.sample(t), {}
        batch = tiny.apart(trainer).annotate(rollout, t, row)
        trainer.optimize_policy(rollout, batch, t, row)
        trainer.align_reward_model(batch, t, row)
        rewards = model.embed(rollout.prompts, rollout.completions) @ phi + bias
        torch.testing.assert_close(batch.rewards, rewards.detach(), rtol=1e-5, atol=1e-5)
        loss, _ = grebt_reference.grebt_loss(rewards.view(N, K), alpha=0.4, eps=1e-2)
        optimizer.zero_grad()
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_([phi], 0.5)
        optimizer.step()
        assert row["grebt/loss"] == pytest.approx(loss.mean().item(), rel=1e-4)
        assert row["rm/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert not row.keys() & {"weight", "reward/correlation", "rm/attended_tokens"}
        torch.testing.assert_close(model.head.weight, phi, rtol=0, atol=1e-5)
        assert torch.equal(model.head.bias, bias)


def test_a_trained_head_is_measured_and_saved_as_what_it_is_without_feedback(make, tmp_path):
    trainer = make(r2m={"feedback": "head"}, held_out_pairs=PAIRS)
    rows = trainer.train()
    model = trainer.reward_model
    rte = embed_pairs(model, PAIRS)
    assert rows[-1]["rm/pair_accuracy"] == trainer.held_out_accuracy() == pair_accuracy(model.vanilla_score(rte))
    _, rollout, batch = trainer.evaluate(["hello", "you"], K)
    expected = model.vanilla_score(model.embed(rollout.prompts, rollout.completions))
    torch.testing.assert_close(batch.rewards, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(batch.rewards, batch.initial, atol=1e-3)
    trainer.save_pretrained(tmp_path / "saved")
    assert saved_config(tmp_path / "saved" / "reward_model").floor == 1.0
    assert "linear head of the reward model is trained" in (tmp_path / "saved" / "policy" / "README.md").read_text()


# ---- whose hidden states ----


@pytest.mark.parametrize("new_policy", [small_policy, with_adapter])
def test_feedback_of_the_reference_stays_what_it_was_in_its_own_pass(make, monkeypatch, new_policy):
    trainer = make(policy=new_policy(), r2m={"source": "reference"}, held_out_pairs=PAIRS, algorithm="remax", rounds=5)
    move(trainer.policy)
    recomputed, original = [], trainer.reward_model.reward
    monkeypatch.setattr(
        trainer.reward_model, "reward", lambda *args, **kw: recomputed.append(original(*args, **kw)) or recomputed[-1]
    )
    rollout = trainer.sample(2)
    passes = []
    trainer.policy.register_forward_pre_hook(lambda module, args, kwargs: passes.append(1), with_kwargs=True)
    batch = tiny.apart(trainer).annotate(rollout, 2, {})
    micro_batches = N * K // 4
    # Of an adapter the reference is the same module, which runs over the greedy responses as well.
    assert len(passes) == (2 * micro_batches + 1 if new_policy is with_adapter else micro_batches)
    weight, start = trainer.updater.weight, small_policy()
    expected = rewards_of(trainer, rollout, weight, start)
    torch.testing.assert_close(batch.rewards, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, rewards_of(trainer, rollout, weight), atol=1e-3)
    baseline = rewards_of(trainer, rollout.greedy, weight, start).repeat_interleave(K)
    torch.testing.assert_close(batch.baseline, baseline, rtol=1e-4, atol=1e-4)
    trainer.optimize_policy(rollout, batch, 2, {})
    trainer.align_reward_model(batch, 2, {})
    torch.testing.assert_close(recomputed[-1].detach(), expected, rtol=1e-4, atol=1e-4)

    _, rollout, batch = trainer.evaluate(["hello", "you"], K)
    torch.testing.assert_close(batch.rewards, rewards_of(trainer, rollout, 0.6, start), rtol=1e-4, atol=1e-4)
    pairs = tokenize_pairs(start, trainer.tokenizer, PAIRS)
    seen = []
    score = fitting.score_rollout
    monkeypatch.setattr("r2m.scoring.score_rollout", lambda *a, **k: seen.append(score(*a, **k)) or seen[-1])
    trainer.held_out_accuracy()
    torch.testing.assert_close(seen[0], rewards_of(trainer, pairs, 0.6, start), rtol=1e-4, atol=1e-4)


def test_noise_takes_the_place_of_hidden_states_at_every_use(make, monkeypatch):
    """Zeros for noise, so that what is scored is known: no attention value, only W_o's absent bias."""
    trained = make(r2m={"source": "noise"}, held_out_pairs=PAIRS, algorithm="remax", epochs=2)
    uses = []

    def zeros(hidden, mask):
        assert mask.shape == hidden.shape[:2]
        uses.append(len(hidden))
        return torch.zeros_like(hidden)

    for module in (updater, fitting):
        monkeypatch.setattr(module, "noise_like", zeros)
    rollout, row = trained.sample(1), {}
    batch = tiny.apart(trained).annotate(rollout, 1, row)
    vanilla = trained.reward_model.vanilla_score(trained.reward_model.embed(rollout.prompts, rollout.completions))
    weight = trained.updater.weight
    bias = trained.reward_model.head.bias
    torch.testing.assert_close(batch.rewards, weight * (vanilla - bias) + bias, rtol=1e-5, atol=1e-5)
    assert uses == [N, 4, 4]  # the greedy responses, then two micro-batches
    trained.optimize_policy(rollout, batch, 1, row)
    assert uses == [N, 4, 4, 4, 4]  # the last epoch
    trained.align_reward_model(batch, 1, row)
    trained.held_out_accuracy()
    trained.evaluate(["hello", "you"], 1)
    assert uses == [N, 4, 4, 4, 4, 4, 2 * len(PAIRS) - 4, 2]  # the pairs in micro-batches of four


def test_noise_is_drawn_anew_and_the_policys_hidden_states_do_not_pass(make):
    trained = make(r2m={"source": "noise"})
    rollout = trained.sample(1)
    first, second = (tiny.apart(trained).annotate(rollout, 1, {}).rewards for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(first, rewards_of(trained, rollout, trained.updater.weight), atol=1e-3)
