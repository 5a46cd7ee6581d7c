"""Bradley-Terry fits on preferences that are known to be learnable, or known not to be."""

import json
import logging
import math

import pytest
import tiny
import torch

from r2m import Preference, R2MRewardModel, fit_reward
from r2m.config import R2M
from r2m.fitting.bradley_terry import batch_margins, fused_margins, pair_accuracy
from r2m.fitting.mean_start import STRENGTHS, cross_validated, mean_start, ridge
from r2m.fitting.pairs import (
    Feedback,
    embed_pairs,
    feature_statistics,
    pack_hidden,
    score_rollout,
    stream_hidden,
    tokenize_pairs,
)
from r2m.fitting.recipe import fit_head, warm_start
from r2m.method.updater import R2MUpdater
from r2m.policy.rollout import collate, micro_batches

WORDS = ["film", "story", "plot", "cast", "music", "ending"]
PAIRS = [Preference(f"the {word} is ", "good!", "so bad") for word in WORDS]
VANILLA = {"head_steps", "scale", "accuracy_vanilla", "loss_vanilla", "calibration_error_vanilla"}
FUSED = {"warm_start_steps", "accuracy_fused", "loss_fused", "calibration_error_fused", "mean_start", "ridge"}
FUSED |= {f"{measure}_from_{start}" for measure in ("accuracy", "loss") for start in ("mean", "drawn")}
HELD_OUT = [Preference(f"my {word} was ", "good!", "so bad") for word in WORDS[:3]]


@pytest.fixture
def reward_model(reward_checkpoint, policy):
    return tiny.reward_model(reward_checkpoint, policy)


