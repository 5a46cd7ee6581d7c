"""Training rounds on tiny models: what moves, what stays, what is written, and what stops a run."""

import itertools
import json
import logging
import math

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from r2m import Preference, R2MRewardModel, R2MTrainer, load_config, progress
from r2m.algorithms import grpo_advantages, rloo_advantages
from r2m.config import Lora, config_from_dict
from r2m.fitting.bradley_terry import pair_accuracy
from r2m.fitting.pairs import embed_pairs, score_rollout, tokenize_pairs
from r2m.policy.load import add_adapter
from r2m.policy.loss import sequence_kl
from r2m.runs.folder import WARNINGS, checkpoints, read_rows
from r2m.runs.monitor import sample_table, warn_about_drift

PROMPTS = ["hello ", "what is it? ", "a b", "xyz", [{"role": "user", "content": "hi"}]]
PAIRS = [Preference("hello ", "there", "no"), Preference("a", "bc", "yes, why?"), Preference("q ", "x", "y")]
N, K = 2, 4

POLICY_METRICS = {
    "reward/mean", "reward/std", "reward/initial", "reward/group_std", "reward/entropy", "reward/degenerate_share",
    "policy/kl", "policy/entropy", "policy/grad_norm", "policy/loss", "policy/ratio", "policy/clip_share",
    "length/mean", "length/eos_share",
}  # fmt: skip
COSTS = {
    f"{kind}/{name}" for kind in ("seconds", "memory") for name in ("rollout", "annotate", "policy", "reward_model")
}
FEEDBACK_METRICS = {
    "weight", "reward/correlation", "rm/attended_tokens",
    "grebt/loss", "grebt/bt", "grebt/entropy", "grebt/pair_flips",
}  # fmt: skip


def small_policy(**settings):
    return tiny.policy(num_hidden_layers=1, **settings)


def make_config(folder, **overrides):
    """A float32 run of two rounds; many tokens end a response, so that lengths differ."""
    values = {
        "rounds": 2, "prompts_per_round": N, "num_generations": K, "micro_batch_size": 4, "precision": "float32",
        "learning_rate": 1e-3, "output_dir": str(folder),
        "generation": {"max_new_tokens": 5, "max_prompt_tokens": 40, "eos_token_ids": list(range(1, 50))},
        "r2m": {"learning_rate": 1e-3},
    }  # fmt: skip
    for key, value in overrides.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    return config_from_dict(values)


@pytest.fixture
def make(reward_checkpoint, tmp_path):
    """A trainer on fresh tiny models; keywords that the trainer does not know are keys of the config."""
    numbers = itertools.count()

    def build(
        *,
        policy=None,
        reward_model=None,
        prompts=PROMPTS,
        tokenizer=None,
        folder=None,
        generator=None,
        eval_prompts=None,
        judge=None,
        held_out_pairs=None,
        sample_metrics=None,
        model=None,
        **settings,
    ):
        policy = small_policy() if policy is None else policy
        folder = folder or f"run-{next(numbers)}"
        return R2MTrainer(
            policy,
            tiny.reward_model(reward_checkpoint, policy, **(model or {})) if reward_model is None else reward_model,
            tiny.tokenizer() if tokenizer is None else tokenizer,
            prompts,
            make_config(tmp_path / folder, **settings),
            generator=generator,
            eval_prompts=eval_prompts,
            judge=judge,
            held_out_pairs=held_out_pairs,
            sample_metrics=sample_metrics,
        )

    return build


def with_adapter(rank=2):
    torch.manual_seed(7)
    return add_adapter(small_policy(), Lora(rank=rank))


