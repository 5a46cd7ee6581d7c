"""The streamed round of the reward model against equations 1-6 written out, with projected keys and values."""

import copy
import io
import math

import pytest
import tiny
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from r2m.config import R2M
from r2m.method.updater import R2MUpdater
from r2m_kernels.attention_pool import reference
from r2m_kernels.grebt import reference as grebt_reference

GROUPS, K = 3, 4
ROUND = GROUPS * K
# Micro-batches of one round: rows, and how wide their hidden states are padded.
MICRO_BATCHES = [(slice(0, 5), 9), ([7, 5, 11], 4), (slice(8, 11), 17), ([6], 1)]

METRICS = {"grebt/loss", "grebt/bt", "grebt/entropy", "grebt/pair_flips", "rm/attended_tokens"}


def make_updater(checkpoint, policy, *, total_steps=10, dtype=torch.float64, model=None, **settings):
    model = model or {}
    statistics = model.get("standardize", False)
    reward_model = tiny.reward_model(checkpoint, policy, **model).to(dtype)
    if statistics:
        torch.manual_seed(5)
        samples = torch.randn(50, 24, dtype=dtype) * 3 - 1
        reward_model.set_statistics(samples, torch.randn(32, dtype=dtype), torch.rand(32, dtype=dtype) + 0.5)
    settings = R2M(**({"learning_rate": 1e-2} | settings))
    return R2MUpdater(reward_model, settings, total_steps=total_steps, num_generations=K)


class Round:
    """Random embeddings and ragged hidden states; what is masked holds NaN."""

    def __init__(self, seed=0, dtype=torch.float64):
        torch.manual_seed(seed)
        self.rte = torch.randn(ROUND, 24, dtype=dtype)
        self.batches = []
        for rows, width in MICRO_BATCHES:
            size = len(range(ROUND)[rows]) if isinstance(rows, slice) else len(rows)
            mask = torch.rand(size, width) < 0.7
            mask[torch.arange(size), torch.randint(width, (size,))] = True
            hidden = (torch.randn(size, width, 32, dtype=dtype) + 0.5).masked_fill(~mask[..., None], torch.nan)
            self.batches.append((rows, hidden, mask))

    def valid(self):
        """The hidden states that count, one tensor [length, D_p] a sequence, in the order of the round."""
        sequences = [None] * ROUND
        for rows, hidden, mask in self.batches:
            for i, row in enumerate(torch.arange(ROUND)[rows].tolist()):
                sequences[row] = hidden[i][mask[i]]
        return sequences

    def score(self, updater):
        rewards = torch.full((ROUND,), torch.nan, dtype=self.rte.dtype)
        for rows, hidden, mask in self.batches:
            rewards[rows] = updater.score(rows, hidden, mask)
        return rewards

    def collect(self, updater):
        for rows, hidden, mask in self.batches:
            updater.collect(rows, hidden, mask)


def expected_rewards(reward_model, rte, sequences, weight):
    """Equations 1-3 as they stand in the paper, keys and values projected."""
    a, heads = reward_model.attention, reward_model.config.num_heads
    rte = (rte - reward_model.rte_mean) / reward_model.rte_scale
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    aggregated = reference.sequence_to_token_attention(
        rte,
        (torch.cat(sequences) - reward_model.feedback_mean) / reward_model.feedback_scale,
        a.w_q, a.w_k, a.w_v, a.w_o, num_heads=heads, cu_seqlens=lengths.cumsum(0),
    )  # fmt: skip
    return ((1 - weight) * aggregated + weight * rte) @ reward_model.head.weight + reward_model.head.bias


MODELS = [
    pytest.param({"num_heads": heads, "standardize": standardize}, id=f"{heads}-heads{'-standardised' * standardize}")
    for heads in (1, 2)
    for standardize in (False, True)
]


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("model", MODELS)
def test_streamed_scores_are_equations_1_to_3(reward_checkpoint, policy, model, step):
    updater, data = make_updater(reward_checkpoint, policy, model=model), Round()
    updater.begin_round(data.rte, step)
    weight = max(math.cos(math.pi * step / 10) / 2 + 0.5, 0.6)
    expected = expected_rewards(updater.reward_model, data.rte, data.valid(), weight)
    torch.testing.assert_close(data.score(updater), expected)