def copies(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def preferences(count, seed, *, strength=4.0):
    """Embeddings [2 N, 24], chosen first, of deviation 10; chosen ones lie `strength` deviations higher on one axis."""
    torch.manual_seed(seed)
    rte = torch.randn(2 * count, 24) + 3
    rte[:count, 0] += strength
    return 10 * rte


# ---- the head ----


def test_the_head_separates_preferences_and_ends_with_mean_0_and_deviation_1(reward_model):
    rte, held_out = preferences(200, 0, strength=8.0), preferences(100, 1, strength=8.0)
    attention = copies(reward_model.attention)
    report = fit_head(reward_model, rte, held_out)
    rewards = reward_model.vanilla_score(rte)
    assert pair_accuracy(rewards) == 1
    assert report["accuracy_vanilla"] == pair_accuracy(reward_model.vanilla_score(held_out)) >= 0.98
    assert rewards.mean().item() == pytest.approx(0, abs=1e-5)
    assert rewards.std().item() == pytest.approx(1, abs=1e-5)
    assert reward_model.head.weight.argmax() == 0
    assert changed(reward_model.attention, attention) == set()


def test_the_head_forgets_what_it_was(reward_model):
    """A checkpoint's own head and a fresh one's noise have no say."""
    rte, held_out = preferences(20, 0), preferences(10, 1)
    fit_head(reward_model, rte, held_out)
    expected = reward_model.head.weight.clone()
    with torch.no_grad():
        reward_model.head.weight.normal_(std=100)
    fit_head(reward_model, rte, held_out)
    torch.testing.assert_close(reward_model.head.weight, expected)


def held_out_loss(reward_model, rte):
    chosen, rejected = reward_model.vanilla_score(rte).chunk(2)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean().item()


def test_the_fit_stops_where_the_held_out_loss_is_lowest(reward_model):
    """Fifteen pairs in 24 dimensions are separable by chance: the training loss alone never stops."""
    rte, held_out = preferences(15, 0, strength=1.5), preferences(200, 1, strength=1.5)
    overfitted = fit_head(reward_model, rte, rte)
    loss_of_the_overfitted = held_out_loss(reward_model, held_out)
    stopped = fit_head(reward_model, rte, held_out)
    assert 0 < stopped["head_steps"] < overfitted["head_steps"]
    assert held_out_loss(reward_model, held_out) < loss_of_the_overfitted


def test_a_head_that_learned_nothing_is_an_error_and_not_nan(reward_model):
    """Held-out pairs that contradict the training pairs: no step is better than indifference."""
    rte = preferences(20, 0)
    with pytest.raises(ValueError, match="held-out"):
        fit_head(reward_model, rte, preferences(20, 1, strength=-4.0))


def test_embeddings_that_are_not_finite_stop_the_fit(reward_model):
    with pytest.raises(FloatingPointError, match="Bradley-Terry fit of the head: the held-out loss is nan"):
        fit_head(reward_model, preferences(4, 0), preferences(4, 1) * math.nan)


def test_easy_pairs_end_the_fit_long_before_its_limit(reward_model, caplog):
    """Their loss falls by the same share in every step, without an end: what counts is what is left of the first."""
    caplog.set_level(logging.WARNING, logger="r2m")  # how far a slow fit is goes to the log, too
    rte, held_out = preferences(200, 0, strength=16.0), preferences(100, 1, strength=16.0)
    steps = fit_head(reward_model, rte, held_out)["head_steps"]
    assert 0 < steps < 1000
    assert pair_accuracy(reward_model.vanilla_score(held_out)) == 1
    assert caplog.messages == []
    assert fit_head(reward_model, rte, held_out, tolerance=0.1)["head_steps"] < steps


def test_a_limit_of_epochs_ends_the_fit_and_says_how_to_go_on(reward_model, caplog):
    caplog.set_level(logging.WARNING, logger="r2m")
    rte, held_out = preferences(20, 0), preferences(10, 1)
    assert fit_head(reward_model, rte, held_out, max_epochs=3)["head_steps"] == 3
    (line,) = caplog.messages
    assert line.startswith("Bradley-Terry fit of the head: the held-out loss was still falling, to 0.")
    assert line.endswith(", after 3 steps; to go on, set max_epochs (--max-epochs) to more than 3")


# ---- the warm start ----


def feedback(count, seed, *, sign=1.0):
    """Pairs in which chosen texts differ by their hidden states alone."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, 7, (2 * count,))
    hidden = torch.randn(int(lengths.sum()), 32)
    is_chosen = torch.repeat_interleave(torch.arange(2 * count) < count, lengths)
    hidden[:, 0] += sign * 3 * is_chosen
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    return Feedback(torch.randn(2 * count, 24), hidden, cu_seqlens, count)


def bradley_terry(reward_model, batch):
    return -torch.nn.functional.logsigmoid(fused_margins(reward_model, [batch])).mean().item()


def test_the_warm_start_learns_from_hidden_states_and_touches_the_attention_alone(reward_model):
    training, held_out = feedback(40, 0), feedback(20, 1)
    before, loss = copies(reward_model), bradley_terry(reward_model, held_out)
    scores = reward_model.vanilla_score(held_out.rte)
    report = warm_start(reward_model, [training], [held_out])
    assert "attention.w_v" in changed(reward_model, before) <= {f"attention.w_{x}" for x in "qkvo"}
    assert torch.equal(reward_model.vanilla_score(held_out.rte), scores)
    assert bradley_terry(reward_model, held_out) < loss
    fused = reward_model.score(held_out.rte, held_out.hidden, weight=0.6, cu_seqlens=held_out.cu_seqlens)
    assert report["accuracy_fused"] == pair_accuracy(fused)


def test_a_warm_start_that_does_not_help_changes_nothing(reward_model):
    before = copies(reward_model)
    report = warm_start(reward_model, [feedback(40, 0)], [feedback(20, 1, sign=-1.0)])
    assert report["warm_start_steps"] == 0
    assert not report["mean_start"]
    assert report["loss_fused"] == report["loss_from_drawn"] < report["loss_from_mean"]
    assert changed(reward_model, before) == set()


# ---- the mean start ----


@pytest.mark.parametrize("heads", [1, 2])
def test_the_mean_start_is_the_head_and_a_linear_reward_of_the_mean_state(reward_checkpoint, policy, heads):
    reward_model = tiny.reward_model(reward_checkpoint, policy, num_heads=heads, standardize=True)
    reward_model.set_statistics(3 * torch.randn(9, 24), torch.randn(32), torch.rand(32) + 0.5)
    batch = feedback(40, 0)
    scores, loss = reward_model.vanilla_score(batch.rte), bradley_terry(reward_model, batch)
    assert mean_start(reward_model, [batch]) in STRENGTHS
    assert torch.equal(reward_model.vanilla_score(batch.rte), scores)
    assert bradley_terry(reward_model, batch) < loss
    of_attention = reward_model.score(batch.rte, batch.hidden, cu_seqlens=batch.cu_seqlens) - 0.6 * scores
    means = torch.stack([rows.mean(0) for rows in batch.hidden.split(batch.cu_seqlens.diff().tolist())])
    means, of_attention = (x.double() - x.double().mean(0) for x in (means, of_attention.detach()))
    direction = torch.linalg.lstsq(means, of_attention).solution
    torch.testing.assert_close(means @ direction, of_attention, rtol=1e-4, atol=1e-4)


def test_training_goes_on_from_the_mean_start(reward_model):
    """W_q is 0 there, and so is the gradient of W_k, but W_q has one."""
    batch = feedback(40, 0)
    mean_start(reward_model, [batch])
    torch.nn.functional.softplus(-batch_margins(reward_model, batch)).mean().backward()
    gradients = {name: p.grad.abs().max() for name, p in reward_model.attention.named_parameters()}
    assert gradients.pop("w_k") == 0
    assert min(gradients.values()) > 0


def test_the_mean_start_is_kept_where_the_held_out_loss_is_lower(reward_model):
    report = warm_start(reward_model, [feedback(40, 0)], [feedback(20, 1)], max_epochs=1)
    assert report["mean_start"]
    assert report["loss_fused"] == report["loss_from_mean"] < report["loss_from_drawn"]
    assert report["accuracy_fused"] == report["accuracy_from_mean"]


def test_the_ridge_is_at_its_minimum_also_where_pairs_are_separable():
    torch.manual_seed(0)
    x, offsets = torch.randn(12, 30).double(), torch.randn(12).double()
    theta = ridge(x, offsets, 0.01, torch.zeros(30).double()).requires_grad_()
    loss = torch.nn.functional.softplus(-offsets - x @ theta).sum() + 0.005 * theta.square().sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    assert gradient.abs().max() < 1e-4


def test_cross_validation_trusts_clear_pairs_more_than_noise():
    torch.manual_seed(0)
    noise, offsets = torch.randn(100, 30), torch.zeros(100)
    _, of_noise = cross_validated(noise, offsets)
    clear = noise + torch.eye(30)[0] * 2
    direction, of_clear = cross_validated(clear, offsets)
    assert of_clear < of_noise
    assert direction.argmax() == 0
    assert cross_validated(noise[:1], offsets[:1])[1] == STRENGTHS[0]  # one pair leaves nothing to validate on


# ---- both, from texts ----


@pytest.mark.parametrize("standardize", [False, True], ids=["raw", "standardised"])
def test_a_reward_model_fitted_on_texts_ranks_held_out_texts(reward_checkpoint, policy, tokenizer, standardize):
    reward_model = tiny.reward_model(reward_checkpoint, policy, standardize=standardize)
    policy_before, backbone_before = copies(policy), copies(reward_model.backbone)
    report = fit_reward(reward_model, PAIRS, HELD_OUT, policy=policy, tokenizer=tokenizer, max_epochs=100)
    assert report.keys() == VANILLA | FUSED
    rte, rollout = embed_pairs(reward_model, HELD_OUT), tokenize_pairs(policy, tokenizer, HELD_OUT)
    vanilla = reward_model.vanilla_score(rte)
    assert report["accuracy_vanilla"] == pair_accuracy(vanilla) == 1
    assert report["accuracy_fused"] == pair_accuracy(score_rollout(reward_model, policy, rte, rollout, 0.6)) == 1
    torch.testing.assert_close(score_rollout(reward_model, policy, rte, rollout, 1.0), vanilla, rtol=1e-4, atol=1e-4)
    rewards = reward_model.vanilla_score(embed_pairs(reward_model, PAIRS))
    assert rewards.mean().item() == pytest.approx(0, abs=1e-4)
    assert rewards.std().item() == pytest.approx(1, abs=1e-4)
    if standardize:
        rte = embed_pairs(reward_model, PAIRS)
        packed, _ = pack_hidden(policy, tokenize_pairs(policy, tokenizer, PAIRS))
        torch.testing.assert_close(reward_model.rte_mean, rte.mean(0))
        torch.testing.assert_close(reward_model.rte_scale, rte.std(0))
        torch.testing.assert_close(reward_model.feedback_mean, packed.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reward_model.feedback_scale, packed.std(0, correction=0), rtol=1e-4, atol=1e-5)
    assert not reward_model.needs_statistics
    assert changed(policy, policy_before) == changed(reward_model.backbone, backbone_before) == set()


@pytest.mark.slow
def test_the_policy_adds_the_warm_start_and_leaves_head_and_statistics_as_they_are(
    reward_checkpoint, policy, tokenizer
):
    models = []
    for _ in range(2):
        models.append(tiny.reward_model(reward_checkpoint, policy, standardize=True))
        models[-1].set_statistics(3 * torch.randn(9, 24), torch.randn(32), torch.rand(32) + 0.5)
    head_only, both = models
    report = fit_reward(head_only, PAIRS, HELD_OUT)
    assert report.keys() == VANILLA
    other = fit_reward(both, PAIRS, HELD_OUT, policy=policy, tokenizer=tokenizer)
    assert report.items() <= other.items()
    assert changed(both, copies(head_only)) == {f"attention.w_{x}" for x in "qkvo"}


def test_a_head_that_is_kept_scores_as_before_and_the_attention_is_fitted_to_it(reward_model, policy, tokenizer):
    before = copies(reward_model)
    report = fit_reward(
        reward_model, PAIRS, HELD_OUT, policy=policy, tokenizer=tokenizer, keep_head=True, max_epochs=30
    )
    assert report.keys() == VANILLA | FUSED
    assert (report["head_steps"], report["scale"]) == (0, 1.0)
    assert report["accuracy_vanilla"] == pair_accuracy(reward_model.vanilla_score(embed_pairs(reward_model, HELD_OUT)))
    assert report["warm_start_steps"] > 0
    assert changed(reward_model, before) == {f"attention.w_{x}" for x in "qkvo"}


@pytest.mark.parametrize("positions", [None, "all", "response"])
def test_the_fit_reads_the_positions_of_the_reward_model_and_keeps_them(
    reward_checkpoint, policy, tokenizer, tmp_path, positions
):
    reward_model = tiny.reward_model(reward_checkpoint, policy, standardize=True, positions=positions)
    fit_reward(reward_model, PAIRS, HELD_OUT, policy=policy, tokenizer=tokenizer, max_epochs=2)
    read = positions or "all"
    packed, _ = pack_hidden(policy, tokenize_pairs(policy, tokenizer, PAIRS, read))
    torch.testing.assert_close(reward_model.feedback_mean, packed.mean(0), rtol=1e-4, atol=1e-5)
    held_out = tokenize_pairs(policy, tokenizer, HELD_OUT, read)
    rewards = score_rollout(reward_model, policy, embed_pairs(reward_model, HELD_OUT), held_out, 0.6)
    reward_model.save_pretrained(tmp_path)
    loaded = R2MRewardModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.positions == read
    with pytest.raises(ValueError, match=f"and the reward model was fitted on '{read}'; expected r2m.positions={read}"):
        R2MUpdater(loaded, R2M(positions="response" if read == "all" else "all"), total_steps=1, num_generations=2)
    again = score_rollout(loaded, policy, embed_pairs(loaded, HELD_OUT), held_out, 0.6)
    torch.testing.assert_close(again, rewards)


def test_a_reward_model_saved_before_positions_were_kept_goes_with_any(reward_model, tmp_path):
    reward_model.save_pretrained(tmp_path)
    file = tmp_path / "r2m_config.json"
    values = json.loads(file.read_text())
    del values["positions"]
    file.write_text(json.dumps(values))
    loaded = R2MRewardModel.from_pretrained(tmp_path)
    R2MUpdater(loaded, R2M(positions="response"), total_steps=1, num_generations=2)
    assert loaded.config.positions == "response"  # what a run trains on from now on


def test_a_tokenizer_without_padding_token_will_do(policy):
    expected = tokenize_pairs(policy, tiny.tokenizer(pad="</s>"), PAIRS)
    actual = tokenize_pairs(policy, tiny.tokenizer(pad=None), PAIRS)
    mask = expected.attention_mask
    assert torch.equal(actual.attention_mask, mask)
    assert torch.equal(actual.input_ids[mask], expected.input_ids[mask])


def test_chat_prompts_are_encoded_as_the_policy_samples_from_them(policy, tokenizer):
    chat = [{"role": "user", "content": "hi"}]
    rollout = tokenize_pairs(policy, tokenizer, [Preference(chat, "yes", "no, never")])
    texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(rollout.input_ids, rollout.attention_mask, strict=True)]
    assert texts == ["<s>user:hi</s><s>assistant:yes", "<s>user:hi</s><s>assistant:no, never"]


# ---- pieces ----


def test_pair_accuracy_counts_chosen_above_rejected_and_no_tie():
    assert pair_accuracy(torch.tensor([1.0, 2.0, 3.0, 5.0, 0.0, 2.0, 4.0, 4.0])) == 0.5


@pytest.fixture
def ragged():
    return collate(
        [""] * 7, [""] * 7, [[5] * n for n in (3, 1, 4, 2, 6, 1, 2)], [[7] * n for n in (1, 5, 2, 9, 1, 1, 3)], pad_id=0
    )


def passes(rollout, hidden, size):
    """Hidden states [B, P + R, D] of a rollout, as passes of `size` sequences give them."""
    width = rollout.input_ids.shape[1]
    for (part,) in micro_batches(rollout, size):
        taken = torch.full((*part.input_ids.shape, hidden.shape[-1]), torch.nan)
        taken[part.attention_mask] = hidden[part.rows][rollout.attention_mask[part.rows]]
        assert taken.shape[1] <= width
        yield part, taken


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_streamed_statistics_are_those_of_all_rows_at_once(ragged, batch_size, offset):
    torch.manual_seed(0)
    hidden = torch.randn(*ragged.feedback_mask.shape, 11) * torch.logspace(-2, 2, 11) + offset
    hidden[~ragged.feedback_mask] = torch.nan
    mean, scale = feature_statistics(passes(ragged, hidden, batch_size))
    variance, expected = torch.var_mean(hidden[ragged.feedback_mask].double(), 0, correction=0)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale.double(), variance.sqrt(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_statistics_skip_a_batch_without_feedback(batch_size):
    """Responses of one token have no feedback position of their own."""
    rollout = collate([""] * 4, [""] * 4, [[5]] * 4, [[7], [7], [7, 8, 9], [7, 8]], pad_id=0, positions="response")
    hidden = torch.randn(*rollout.feedback_mask.shape, 3)
    mean, scale = feature_statistics(passes(rollout, hidden, batch_size))
    expected = hidden[rollout.feedback_mask]
    torch.testing.assert_close(mean, expected.mean(0))
    torch.testing.assert_close(scale, expected.std(0, correction=0))


def test_statistics_of_nothing_are_an_error():
    rollout = collate([""] * 2, [""] * 2, [[5]] * 2, [[7]] * 2, pad_id=0, positions="response")
    with pytest.raises(ValueError, match="standardize: no text has a position whose hidden state counts"):
        feature_statistics(passes(rollout, torch.randn(2, 2, 3), 2))


def test_packed_and_padded_scores_of_pairs_agree(reward_model, policy, tokenizer):
    rollout, rte = tokenize_pairs(policy, tokenizer, PAIRS), embed_pairs(reward_model, PAIRS)
    hidden, cu_seqlens = pack_hidden(policy, rollout)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.diff().tolist() == rollout.feedback_mask.sum(-1).tolist()
    packed = reward_model.score(rte, hidden, weight=0.4, cu_seqlens=cu_seqlens)
    padded = score_rollout(reward_model, policy, rte, rollout, 0.4)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


def test_hidden_states_are_the_backbones_with_one_row_of_logits_and_the_mode_is_restored(policy, tokenizer):
    rollout = tokenize_pairs(policy, tokenizer, PAIRS)
    with torch.no_grad():
        expected = policy(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            output_hidden_states=True,
        ).hidden_states[-1]
    rows_of_logits = []
    policy.lm_head.register_forward_hook(lambda head, args, logits: rows_of_logits.append(logits.shape[1]))
    policy.train()
    batches = list(stream_hidden(policy, rollout, batch_size=5))
    assert policy.training
    assert rows_of_logits == [1, 1, 1]
    assert sorted(row for part, _ in batches for row in part.rows.tolist()) == list(range(len(rollout.prompts)))
    for part, hidden in batches:
        assert not hidden.requires_grad
        of_tokens = expected[part.rows][rollout.attention_mask[part.rows]]
        torch.testing.assert_close(hidden[part.attention_mask], of_tokens, rtol=1e-5, atol=1e-5)


# ---- bad input ----


@pytest.mark.parametrize(("pairs", "validation_pairs"), [([], HELD_OUT), (PAIRS, [])])
def test_no_pairs_is_an_error(reward_model, pairs, validation_pairs):
    message = f"{len(pairs)} pairs and {len(validation_pairs)} validation_pairs; expected at least 1 of each"
    with pytest.raises(ValueError, match=message):
        fit_reward(reward_model, pairs, validation_pairs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_head": True}, "keep_head is True without a policy, so that nothing is fitted; expected a policy"),
        ({"max_epochs": 0}, "max_epochs is 0; expected at least 1"),
        ({"tolerance": 1.0}, "tolerance is 1.0; expected a share, at least 0 and less than 1"),
    ],
)
def test_settings_that_fit_nothing_are_an_error(reward_model, given, message):
    with pytest.raises(ValueError, match=message):
        fit_reward(reward_model, PAIRS, HELD_OUT, **given)


def test_a_head_is_not_kept_beside_an_adapter_that_trains_it(reward_model, policy, tokenizer):
    with pytest.raises(ValueError, match="keep_head is True with lora_rank 2; expected a policy, and lora_rank 0"):
        fit_reward(reward_model, PAIRS, HELD_OUT, policy=policy, tokenizer=tokenizer, keep_head=True, lora_rank=2)


def test_positions_have_two_names(reward_checkpoint, policy):
    with pytest.raises(ValueError, match="positions is 'prompt'; expected 'all' or 'response'"):
        tiny.reward_model(reward_checkpoint, policy, positions="prompt")


def test_a_policy_without_its_tokenizer_is_an_error(reward_model, policy):
    with pytest.raises(ValueError, match="tokenizer is None; expected the policy's tokenizer"):
        fit_reward(reward_model, PAIRS, HELD_OUT, policy=policy)