def saved_adapter(folder):
    """An adapter that has left its start (both its factors random) and was trained with dropout, as found on disk."""
    torch.manual_seed(8)
    settings = LoraConfig(
        r=2, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(small_policy(), settings).save_pretrained(folder)
    return folder


def copies(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    return {name for name in after if not torch.equal(after[name], before[name])}


def without_costs(rows):
    costs = ("seconds/", "memory/", "tokens/computed")
    return [{name: x for name, x in row.items() if not name.startswith(costs)} for row in rows]


def written_rows(trainer):
    return [json.loads(line) for line in (trainer.run.folder / "metrics.jsonl").read_text().splitlines()]


def hidden_states(model, rollout):
    with torch.no_grad():
        return model(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            output_hidden_states=True,
        ).hidden_states[-1]


# ---- rounds ----


@pytest.mark.parametrize(
    ("algorithm", "placement", "minibatches", "new_policy"),
    [
        ("rloo", "loss", 1, small_policy),
        ("rloo", "loss", 2, with_adapter),
        ("rloo", "reward", 1, with_adapter),
        ("rloo", "reward", 2, small_policy),
        ("grpo", "loss", 1, with_adapter),
        ("grpo", "loss", 2, small_policy),
        ("grpo", "reward", 1, small_policy),
        ("grpo", "reward", 2, with_adapter),
    ],
)
def test_rounds_run_and_every_metric_is_finite_and_written(make, algorithm, placement, minibatches, new_policy):
    trainer = make(
        policy=new_policy(),
        algorithm=algorithm,
        kl={"placement": placement},
        minibatches=minibatches,
    )
    rows = trainer.train()
    assert [row["round"] for row in rows] == [1, 2]
    for row in rows:
        assert row.keys() >= {"round", "rm/grad_norm"} | POLICY_METRICS | FEEDBACK_METRICS | COSTS
        assert [name for name, value in row.items() if not math.isfinite(value)] == []
    assert written_rows(trainer) == rows
    assert load_config(trainer.run.folder / "config.yaml") == trainer.config


@pytest.mark.parametrize("micro_batch_size", [K, K - 1], ids=["whole groups", "split groups"])
def test_seconds_of_the_first_epoch_are_told_where_scoring_is_its_pass(make, micro_batch_size):
    (row,) = make(rounds=1, micro_batch_size=micro_batch_size).train()
    assert ("seconds/first_epoch" in row) == (micro_batch_size == K)
    assert 0 < row.get("seconds/first_epoch", row["seconds/annotate"] / 2) < row["seconds/annotate"]


def test_a_round_says_its_phase_epoch_and_micro_batch_and_no_pass_is_larger(make, monkeypatch):
    said, embedded = set(), []
    monkeypatch.setattr(
        progress, "say", lambda: said.add(", ".join(entry[0] for entry in progress._going_on if entry[0]))
    )
    run_backbone = R2MRewardModel.run_backbone
    monkeypatch.setattr(
        R2MRewardModel, "run_backbone", lambda model, rows: embedded.append(len(rows)) or run_backbone(model, rows)
    )
    make(rounds=1, micro_batch_size=2 * K - 1, epochs=2, held_out_pairs=PAIRS, eval_prompts=PROMPTS[:1]).train()
    assert max(embedded) <= 2 * K - 1
    for line in (
        "round 1 of 1, sampling, batch 1 of 1, token 1 of 5",
        "round 1 of 1, scoring, embedding, batch 2 of 2",
        "round 1 of 1, scoring, reference, pass 2 of 2",
        "round 1 of 1, scoring, policy, minibatch 1 of 1, micro-batch 2 of 2",
        "round 1 of 1, policy update, epoch 2 of 2, minibatch 1 of 1, micro-batch 2 of 2",
        "round 1 of 1, reward model update",
        "round 1 of 1, held-out prompts, sampling, batch 1 of 1, token 1 of 5",
        "held-out pairs, part 1 of 1, embedding, batch 1 of 1",
        "round 1 of 1, held-out pairs, hidden states of the policy, pass 1 of 1",
    ):
        assert line in said, (line, said)
    assert any(line.startswith("round 1 of 1, writing ") for line in said)


@pytest.mark.parametrize("feedback", ["none", "frozen"])
def test_rounds_without_training_of_the_reward_model(make, feedback):
    trainer = make(r2m={"feedback": feedback})
    before = copies(trainer.reward_model)
    rows = trainer.train()
    assert changed(trainer.reward_model, before) == set()
    for row in rows:
        assert row.keys() >= {"round"} | POLICY_METRICS | COSTS
        assert ("weight" in row, "grebt/loss" in row, "rm/grad_norm" in row) == (feedback == "frozen",) * 2 + (False,)
        assert [name for name, value in row.items() if not math.isfinite(value)] == []
    if feedback == "none":
        assert all(row["reward/mean"] == row["reward/initial"] for row in rows)


@pytest.mark.parametrize("start", ["full", "fresh adapter", "saved adapter"])
def test_only_the_small_part_and_the_policys_trainable_weights_move(make, tmp_path, start):
    policy = {
        "full": small_policy,
        "fresh adapter": with_adapter,
        "saved adapter": lambda: PeftModel.from_pretrained(small_policy(), saved_adapter(tmp_path), is_trainable=True),
    }[start]()
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    trainer = make(policy=policy, kl={"beta": 0.1})
    with trainer.learner.reference() as reference:
        before_reference = copies(reference)
    before_backbone, before_small, before = (
        copies(trainer.reward_model.backbone), copies(trainer.reward_model), copies(policy)
    )  # fmt: skip
    trainer.train()
    assert changed(policy, before) == trainable
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trainable
    assert changed(trainer.reward_model.backbone, before_backbone) == set()
    moved = changed(trainer.reward_model, before_small)
    assert (
        {f"attention.w_{x}" for x in "qkvo"} | {"head.weight"}
        <= moved
        <= set(dict(trainer.reward_model.named_parameters()))
    )
    with trainer.learner.reference() as reference:
        assert changed(reference, before_reference) & (set(before_reference) - trainable) == set()
        if start == "full":
            assert changed(reference, before_reference) == set()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("architecture", tiny.DROPOUT_ARCHITECTURES)
def test_the_first_importance_ratio_is_1_and_the_first_kl_0_though_the_checkpoint_has_dropout(
    make, architecture, precision
):
    policy = tiny.policy_with_dropout(architecture)
    row, _ = make(policy=policy, epochs=1, precision=precision, clip_range=1e-4, kl={"beta": 0.1}).train()
    assert row["policy/kl"] == pytest.approx(0, abs=1e-5)
    assert row["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert row["policy/clip_share"] == 0


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_adapter_from_disk_is_its_own_reference(make, tmp_path, precision):
    folder = saved_adapter(tmp_path / "adapter")
    policy = PeftModel.from_pretrained(small_policy(), folder, is_trainable=True).train()
    trainer = make(policy=policy, epochs=1, precision=precision, clip_range=1e-4)
    first, second = trainer.train()
    assert first["policy/kl"] == pytest.approx(0, abs=1e-5)
    assert first["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["policy/clip_share"] == 0
    assert abs(second["policy/kl"]) > 1e-4

    rollout = trainer.sample(1)
    adapted = PeftModel.from_pretrained(small_policy(), folder).eval()
    with trainer.learner.reference() as reference:
        actual = hidden_states(reference, rollout)[rollout.attention_mask]
    torch.testing.assert_close(actual, hidden_states(adapted, rollout)[rollout.attention_mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize(("algorithm", "advantages_of"), [("rloo", rloo_advantages), ("grpo", grpo_advantages)])
def test_rewards_and_advantages_are_those_of_freshly_computed_hidden_states(
    make, algorithm, advantages_of, positions, t
):
    trainer = make(algorithm=algorithm, rounds=5, r2m={"positions": positions})
    rollout = trainer.sample(t)
    batch = tiny.apart(trainer).annotate(rollout, t, {})
    weight = max(math.cos(math.pi * t / 5) / 2 + 0.5, 0.6)
    rte = trainer.reward_model.embed(rollout.prompts, rollout.completions)
    hidden = hidden_states(trainer.policy, rollout)
    expected = trainer.reward_model.score(rte, hidden, weight=weight, mask=rollout.feedback_mask).detach()
    torch.testing.assert_close(batch.scores, expected, rtol=1e-5, atol=1e-5)
    assert expected.view(N, K).std(-1).min() > 1e-3
    torch.testing.assert_close(batch.advantages, advantages_of(expected.view(N, K)).flatten(), rtol=1e-3, atol=1e-4)


def move(policy, by=0.02):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters():
            p += by * torch.randn_like(p)


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_kl_enters_advantages_only_where_it_is_part_of_the_reward_and_never_the_pairs(make, monkeypatch, placement):
    trainer, row = make(kl={"placement": placement, "beta": 0.5}), {}
    move(trainer.policy)
    rollout = trainer.sample(1)
    batch = tiny.apart(trainer).annotate(rollout, 1, row)
    plain = make(kl={"beta": 0.0})
    move(plain.policy)
    torch.testing.assert_close(batch.scores, tiny.apart(plain).annotate(rollout, 1, {}).scores)
    kl = sequence_kl(batch.log_probs, batch.reference_log_probs, rollout.completion_mask)
    assert row["policy/kl"] == pytest.approx(kl.mean().item())
    assert kl.abs().min() > 1e-3
    penalised = batch.scores - 0.5 * kl if placement == "reward" else batch.scores
    torch.testing.assert_close(batch.advantages, rloo_advantages(penalised.view(N, K)).flatten())
    picking = []
    monkeypatch.setattr(trainer.updater, "step", lambda annotated, *_, **__: picking.append(annotated) or {})
    trainer.align_reward_model(batch, 1, row)
    assert torch.equal(picking[0], batch.scores)


def log_probs_of(model, rollout, temperature):
    logits = model(
        input_ids=rollout.input_ids, attention_mask=rollout.attention_mask, position_ids=rollout.position_ids
    ).logits
    width = rollout.completion_mask.shape[1]
    log_p = (logits[:, -width - 1 : -1] / temperature).log_softmax(-1)
    return log_p.gather(-1, rollout.completion_ids[..., None])[..., 0] * rollout.completion_mask


def test_policy_and_reference_are_scored_at_the_sampling_temperature(make):
    trainer = make(generation={"temperature": 0.5})
    move(trainer.policy)
    rollout = trainer.sample(1)
    batch, mask = tiny.apart(trainer).annotate(rollout, 1, {}), rollout.completion_mask
    for actual, model in ((batch.log_probs, trainer.policy), (batch.reference_log_probs, small_policy())):
        torch.testing.assert_close(actual * mask, log_probs_of(model, rollout, 0.5), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch.log_probs * mask, batch.reference_log_probs * mask, atol=1e-2)


def test_padding_and_neighbours_change_no_log_prob_of_a_model_with_absolute_positions(make):
    trainer = make(policy=tiny.policy_with_dropout("gpt2"), prompts=["a", "a longer prompt than the other"])
    rollout = trainer.sample(1)
    batch = tiny.apart(trainer).annotate(rollout, 1, {})
    for i, completion_mask in enumerate(rollout.completion_mask):
        ids, length = rollout.input_ids[i][rollout.attention_mask[i]][None], int(completion_mask.sum())
        with torch.no_grad():
            log_p = (trainer.policy(input_ids=ids).logits[:, -length - 1 : -1] / 0.7).log_softmax(-1)
        expected = log_p.gather(-1, ids[:, -length:, None])[0, :, 0]
        torch.testing.assert_close(batch.log_probs[i][completion_mask], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_policys_steps_are_those_of_equation_7_written_out(make, placement):
    settings = {"kl": {"placement": placement, "beta": 0.2, "estimator": "k2"}, "max_grad_norm": 0.5}
    trainer = make(epochs=3, learning_rate=1e-2, weight_decay=0.1, clip_range=0.3, **settings)
    move(trainer.policy)
    rollout = trainer.sample(1)
    batch, row = tiny.apart(trainer).annotate(rollout, 1, {}), {}
    exact = small_policy()
    exact.load_state_dict(copies(trainer.policy))
    trainer.optimize_policy(rollout, batch, 1, row)

    optimizer = torch.optim.AdamW(exact.parameters(), lr=1e-2, weight_decay=0.1)
    old, reference, losses = batch.log_probs * rollout.completion_mask, log_probs_of(small_policy(), rollout, 0.7), []
    for _ in range(3):
        log_probs = log_probs_of(exact, rollout, 0.7)
        ratio = (log_probs - old).sum(-1).exp()
        a = batch.advantages
        loss = -torch.minimum(ratio * a, ratio.clamp(0.7, 1.3) * a)
        if placement == "loss":
            loss = loss + 0.2 * (reference.detach() - log_probs).square().sum(-1) / 2
        losses.append(loss.mean())
        optimizer.zero_grad()
        losses[-1].backward()
        norm = torch.nn.utils.clip_grad_norm_(exact.parameters(), 0.5)
        optimizer.step()
    assert row["policy/loss"] == pytest.approx(sum(losses).item() / 3, rel=1e-3)
    assert row["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    for name, p in trainer.policy.named_parameters():
        torch.testing.assert_close(p, exact.get_parameter(name), rtol=0, atol=1e-4, msg=name)


def test_the_missing_end_penalty_lowers_exactly_the_unfinished(make):
    plain, penalised = make(), make(missing_eos_penalty=3.0)
    torch.manual_seed(0)
    rollout = plain.sample(1)
    row, other_row = {}, {}
    before, after = tiny.apart(plain).annotate(rollout, 1, row), tiny.apart(penalised).annotate(rollout, 1, other_row)
    assert 0 < rollout.finished.sum() < N * K
    torch.testing.assert_close(after.scores, before.scores - 3.0 * (~rollout.finished))
    torch.testing.assert_close(after.advantages, rloo_advantages(after.scores.view(N, K)).flatten())
    assert row["reward/mean"] == other_row["reward/mean"]
    assert row["length/eos_share"] == pytest.approx(rollout.finished.float().mean().item())


def recomputed_rewards(trainer, monkeypatch):
    """Rewards of one round as annotated and, after the policy's epochs, as recomputed; and its rollout."""
    recomputed, original = [], trainer.reward_model.reward

    def reward(*args, **kwargs):
        recomputed.append(original(*args, **kwargs))
        return recomputed[-1]

    monkeypatch.setattr(trainer.reward_model, "reward", reward)
    torch.manual_seed(0)
    rollout = trainer.sample(1)
    batch = tiny.apart(trainer).annotate(rollout, 1, {})
    trainer.optimize_policy(rollout, batch, 1, {})
    trainer.align_reward_model(batch, 1, {})
    return batch.scores, recomputed[-1].detach(), rollout


def test_the_last_epoch_refreshes_the_hidden_states(make, reward_checkpoint, monkeypatch):
    annotated, recomputed, rollout = recomputed_rewards(make(epochs=2, learning_rate=1e-2), monkeypatch)
    after_one_epoch = make(epochs=1, learning_rate=1e-2)
    same, _, other_rollout = recomputed_rewards(after_one_epoch, monkeypatch)
    assert torch.equal(rollout.input_ids, other_rollout.input_ids)
    torch.testing.assert_close(same, annotated)
    reward_model = tiny.reward_model(reward_checkpoint, small_policy())
    rte = reward_model.embed(rollout.prompts, rollout.completions)
    refreshed = hidden_states(after_one_epoch.policy, rollout)
    expected = reward_model.score(rte, refreshed, weight=0.6, mask=rollout.feedback_mask).detach()
    assert (expected - annotated).abs().max() > 1e-3
    torch.testing.assert_close(recomputed, expected, rtol=1e-4, atol=1e-4)


def test_with_a_policy_that_stands_still_recomputed_and_annotated_rewards_agree(make, monkeypatch):
    annotated, recomputed, _ = recomputed_rewards(make(learning_rate=0.0), monkeypatch)
    torch.testing.assert_close(recomputed, annotated, rtol=1e-5, atol=1e-5)


# ---- settings that must not change the result ----


def count_forwards(trainer):
    """Passes of the policy outside generation, with the number of sequences in each."""
    sizes = []

    def count(module, args, kwargs):
        if not kwargs.get("use_cache"):
            sizes.append(len(kwargs["input_ids"]))

    trainer.policy.register_forward_pre_hook(count, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(
    "settings", [{}, {"algorithm": "grpo", "kl": {"placement": "reward"}, "gradient_checkpointing": True}]
)
def test_scoring_as_the_first_epoch_changes_no_weight_and_saves_a_pass(make, settings, epochs, precision, monkeypatch):
    monkeypatch.setattr("r2m.runs.session.check_policy", lambda *_: None)  # its passes are no round's
    whole, apart = (make(epochs=epochs, precision=precision, **settings) for _ in range(2))
    assert whole.first_epoch == 1
    apart.first_epoch = 0
    passes, passes_apart = count_forwards(whole), count_forwards(apart)
    rows, rows_apart = whole.train(), apart.train()
    assert without_costs(rows) == without_costs(rows_apart)
    assert changed(whole.policy, copies(apart.policy)) == set()
    assert changed(whole.reward_model, copies(apart.reward_model)) == set()
    assert (sum(passes), sum(passes_apart)) == (2 * epochs * N * K, 2 * (epochs + 1) * N * K)


@pytest.mark.parametrize("settings", [{"minibatches": 2}, {"micro_batch_size": 3}])
def test_scoring_is_a_pass_of_its_own_where_weights_move_within_the_epoch_or_groups_are_cut(make, settings):
    assert make(**settings).first_epoch == 0


def close(rows, others, tolerance):
    assert len(rows) == len(others)
    for row, other in zip(without_costs(rows), without_costs(others), strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)


def test_gradient_checkpointing_changes_no_metric(make):
    plain, checkpointed = make(folder="a"), make(folder="b", gradient_checkpointing=True)
    close(checkpointed.train(), plain.train(), 1e-6)
    for p, other in zip(checkpointed.policy.parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_micro_batch_size_changes_no_metric(make, minibatches):
    reference = make(rounds=1, minibatches=minibatches, micro_batch_size=8).train()
    for size in (1, 3):
        close(make(rounds=1, minibatches=minibatches, micro_batch_size=size).train(), reference, 1e-4)


@pytest.mark.parametrize("settings", [{}, {"minibatches": 2}, {"algorithm": "grpo"}, {"algorithm": "remax"}])
def test_a_budget_of_tokens_changes_no_metric_and_no_weight(make, settings, monkeypatch):
    """180 tokens hold a group whatever its lengths; of 25, groups are cut."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, **_: torch.optim.SGD(p, lr=0.1))  # Adam enlarges rounding
    whole = make(rounds=1, micro_batch_size=8, **settings)
    start, rows = copies(whole.policy), whole.train()
    assert any((p - start[name]).abs().max() > 1e-3 for name, p in whole.policy.state_dict().items())
    for tokens in (180, 25):
        budget = make(rounds=1, micro_batch_size=None, micro_batch_tokens=tokens, **settings)
        close(budget.train(), rows, 1e-4)
        for p, other in zip(budget.policy.parameters(), whole.policy.parameters(), strict=True):
            torch.testing.assert_close(p, other, rtol=0, atol=1e-5)


def test_a_seed_decides_every_bit(make):
    def run(seed):
        return without_costs(make(seed=seed, minibatches=2, precision="bf16").train())

    first = run(3)
    torch.manual_seed(99)  # what happened before the run does not matter
    assert run(3) == first
    assert run(4) != first


def test_a_round_covers_prompts_by_seed_and_number_alone(make):
    prompts = [f"prompt {i}" for i in range(7)]
    trainer, size = make(prompts=prompts, prompts_per_round=3), 7
    rounds = [trainer.prompts_of_round(t) for t in range(1, 15)]
    assert all(len(picked) == 3 for picked in rounds)
    sequence = [prompt for picked in rounds for prompt in picked]
    passes = [sequence[i : i + size] for i in range(0, len(sequence), size)]
    assert all(sorted(one) == prompts for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    again = make(prompts=prompts, prompts_per_round=3)
    assert [again.prompts_of_round(t) for t in range(14, 0, -1)] == rounds[::-1]
    other = make(prompts=prompts, prompts_per_round=3, seed=1)
    assert [other.prompts_of_round(t) for t in range(1, 15)] != rounds


def test_more_prompts_a_round_than_there_are_start_another_pass(make):
    picked = make(prompts=["a", "b", "c"], prompts_per_round=6).prompts_of_round(1)
    assert sorted(picked[:3]) == sorted(picked[3:]) == ["a", "b", "c"]


# ---- checkpoints ----


@pytest.mark.parametrize(("new_policy", "standardize"), [(small_policy, True), (with_adapter, False)])
def test_a_resumed_run_equals_one_that_never_stopped(make, new_policy, standardize):
    settings = {"rounds": 4, "minibatches": 2, "model": {"standardize": standardize}}
    straight = make(policy=new_policy(), folder="straight", checkpoints={"every": 2}, **settings)
    expected = straight.train()
    resumed = make(policy=new_policy(), folder="resumed", **settings)
    rows = resumed.train(resume_from=straight.run.folder / "checkpoint-2")
    assert without_costs(rows[-2:]) == without_costs(expected[-2:])
    assert without_costs(written_rows(resumed)[-2:]) == without_costs(expected[-2:])
    assert changed(resumed.policy, copies(straight.policy)) == set()
    assert changed(resumed.reward_model, copies(straight.reward_model)) == set()


def test_a_run_resumed_in_its_own_folder_lists_every_round_once(make):
    def stop_in_round_4(prompts, completions):
        rounds_seen.append(1)
        if len(rounds_seen) == 4:
            raise KeyboardInterrupt
        return {}

    rounds_seen = []
    trainer = make(rounds=4, folder="run", checkpoints={"every": 2}, sample_metrics=stop_in_round_4)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [row["round"] for row in written_rows(trainer)] == [1, 2, 3]
    resumed = make(rounds=4, folder="run", checkpoints={"every": 2})
    resumed.train(resume_from=trainer.run.folder / "checkpoint-2")
    assert [row["round"] for row in written_rows(resumed)] == [1, 2, 3, 4]


def test_what_was_trained_loads_with_from_pretrained(make, tmp_path):
    trainer = make(r2m={"floor": 0.7})
    trainer.train()
    trainer.save_pretrained(tmp_path / "saved")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved" / "policy")
    assert changed(policy, copies(trainer.policy)) == set()
    assert tokenizer("hello").input_ids == trainer.tokenizer("hello").input_ids
    reward_model = R2MRewardModel.from_pretrained(
        tmp_path / "saved" / "reward_model", policy=policy, dtype=torch.float32
    )
    rollout = trainer.sample(1)
    rte, hidden = reward_model.embed(rollout.prompts, rollout.completions), hidden_states(policy, rollout)
    expected = trainer.reward_model.score(rte, hidden, weight=0.7, mask=rollout.feedback_mask)
    torch.testing.assert_close(reward_model.score(rte, hidden, mask=rollout.feedback_mask), expected, rtol=0, atol=0)


def test_a_trained_adapter_loads_with_peft_and_no_reference_lies_beside_it(make, tmp_path):
    trainer = make(policy=with_adapter())
    trainer.train()
    trainer.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / "policy"
    loaded = PeftModel.from_pretrained(small_policy(), folder).eval()
    rollout = trainer.sample(1)
    assert torch.equal(hidden_states(loaded, rollout), hidden_states(trainer.policy, rollout))
    assert list(folder.rglob("adapter_model.safetensors")) == [folder / "adapter_model.safetensors"]


# ---- hooks and metrics ----


def test_another_generator_and_extra_metrics_take_part(make):
    calls, seen = [], []

    def generator(prompt_ids, num_generations):
        calls.append((prompt_ids, num_generations))
        return [[100 + i, 101, 1] if i % 2 else [100 + i] for i in range(len(prompt_ids) * num_generations)]

    def sample_metrics(prompts, completions):
        seen.append((prompts, completions))
        return {"judge": float(len(completions))}

    tokenizer = tiny.tokenizer()
    trainer = make(tokenizer=tokenizer, generator=generator, sample_metrics=sample_metrics)
    rows = trainer.train()
    assert [row["judge"] for row in written_rows(trainer)] == [N * K] * 2
    assert [row["length/mean"] for row in rows] == [2.0] * 2
    assert [row["length/eos_share"] for row in rows] == [0.5] * 2
    picked = trainer.prompts_of_round(1)
    ids = [
        tokenizer(p).input_ids if isinstance(p, str) else tokenizer.encode("<s>user:hi</s><s>assistant:")
        for p in picked
    ]
    assert calls[0] == (ids, K)
    assert seen[0][0] == [prompt for prompt in picked for _ in range(K)]
    assert seen[0][1] == tokenizer.batch_decode([[100 + i, 101] if i % 2 else [100 + i] for i in range(N * K)])


def test_held_out_accuracy_is_measured_at_omega_in_the_rounds_asked_for(make):
    trainer = make(rounds=5, evaluation={"every": 3}, held_out_pairs=PAIRS, r2m={"floor": 0.2}, learning_rate=1e-2)
    rows = trainer.train()
    assert [row["round"] for row in rows if "rm/pair_accuracy" in row] == [1, 3, 5]
    model, policy = trainer.reward_model, trainer.policy
    rte = embed_pairs(model, PAIRS)
    fused = score_rollout(model, policy, rte, tokenize_pairs(policy, trainer.tokenizer, PAIRS), 0.2)
    assert rows[-1]["rm/pair_accuracy"] == trainer.held_out_accuracy() == pair_accuracy(fused)
    assert trainer.held_out_accuracy(weight=1) == pair_accuracy(model.vanilla_score(rte))


def test_held_out_accuracy_without_pairs_is_an_error(make):
    with pytest.raises(ValueError, match="held_out_pairs were not given"):
        make().held_out_accuracy()


def test_the_initial_score_is_the_checkpoints_own_in_every_round(make, reward_checkpoint):
    samples = []
    trainer = make(
        sample_metrics=lambda *texts: samples.append(texts) or {},
        r2m={"learning_rate": 0.1},
        model={"standardize": True},
    )
    rows = trainer.train()
    fresh = tiny.reward_model(reward_checkpoint, small_policy())
    for row, (prompts, completions) in zip(rows, samples, strict=True):
        expected = fresh.vanilla_score(fresh.embed(prompts, completions)).mean().item()
        assert row["reward/initial"] == pytest.approx(expected, abs=1e-5)


def test_standardisation_takes_its_statistics_from_the_first_rounds_samples(make):
    trainer = make(rounds=3, model={"standardize": True})
    torch.manual_seed(0)
    rollout = trainer.sample(1)
    hidden = hidden_states(trainer.policy, rollout)[rollout.feedback_mask]
    rte = trainer.reward_model.embed(rollout.prompts, rollout.completions)
    tiny.apart(trainer).annotate(rollout, 1, {})
    model = trainer.reward_model
    torch.testing.assert_close(model.feedback_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.feedback_scale, hidden.std(0, correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.rte_mean, rte.mean(0), rtol=1e-4, atol=1e-5)
    frozen = model.feedback_mean.clone(), model.rte_scale.clone()
    tiny.apart(trainer).annotate(trainer.sample(2), 2, {})
    assert torch.equal(model.feedback_mean, frozen[0])
    assert torch.equal(model.rte_scale, frozen[1])


def test_evaluation_trains_nothing_and_is_of_the_last_round(make):
    trainer = make(rounds=5)
    before, before_small = copies(trainer.policy), copies(trainer.reward_model)
    row, rollout, batch = trainer.evaluate(["hello", "you"], K)
    assert rollout.prompts == ["hello"] * K + ["you"] * K
    rte = trainer.reward_model.embed(rollout.prompts, rollout.completions)
    expected = score_rollout(trainer.reward_model, trainer.policy, rte, rollout, 0.6)
    torch.testing.assert_close(batch.rewards, expected)
    assert all(math.isfinite(value) for value in row.values())
    assert changed(trainer.policy, before) == changed(trainer.reward_model, before_small) == set()


@pytest.mark.parametrize("settings", [{}, {"source": "reference"}, {"scale_anchor": True}, {"feedback": "head"}])
def test_measuring_before_and_within_rounds_changes_no_bit(make, settings):
    """Statistics come from the first round's samples, and a round's update sees that round's hidden states."""

    def rounds(*, measures):
        trainer = make(
            epochs=1, r2m={"learning_rate": 1e-3} | settings, model={"standardize": True}, held_out_pairs=PAIRS
        )
        trainer.eval_prompts = HELD_OUT[:2]

        def measure():
            if measures:
                torch.manual_seed(99)
                trainer.evaluate(["hello", "you"], K)
                trainer.evaluate_held_out()
                trainer.held_out_accuracy(1.0)

        rows = []
        for t in (1, 2):
            row = {}
            measure()
            torch.manual_seed(t)
            rollout = trainer.sample(t)
            measure()
            batch = tiny.apart(trainer).annotate(rollout, t, row)
            measure()
            trainer.optimize_policy(rollout, batch, t, row)
            measure()
            trainer.align_reward_model(batch, t, row)
            rows.append(row)
        return rows, trainer

    (expected, plain), (rows, measured) = rounds(measures=False), rounds(measures=True)
    assert rows == expected
    for one, other in (
        (measured.policy, plain.policy),
        (measured.reward_model, plain.reward_model),
        (measured.scorer.initial_head, plain.scorer.initial_head),
    ):
        assert changed(one, copies(other)) == set()
    assert measured.updater.scale == plain.updater.scale


HELD_OUT = ["who ", "why? ", [{"role": "user", "content": "hi"}]]
EVAL_METRICS = {f"eval/{name}" for name in ("reward", "initial_reward", "kl", "length", "eos_share", "judge")}


def test_held_out_prompts_get_one_response_each_in_the_rounds_asked_for(make):
    def judge(prompts, responses):
        asked.append((prompts, responses))
        return [len(response) for response in responses]

    asked = []
    rows = make(rounds=5, evaluation={"every": 3}, eval_prompts=[*HELD_OUT, "x" * 41], judge=judge).train()
    measured = [row for row in rows if EVAL_METRICS & row.keys()]
    assert [row["round"] for row in measured] == [1, 3, 5]
    for row, (prompts, responses) in zip(measured, asked, strict=True):
        assert row.keys() >= EVAL_METRICS
        assert prompts == HELD_OUT  # less the one that is too long
        assert row["eval/judge"] == sum(map(len, responses)) / len(HELD_OUT)
    assert measured[0]["eval/kl"] != measured[-1]["eval/kl"]


def test_a_policy_that_stays_is_measured_alike_every_time(make):
    still = {"learning_rate": 0.0, "r2m": {"learning_rate": 0.0}}
    trainer = make(
        rounds=3, evaluation={"every": 1}, eval_prompts=HELD_OUT, judge=lambda _, texts: map(len, texts), **still
    )
    first, *others = [{key: row[key] for key in EVAL_METRICS} for row in trainer.train()]
    assert others == [first] * 2
    assert first["eval/kl"] == 0.0


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_that_is_measured_is_the_run_that_is_not(make, adapter, standardize):
    def trained(**options):
        policy = with_adapter() if adapter else small_policy()
        trainer = make(policy=policy, rounds=3, model={"standardize": standardize}, **options)
        return trainer, without_costs(trainer.train())

    plain, expected = trained()
    measured, rows = trained(
        evaluation={"every": 1}, eval_prompts=HELD_OUT, judge=lambda _, texts: map(len, texts), held_out_pairs=PAIRS
    )
    extra = EVAL_METRICS | {"rm/pair_accuracy"}
    assert [{key: x for key, x in row.items() if key not in extra} for row in rows] == expected
    assert changed(measured.policy, copies(plain.policy)) == set()
    assert changed(measured.reward_model, copies(plain.reward_model)) == set()


def test_a_judge_needs_held_out_prompts(make):
    with pytest.raises(ValueError, match="judge is given without eval_prompts; expected the held-out prompts it is"):
        make(judge=lambda *_: [1.0])


def test_training_ends_with_the_round_whose_kl_is_above_the_limit_and_is_saved_there(make, caplog):
    settings = {"rounds": 6, "learning_rate": 1e-2, "kl": {"beta": 0.0}, "checkpoints": {"every": 6}}
    kl = [row["policy/kl"] for row in make(**settings).train()]
    assert kl[0] == 0.0
    limit = max(kl[:4]) * 0.999
    last = next(t for t, value in enumerate(kl, 1) if value > limit)
    assert last < 6
    trainer = make(**settings, evaluation={"stop_at_kl": limit})
    rows = trainer.train()
    assert [row["policy/kl"] for row in rows] == [row["policy/kl"] for row in written_rows(trainer)] == kl[:last]
    assert list(checkpoints(trainer.run.folder)) == [last]
    warning = f"round {last}: KL {kl[last - 1]:.3f} is above evaluation.stop_at_kl {limit:g}; training ends"
    assert warning in caplog.text
    assert {"round": last, "message": warning} in read_rows(trainer.run.folder / WARNINGS)


@pytest.mark.parametrize(("every", "shown"), [(2, [2, 4]), (0, []), (5, [])])
def test_samples_with_their_scores_are_in_the_log_every_so_many_rounds(make, caplog, every, shown):
    caplog.set_level(logging.INFO)
    trainer = make(rounds=4, evaluation={"samples_every": every})
    annotate, tables = trainer.annotate, []

    def annotated(rollout, *args):
        tables.append(sample_table(rollout, batch := annotate(rollout, *args)))
        return batch

    trainer.annotate = annotated
    trainer.train()
    assert [line for line in warnings(caplog) if line.startswith("samples")] == [
        f"samples of round {t}:\n{tables[t - 1]}" for t in shown
    ]
    assert all(table.splitlines()[0].split() == ["prompt", "response", "reward", "initial"] for table in tables)


# ---- warnings ----


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("r2m")]


def test_settings_that_take_the_point_out_of_the_method_are_warned_about(make, caplog):
    caplog.set_level(logging.WARNING)
    make(epochs=1)
    assert len(warnings(caplog)) == 1
    assert "epochs = 1 with one minibatch: the refreshed hidden states equal the sampled ones" in warnings(caplog)[0]
    caplog.clear()
    make(num_generations=2)
    assert len(warnings(caplog)) == 1
    assert "num_generations = 2: group reward entropy is constant" in warnings(caplog)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epochs": 1, "minibatches": 2},
        {"epochs": 1, "r2m": {"feedback": "none"}},
        {"num_generations": 2, "r2m": {"feedback": "none"}},
        {"epochs": 1, "r2m": {"feedback": "head"}},
        {"epochs": 1, "r2m": {"source": "reference"}},
        {"epochs": 1, "r2m": {"source": "noise"}},
    ],
)
def test_other_settings_are_not(make, caplog, settings):
    caplog.set_level(logging.WARNING)
    make(**settings)
    assert warnings(caplog) == []


def test_a_fall_of_held_out_accuracy_is_warned_about(make, caplog, monkeypatch):
    trainer = make(
        rounds=4, evaluation={"every": 1}, held_out_pairs=PAIRS, learning_rate=0.0, r2m={"learning_rate": 0.0}
    )
    accuracies = iter([0.8, 0.76, 0.7, 0.9])
    monkeypatch.setattr(trainer.evaluator, "pair_accuracy", lambda: next(accuracies))
    caplog.set_level(logging.WARNING)
    trainer.train()
    about_accuracy = [line for line in warnings(caplog) if "accuracy" in line]
    assert about_accuracy == ["round 3: held-out pair accuracy fell from 0.800 to 0.700"]


@pytest.mark.parametrize(("learning_rate", "drifts"), [(0.0, False), (0.3, True)])
def test_a_drift_of_the_rewards_scale_is_warned_about(make, caplog, learning_rate, drifts):
    caplog.set_level(logging.WARNING)
    rows = make(learning_rate=0.0, num_generations=16, r2m={"learning_rate": learning_rate}).train()
    ratio = rows[1]["reward/group_std"] / rows[0]["reward/group_std"]
    assert drifts == (not 0.5 < ratio < 2)
    assert len(warnings(caplog)) == drifts
    assert all(f"{ratio:.2f} times" in line and "round 2" in line for line in warnings(caplog))


@pytest.mark.parametrize(
    ("spreads", "rounds_said"),
    [
        ([0.45], [2]),
        ([0.55], []),
        ([1.9], []),
        ([2.1], [2]),
        ([2.1, 2.2, 1.5, 3.9, 4.1, 8.5, 6], [2, 6, 7]),  # once, and again at every further factor of 2
        ([2.1, 0.4, 0.3, 0.2], [2, 3, 5]),  # either way
    ],
)
def test_a_drift_of_the_spread_is_said_once_for_each_factor_of_two(caplog, spreads, rounds_said):
    history = [{"round": t, "reward/group_std": 3.0 * spread} for t, spread in enumerate([1, *spreads], 1)]
    for t in range(1, len(history) + 1):
        warn_about_drift(history[:t])
    assert [int(line.split()[1].rstrip(":")) for line in warnings(caplog)] == rounds_said


def test_a_fall_of_accuracy_is_said_once_for_each_twentieth(caplog):
    accuracies = [0.8, None, 0.76, 0.74, 0.72, None, 0.69, 0.74, 0.69]
    history = [{"round": t} | ({} if a is None else {"rm/pair_accuracy": a}) for t, a in enumerate(accuracies, 1)]
    for t in range(1, len(history) + 1):
        warn_about_drift(history[:t])
    assert [line.partition(":")[0] for line in warnings(caplog)] == ["round 4", "round 7"]


def test_the_start_is_described(make, caplog):
    caplog.set_level(logging.INFO)
    row = make().train()[0]
    (line,) = [line for line in warnings(caplog) if "correlates" in line]
    assert f"{row['reward/correlation']:.2f}" in line
    assert f"{row['rm/attended_tokens']:.1f}" in line


# ---- bad input ----


def test_a_tokenizer_without_padding_token_just_works(make):
    tokenizer = tiny.tokenizer(pad=None)
    rows = make(tokenizer=tokenizer, folder="without").train()
    assert without_costs(rows) == without_costs(make(tokenizer=tiny.tokenizer(pad="</s>"), folder="with").train())


def test_long_and_empty_prompts_are_dropped_and_counted(make, caplog):
    caplog.set_level(logging.WARNING)
    trainer = make(prompts=["hello", "x" * 41, "", "y" * 40])
    assert trainer.prompts == ["hello", "y" * 40]
    assert warnings(caplog) == ["dropped 2 of 4 prompts: empty or longer than 40 tokens"]


@pytest.mark.parametrize("prompts", [[], ["x" * 41, "y" * 99]])
def test_no_usable_prompt_is_an_error(make, prompts):
    with pytest.raises(ValueError, match=f"prompts: none of {len(prompts)} has between 1 and 40 tokens"):
        make(prompts=prompts)


def test_a_reward_model_for_another_width_is_an_error(make, reward_checkpoint):
    reward_model = tiny.reward_model(reward_checkpoint, tiny.policy(48))
    with pytest.raises(ValueError, match=r"hidden states of width 48 .* the policy given has width 32"):
        make(reward_model=reward_model)


@pytest.mark.parametrize("which", ["prompts", "eval_prompts"])
def test_a_reward_model_that_cannot_render_the_prompts_is_an_error_before_anything_is_sampled(
    make, reward_checkpoint, which
):
    reward_model = tiny.reward_model(reward_checkpoint, small_policy())
    reward_model.tokenizer.chat_template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}a"
    make(reward_model=reward_model)
    prompts = [[{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]]
    with pytest.raises(ValueError, match=r"reward_model: prompt .* the roles system, user, assistant: no system"):
        make(reward_model=reward_model, **{which: prompts})


def test_the_reward_model_reads_the_reasoning_that_the_policys_template_opens(make, monkeypatch):
    tokenizer, read = tiny.tokenizer(), []
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    trainer = make(tokenizer=tokenizer, prompts=[[{"role": "user", "content": "hi"}]], algorithm="remax")
    embed = trainer.reward_model.embed
    monkeypatch.setattr(
        trainer.reward_model, "embed", lambda p, texts, **kw: read.extend(texts) or embed(p, texts, **kw)
    )
    tiny.apart(trainer).annotate(trainer.sample(1), 1, {})
    assert len(read) == N * K + N and all(text.startswith("<think>\n") for text in read)


def test_a_reward_model_on_another_device_is_an_error(make, reward_checkpoint):
    reward_model = tiny.reward_model(reward_checkpoint, small_policy()).to("meta")
    with pytest.raises(ValueError, match="reward_model is on meta, the policy on cpu; expected one device"):
        make(reward_model=reward_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_trainable_weights_are_an_error(make, dtype):
    with pytest.raises(ValueError, match=f"trainable weights of {dtype}; expected float32"):
        make(policy=small_policy().to(dtype))


def test_a_policy_that_cannot_learn_is_an_error(make, tmp_path):
    with pytest.raises(ValueError, match="policy has no trainable weights"):
        make(policy=small_policy().requires_grad_(False))
    with pytest.raises(ValueError, match=r"policy has no trainable weights; .* loaded with is_trainable=True"):
        make(policy=PeftModel.from_pretrained(small_policy(), saved_adapter(tmp_path / "adapter")))


def fixed_responses(prompt_ids, num_generations):
    return [[100 + i, 1] for i in range(len(prompt_ids) * num_generations)]


def poison(parameter):
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan


@pytest.mark.parametrize("feedback", ["none", "trained"])
@pytest.mark.parametrize("generator", [None, fixed_responses], ids=["transformers", "another generator"])
def test_a_policy_with_nan_weights_stops_the_run(make, generator, feedback):
    trainer = make(generator=generator, r2m={"feedback": feedback})
    poison(trainer.policy.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(FloatingPointError, match=r"phase \w+, round 1"):
        trainer.train()


def test_a_policy_that_diverged_stops_the_next_round(make):
    with pytest.raises(FloatingPointError, match=r"phase \w+, round 2"):
        make(learning_rate=1e30, epochs=1).train()


def test_a_nan_policy_loss_stops_the_run_before_the_step(make):
    trainer = make(generator=fixed_responses, kl={"beta": math.nan})
    before = copies(trainer.policy)
    with pytest.raises(FloatingPointError, match="phase policy, round 1, epoch 1"):
        trainer.train()
    assert changed(trainer.policy, before) == set()


@pytest.mark.parametrize("feedback", ["frozen", "trained"])
def test_a_nan_in_the_reward_models_part_stops_the_run_before_any_step(make, feedback):
    trainer = make(r2m={"feedback": feedback})
    poison(trainer.reward_model.attention.w_o)
    before, before_small = copies(trainer.policy), copies(trainer.reward_model)
    with pytest.raises(FloatingPointError, match=r"phase \w+, round 1"):
        trainer.train()
    assert changed(trainer.policy, before) == set()
    assert {name for name in changed(trainer.reward_model, before_small) if name != "attention.w_o"} == set()


def test_a_nan_in_the_refreshed_hidden_states_names_the_reward_models_phase(make, monkeypatch):
    trainer = make()
    collect = trainer.updater.collect
    monkeypatch.setattr(trainer.updater, "collect", lambda rows, hidden, mask: collect(rows, hidden * math.nan, mask))
    with pytest.raises(FloatingPointError, match="phase reward_model, round 1: GREBT loss is nan"):
        trainer.train()