@pytest.mark.parametrize("model", MODELS)
def test_a_sequence_without_feedback_attends_to_nothing(reward_checkpoint, policy, model):
    """Such as a response of one token where positions are those of the response: its A is 0."""
    updater, data = make_updater(reward_checkpoint, policy, model=model), Round()
    rows, hidden, mask = data.batches[0]
    hidden[1], mask[1] = torch.nan, False
    reward_model = updater.reward_model
    updater.begin_round(data.rte, 8)
    expected = expected_rewards(reward_model, data.rte, data.valid(), updater.weight)
    alone = updater.weight * reward_model.standardized(data.rte[1]) @ reward_model.head.weight + reward_model.head.bias
    torch.testing.assert_close(expected[1:2], alone)
    torch.testing.assert_close(data.score(updater), expected)
    torch.testing.assert_close(
        reward_model.score(data.rte[rows], hidden, weight=updater.weight, mask=mask), expected[rows]
    )
    data.collect(updater)
    pools = updater._pooled, updater._gradient
    rewards = reward_model.reward(updater._absorbed, *pools, updater.weight, lse=updater._lse)
    torch.testing.assert_close(rewards, expected)
    assert math.isfinite(updater.step(expected.detach())["rm/grad_norm"])


def test_scores_of_bfloat16_hidden_states_are_float32(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy, dtype=torch.float32), Round(dtype=torch.float32)
    data.batches = [(rows, hidden.bfloat16(), mask) for rows, hidden, mask in data.batches]
    updater.begin_round(data.rte, 5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = data.score(updater)
    assert actual.dtype == torch.float32
    sequences = [sequence.float() for sequence in data.valid()]
    expected = expected_rewards(updater.reward_model, data.rte, sequences, updater.weight)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair_source", ["annotated", "recomputed"])
@pytest.mark.parametrize("model", MODELS)
def test_rounds_move_the_weights_as_autograd_through_projected_keys_and_values(
    reward_checkpoint, policy, model, pair_source
):
    settings = {"alpha": 0.4, "eps": 1e-2, "pair_source": pair_source, "weight_decay": 0.1, "max_grad_norm": 0.5}
    ours = make_updater(reward_checkpoint, policy, model=model, **settings)
    exact = make_updater(reward_checkpoint, policy, model=model).reward_model
    trained = [p for p in exact.parameters() if p is not exact.head.bias]  # GREBT sees no shift of all rewards
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for step in (4, 5, 6):
        annotated = Round(step)
        refreshed = Round(step + 100)  # the policy moved between scoring and the last epoch
        with torch.no_grad():  # as the scoring pass of a trainer runs
            ours.begin_round(annotated.rte, step)
            scores = annotated.score(ours)
        refreshed.collect(ours)
        metrics = ours.step(scores)

        rewards = expected_rewards(exact, annotated.rte, refreshed.valid(), ours.weight).view(GROUPS, K)
        picked_by = scores.view(GROUPS, K) if pair_source == "annotated" else None
        losses, _ = grebt_reference.grebt_loss(rewards, alpha=0.4, eps=1e-2, pair_scores=picked_by)
        optimizer.zero_grad()
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(exact.parameters(), 0.5)
        optimizer.step()
        assert metrics["grebt/loss"] == pytest.approx(losses.mean().item(), rel=1e-10)
        assert metrics["rm/grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
    for (name, weight), other in zip(ours.reward_model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-8, msg=name)


def test_hidden_states_are_freed_as_soon_as_they_were_read(reward_checkpoint, policy):
    updater = make_updater(reward_checkpoint, policy, dtype=torch.float32)
    updater.begin_round(torch.randn(ROUND, 24), 1)
    for read in (updater.score, updater.collect):
        hidden = torch.randn(ROUND, 6, 32)
        storage = StorageWeakRef(hidden.untyped_storage())
        read(slice(None), hidden, torch.ones(ROUND, 6, dtype=torch.bool))
        assert not storage.expired()
        del hidden
        assert storage.expired()


def bytes_held(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(bytes_held(item) for item in value) if isinstance(value, (list, tuple)) else 0


def test_what_is_kept_of_a_round_does_not_grow_with_the_length(reward_checkpoint, policy):
    sizes = []
    for length in (8, 512):
        updater = make_updater(reward_checkpoint, policy, dtype=torch.float32)
        updater.begin_round(torch.randn(ROUND, 24), 1)
        for read in (updater.score, updater.collect):
            read(slice(None), torch.randn(ROUND, length, 32), torch.ones(ROUND, length, dtype=torch.bool))
        sizes.append(bytes_held(list(vars(updater).values())))
    assert sizes[0] == sizes[1] < 8 * (ROUND * 32 * 4)  # a few vectors of the policy's width a sequence


def test_a_step_without_every_sequence_says_how_many_are_missing(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy), Round()
    updater.begin_round(data.rte, 1)
    for rows, hidden, mask in data.batches[:2] + data.batches[3:]:
        updater.collect(rows, hidden, mask)
    with pytest.raises(RuntimeError, match="3 of 12 sequences of this round were never collected"):
        updater.step(torch.zeros(ROUND))


def test_a_new_round_forgets_what_was_collected(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy), Round()
    updater.begin_round(data.rte, 1)
    data.collect(updater)
    updater.begin_round(data.rte, 2)
    with pytest.raises(RuntimeError, match="12 of 12 sequences"):
        updater.step(torch.zeros(ROUND))


def copies(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in after if not torch.equal(after[name], before[name])] == []


def one_round(updater, data, step):
    updater.begin_round(data.rte, step)
    scores = data.score(updater)
    data.collect(updater)
    return updater.step(scores)


def test_frozen_feedback_measures_what_trained_feedback_does_and_changes_nothing(reward_checkpoint, policy):
    frozen, trained = (make_updater(reward_checkpoint, policy, feedback=f) for f in ("frozen", "trained"))
    before, data = copies(frozen.reward_model), Round()
    measured, other = one_round(frozen, data, 3), one_round(trained, data, 3)
    assert measured.keys() == METRICS
    assert other.keys() == METRICS | {"rm/grad_norm"}
    assert measured == {name: other[name] for name in METRICS}
    assert_unchanged(frozen.reward_model, before)
    assert frozen.state_dict()["optimizer"]["state"] == {}


def round_with_rewards(checkpoint, policy, rewards, **settings):
    """An updater in a round whose recomputed rewards are `rewards` [n, K], whatever the hidden states are."""
    updater = make_updater(checkpoint, policy, model={"zero_output": True}, **settings)
    with torch.no_grad():
        updater.reward_model.head.weight.copy_(torch.eye(24)[0])
        updater.reward_model.head.bias.zero_()
    rte = torch.zeros(rewards.numel(), 24, dtype=torch.float64)
    rte[:, 0] = rewards.flatten() / 0.6
    updater.begin_round(rte, 10)
    hidden = torch.randn(rewards.numel(), 3, 32, dtype=torch.float64)
    updater.collect(slice(None), hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
    return updater


# Group 1: the same pair. Group 2: the opposite pair. Group 3: annotated all equal, so first against last.
ANNOTATED = torch.tensor([[9.0, 1, 2, 0], [4, 3, 2, 1], [5, 5, 5, 5]], dtype=torch.float64)
RECOMPUTED = torch.tensor([[3.0, 1, 2, 0], [0, 1, 2, 3], [1, 9, 0, 3]], dtype=torch.float64)


@pytest.mark.parametrize(("pair_source", "margins"), [("annotated", [3, -3, -2]), ("recomputed", [3, 3, 9])])
def test_pairs_come_from_the_chosen_source_and_margins_from_the_recomputed_rewards(
    reward_checkpoint, policy, pair_source, margins
):
    updater = round_with_rewards(reward_checkpoint, policy, RECOMPUTED, pair_source=pair_source)
    metrics = updater.step(ANNOTATED.flatten())
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 3
    assert metrics["grebt/bt"] == pytest.approx(expected)
    assert metrics["grebt/pair_flips"] == pytest.approx(2 / 3)
    assert metrics["grebt/loss"] == pytest.approx(0.7 * metrics["grebt/bt"] + 0.3 * metrics["grebt/entropy"])


def test_pairs_that_agree_are_no_flips(reward_checkpoint, policy):
    updater = round_with_rewards(reward_checkpoint, policy, RECOMPUTED)
    assert updater.step(7 * RECOMPUTED.flatten() - 3)["grebt/pair_flips"] == 0


def test_recomputed_pairs_never_lose(reward_checkpoint, policy):
    for seed in range(5):
        torch.manual_seed(seed)
        rewards = torch.randn(3, K, dtype=torch.float64) * 10.0 ** (seed - 3)
        updater = round_with_rewards(reward_checkpoint, policy, rewards, pair_source="recomputed")
        assert updater.step(torch.randn(3 * K).double())["grebt/bt"] <= math.log(2)


def test_a_nan_in_the_hidden_states_stops_the_step_and_changes_nothing(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy), Round()
    updater.begin_round(data.rte, 1)
    scores = data.score(updater)
    _, hidden, mask = data.batches[2]
    hidden[1, mask[1].nonzero()[0]] = torch.nan
    data.collect(updater)
    before = copies(updater.reward_model)
    with pytest.raises(FloatingPointError, match="GREBT loss is nan: a reward of this round is not finite"):
        updater.step(scores)
    assert_unchanged(updater.reward_model, before)


@pytest.mark.parametrize("model", MODELS)
def test_attended_tokens_is_the_exponential_of_the_attentions_entropy(reward_checkpoint, policy, model):
    updater, data = make_updater(reward_checkpoint, policy, model=model), Round()
    m, heads = updater.reward_model, model["num_heads"]
    perplexities = []
    for rte, sequence in zip(m.standardized(data.rte), data.valid(), strict=True):
        q = (m.attention.w_q @ rte).view(heads, -1)
        k = ((sequence - m.feedback_mean) / m.feedback_scale @ m.attention.w_k.T).view(len(sequence), heads, -1)
        for head in range(heads):
            p = torch.softmax(k[:, head] @ q[head] / math.sqrt(q.shape[1]), 0)
            perplexities.append((-(p * p.log()).sum()).exp().item())
    metrics = one_round(updater, data, 2)
    assert metrics["rm/attended_tokens"] == pytest.approx(sum(perplexities) / len(perplexities), rel=1e-9)


def test_attention_that_prefers_nothing_attends_to_every_valid_token(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy), Round()
    with torch.no_grad():
        updater.reward_model.attention.w_k.zero_()
    lengths = [len(sequence) for sequence in data.valid()]
    assert one_round(updater, data, 2)["rm/attended_tokens"] == pytest.approx(sum(lengths) / ROUND)


@pytest.mark.parametrize("step", [1, 10])
@pytest.mark.parametrize("model", MODELS)
def test_alignment_is_the_correlation_of_the_reward_at_omega_with_the_one_given(reward_checkpoint, policy, model, step):
    updater, data = make_updater(reward_checkpoint, policy, model=model, floor=0.3), Round()
    updater.begin_round(data.rte, step)
    data.score(updater)
    fused = expected_rewards(updater.reward_model, data.rte, data.valid(), 0.3)
    initial = torch.randn(ROUND, dtype=torch.float64)
    covariance = ((fused - fused.mean()) * (initial - initial.mean())).mean()
    expected = covariance / (fused.std(correction=0) * initial.std(correction=0))
    assert updater.alignment(initial).item() == pytest.approx(expected.item(), rel=1e-9)


def test_without_weight_on_feedback_the_fused_reward_is_the_vanilla_one(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy, floor=1.0), Round()
    updater.begin_round(data.rte, 3)
    scores = data.score(updater)
    torch.testing.assert_close(scores, updater.reward_model.vanilla_score(data.rte))
    assert updater.alignment(scores).item() == 1


@pytest.mark.parametrize("feedback", ["frozen", "trained"])
def test_anchored_rewards_spread_in_groups_as_the_initial_heads_did_a_round_before(reward_checkpoint, policy, feedback):
    settings = {"feedback": feedback, "learning_rate": 0.1}
    anchored = make_updater(reward_checkpoint, policy, scale_anchor=True, **settings)
    plain = make_updater(reward_checkpoint, policy, **settings)
    initial_head, scale = copy.deepcopy(plain.reward_model.head), 1.0
    for step in (7, 8, 9):
        data = Round(step)
        for updater in (anchored, plain):
            updater.begin_round(data.rte, step)
        rewards, raw = data.score(anchored), data.score(plain)
        torch.testing.assert_close(rewards, scale * raw)
        data.collect(anchored), data.collect(plain)
        row, plain_row = anchored.step(rewards), plain.step(raw)
        assert row.pop("reward/scale") == pytest.approx(scale)
        assert row == pytest.approx(plain_row)  # the update of the reward model is that of plain R2M
        initial = initial_head(data.rte).view(GROUPS, K)
        variance = [groups.var(1, correction=0).mean() for groups in (initial, raw.view(GROUPS, K))]
        scale = (variance[0] / variance[1]).sqrt().item()
        assert abs(scale - 1) > 0.05


def test_groups_without_spread_leave_the_scale_as_it_is(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy, scale_anchor=True), Round()
    with torch.no_grad():
        updater.reward_model.head.weight.zero_()
    assert one_round(updater, data, 5)["reward/scale"] == 1.0 and updater.scale == 1.0


@pytest.mark.parametrize(("feedback", "k"), [("frozen", 1), ("none", 4), ("head", 4)])
def test_an_anchor_of_what_does_not_change_is_an_error(reward_checkpoint, policy, feedback, k):
    settings = R2M(feedback=feedback, scale_anchor=True)
    with pytest.raises(ValueError, match=f"scale_anchor is True with feedback '{feedback}' and num_generations {k};"):
        R2MUpdater(tiny.reward_model(reward_checkpoint, policy), settings, total_steps=2, num_generations=k)


@pytest.mark.parametrize("scale_anchor", [False, True])
def test_a_restored_updater_goes_on_with_the_same_bits(reward_checkpoint, policy, scale_anchor):
    straight = make_updater(reward_checkpoint, policy, dtype=torch.float32, scale_anchor=scale_anchor)
    for step in (1, 2):
        one_round(straight, Round(step, torch.float32), step)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    model_state = copies(straight.reward_model)

    restored = make_updater(
        reward_checkpoint, policy, dtype=torch.float32, model={"seed": 9}, scale_anchor=scale_anchor
    )
    restored.reward_model.load_state_dict(model_state)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for step in (3, 4):
        data = Round(step, torch.float32)
        assert one_round(restored, data, step) == one_round(straight, data, step)
    assert_unchanged(restored.reward_model, copies(straight.reward_model))


def test_the_weight_follows_equation_2(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy, total_steps=7, floor=0.65), Round()
    weights = []
    for step in range(1, 8):
        updater.begin_round(data.rte, step)
        weights.append(updater.weight)
    assert weights == pytest.approx([max(math.cos(math.pi * t / 7) / 2 + 0.5, 0.65) for t in range(1, 8)])
    assert weights[-1] == 0.65
    for step in (0, 8):
        with pytest.raises(ValueError, match=f"1 <= step <= total_steps = 7, got {step}"):
            updater.begin_round(data.rte, step)


# ---- margins of kept pairs ----

PAIRS = [(2, 0), (7, 5), (8, 11)]


def expected_margins(updater, data):
    rewards = expected_rewards(updater.reward_model, data.rte, data.valid(), updater.weight)
    return torch.stack([rewards[i] - rewards[j] for i, j in PAIRS])


@pytest.mark.parametrize("model", MODELS)
def test_kept_pairs_give_this_rounds_margins_in_later_rounds(reward_checkpoint, policy, model):
    """Exact in W_v, W_o, the head and w; what W_q and W_k move leaves an error of second order."""
    updater, data = make_updater(reward_checkpoint, policy, model=model), Round()
    updater.begin_round(data.rte, 1)  # where w is nearly 1, and V nearly 0
    data.collect(updater)
    kept = updater.keep(PAIRS)
    attention, head = updater.reward_model.attention, updater.reward_model.head

    def errors():
        updater.begin_round(data.rte, 8)
        return (updater.margins(kept) - expected_margins(updater, data)).abs().max().item()

    torch.manual_seed(3)
    with torch.no_grad():
        for p in (attention.w_v, attention.w_o, head.weight, head.bias):
            p += 0.3 * torch.randn_like(p)
    assert errors() < 1e-9
    updater.begin_round(data.rte, 8)
    data.collect(updater)
    kept = updater.keep(PAIRS)
    moves = [1e-2 * torch.randn_like(attention.w_q), 1e-2 * torch.randn_like(attention.w_k)]
    found = []
    for _ in range(2):
        with torch.no_grad():
            attention.w_q += moves[0]
            attention.w_k += moves[1]
        found.append(errors())
    assert 0 < found[1] < 4.5 * found[0]  # twice as far, four times the error


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_kept_margins_are_those_of_projected_keys_and_values(reward_checkpoint, policy, model):
    """To float64's rounding; in W_q and W_k, by way of slopes, to bfloat16's."""
    updater, data = make_updater(reward_checkpoint, policy, model=model), Round()
    updater.begin_round(data.rte, 8)
    data.collect(updater)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    margins, expected = updater.margins(updater.keep(PAIRS)), expected_margins(updater, data)
    torch.testing.assert_close(margins, expected)
    attention = updater.reward_model.attention
    exact = [attention.w_v, attention.w_o, updater.reward_model.head.weight]
    by_slope = [attention.w_q, attention.w_k]
    for trained, error in ((exact, 1e-7), (by_slope, 4e-3)):
        ours, theirs = (
            torch.autograd.grad((x * weights).sum(), trained, retain_graph=True) for x in (margins, expected)
        )
        for own, other in zip(ours, theirs, strict=True):
            assert (own - other).norm() <= error * other.norm()


def test_a_pair_keeps_no_more_than_four_vectors_in_float32(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy, dtype=torch.float32), Round(dtype=torch.float32)
    updater.begin_round(data.rte, 8)
    data.collect(updater)
    assert sum(x.nbytes for x in updater.keep(PAIRS)) == len(PAIRS) * 4 * (2 * (24 + 32) + 2)
    assert updater.margins(updater.keep([])).shape == (0,)


def test_a_pair_with_a_sequence_without_feedback(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy, model={"standardize": True}), Round()
    updater.begin_round(data.rte, 8)
    scores = data.score(updater)
    data.collect(updater)
    empty = torch.zeros(1, 3, dtype=torch.bool)
    scores[0] = updater.score([0], torch.zeros(1, 3, 32, dtype=torch.float64), empty)
    updater.collect([0], torch.zeros(1, 3, 32, dtype=torch.float64), empty)
    margins = updater.margins(updater.keep([(0, 1), (1, 0), (1, 2)]))
    torch.testing.assert_close(
        margins, torch.stack([scores[0] - scores[1], scores[1] - scores[0], scores[1] - scores[2]])
    )


def test_without_feedback_what_is_kept_are_the_embeddings(reward_checkpoint, policy):
    updater, data = make_updater(reward_checkpoint, policy, feedback="head"), Round()
    updater.begin_round(data.rte, 1)
    kept = updater.keep([(1, 3)])
    assert sum(x.numel() for x in kept) == 2 * 24
    first, second = updater.reward_model.vanilla_score(data.rte[[1, 3]])
    torch.testing.assert_close(updater.margins(kept), (first - second)[None])


def test_labels_are_learned_from_beside_grebt_or_in_its_place(reward_checkpoint, policy):
    data, moved = Round(), {}
    for grebt, labelled in ((1.0, False), (1.0, True), (0.0, True), (0.0, False)):
        updater = make_updater(reward_checkpoint, policy)
        before = updater.reward_model.head.weight.clone()
        updater.begin_round(data.rte, 8)
        scores = data.score(updater)
        data.collect(updater)
        margin = updater.margins(updater.keep([(0, 1)]))
        updater.step(scores, margin.sum() if labelled else None, grebt=grebt)
        moved[grebt, labelled] = updater.reward_model.head.weight - before
    assert torch.count_nonzero(moved[0, False]) == 0
    assert len({tuple(x.tolist()) for x in moved.values()}) == 4
