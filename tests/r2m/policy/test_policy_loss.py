"""The policy objective and the advantages against formulas written out by hand."""

import math

import pytest
import torch

from r2m.algorithms import grpo_advantages, reinforce_plus_plus_advantages, rloo_advantages
from r2m.policy.loss import importance_ratios, policy_loss, sequence_kl, token_entropy, token_log_probs


def test_rloo_advantage_is_the_reward_minus_the_mean_of_the_others():
    rewards = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.stack(
        [rewards[:, j] - torch.cat([rewards[:, :j], rewards[:, j + 1 :]], 1).mean(1) for j in range(4)], 1
    )
    torch.testing.assert_close(rloo_advantages(rewards), expected)


def test_grpo_advantage_divides_by_the_sample_deviation():
    assert grpo_advantages(torch.tensor([[1.0, 3.0]])).tolist()[0] == pytest.approx(
        [-(1 / (2**0.5 + 1e-4)), 1 / (2**0.5 + 1e-4)]
    )


def test_reinforce_plus_plus_normalises_the_returns_of_all_tokens():
    """By hand: returns 1 - 0.5 * (what is to come of -1, 2, 1), then -3 - 0.5 * 4."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    token_kl = torch.tensor([[-1.0, 2.0, 1.0], [4.0, 99.0, 99.0]])
    returns = torch.tensor([0.0, -0.5, 0.5, -5.0], dtype=torch.float64)
    expected = (returns - returns.mean()) / (returns.std(correction=0) + 1e-4)
    actual = reinforce_plus_plus_advantages(torch.tensor([1.0, -3.0]), token_kl, mask, beta=0.5)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual[mask].double(), expected, rtol=1e-6, atol=1e-6)
    assert actual[~mask].tolist() == [0, 0]


def test_reinforce_plus_plus_of_returns_far_from_zero_and_all_alike():
    torch.manual_seed(0)
    mask = torch.arange(50) < torch.randint(1, 51, (200, 1))
    scores, token_kl = 1e4 + torch.randn(200), 0.1 * torch.randn(200, 50)
    to_come = (token_kl * mask).double().flip(1).cumsum(1).flip(1)
    returns = (scores.double()[:, None] - 0.3 * to_come)[mask]
    actual = reinforce_plus_plus_advantages(scores, token_kl, mask, beta=0.3)[mask]
    # float32 holds scores of 1e4 to 1e-3
    torch.testing.assert_close(actual.double(), (returns - returns.mean()) / returns.std(), rtol=1e-3, atol=2e-3)
    alike = reinforce_plus_plus_advantages(torch.full((200,), 0.1), token_kl, mask, beta=0.0)
    assert alike.abs().max() < 1e-3


@pytest.mark.parametrize("advantages", [rloo_advantages, grpo_advantages])
def test_a_group_of_one_is_an_error(advantages):
    with pytest.raises(ValueError, match=r"shape \(3, 1\); expected \[n, K\] with K >= 2"):
        advantages(torch.randn(3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_log_probs_and_their_gradient_match_float64(dtype):
    logits = (3 * torch.randn(7, 41, 50)).to(dtype).requires_grad_()  # 287 rows: more than two blocks
    ids = torch.randint(50, (7, 41))
    upstream = torch.randn(7, 41)
    exact = logits.detach().double().requires_grad_()
    expected = (exact / 0.7).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    expected.backward(upstream.double())
    actual = token_log_probs(logits, ids, 0.7)
    actual.backward(upstream)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_entropy_matches_the_categorical_distribution_and_survives_a_masked_vocabulary():
    logits = 2 * torch.randn(3, 5, 30)
    expected = torch.distributions.Categorical(logits=logits / 0.5).entropy()
    torch.testing.assert_close(token_entropy(logits, 0.5), expected, rtol=1e-5, atol=1e-5)
    logits[..., 10:] = -torch.inf
    expected = torch.distributions.Categorical(logits=logits[..., :10] / 0.5).entropy()
    torch.testing.assert_close(token_entropy(logits, 0.5), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    old = -torch.rand(3, 4)
    return {
        "log_probs": old + 0.3 * torch.randn(3, 4),
        "old_log_probs": old,
        "reference_log_probs": old + 0.3 * torch.randn(3, 4),
        "advantages": torch.tensor([1.0, -2.0, 0.5]),
        "mask": mask,
    }


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize(("ratio_of", "advantage_of"), [("sequence",) * 2, ("token", "sequence"), ("token",) * 2])
def test_the_loss_is_the_one_written_out_by_hand(batch, ratio_of, advantage_of, estimator):
    beta, clip = 0.1, 0.2
    of_tokens = ratio_of == "token"
    if advantage_of == "token":
        batch["advantages"] = torch.tensor([[1.0, -2.0, 0.5, 3.0], [-1.0, 2.0, 9.0, 9.0], [0.7, 9.0, 9.0, 9.0]])
    loss, _ = policy_loss(**batch, ratio_of=ratio_of, clip_range=clip, beta=beta, estimator=estimator)
    for i, length in enumerate([4, 2, 1]):
        log_probs, old, reference = (
            batch[k][i, :length] for k in ("log_probs", "old_log_probs", "reference_log_probs")
        )
        advantage, d = batch["advantages"][i], reference - log_probs
        advantage = advantage[:length] if advantage_of == "token" else advantage
        kl = d**2 / 2 if estimator == "k2" else d.exp() - 1 - d
        ratio = (log_probs - old).exp() if of_tokens else (log_probs - old).sum().exp()
        objective = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        expected = (beta * kl - objective).mean() if of_tokens else beta * kl.sum() - objective
        torch.testing.assert_close(loss[i], expected)


@pytest.mark.parametrize("ratio_of", ["sequence", "token"])
def test_what_is_past_the_end_changes_nothing(batch, ratio_of):
    settings = {"ratio_of": ratio_of, "clip_range": 0.2, "beta": 0.1, "estimator": "k3"}
    before, _ = policy_loss(**batch, **settings)
    for name in ("log_probs", "old_log_probs", "reference_log_probs"):
        batch[name] = torch.where(batch["mask"], batch[name], torch.full((), -7.0))
    after, _ = policy_loss(**batch, **settings)
    torch.testing.assert_close(after, before)


def test_a_clipped_sequence_has_no_gradient_and_is_counted(batch):
    log_probs = (batch["old_log_probs"] + torch.tensor([[1.0], [-1.0], [0.0]])).requires_grad_()
    loss, stats = policy_loss(
        **(batch | {"log_probs": log_probs}), ratio_of="sequence", clip_range=0.2, beta=0.0, estimator="k3"
    )
    loss.sum().backward()
    assert log_probs.grad[:2].abs().sum() == 0  # above, where the advantage is positive, and below, where it is not
    assert log_probs.grad[2].abs().sum() > 0
    assert stats["clip_share"].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("ratio_of", ["sequence", "token"])
def test_weights_scale_each_tokens_gradient_in_the_objective_and_no_value(batch, ratio_of):
    weights = torch.tensor([[0.5, 2.0, 1.0, 0.0], [1.5, 0.1, 1.0, 1.0], [0.7, 1.0, 1.0, 1.0]])

    def run(beta, weights):
        log_probs = batch["log_probs"].clone().requires_grad_()
        settings = {"ratio_of": ratio_of, "clip_range": 0.2, "beta": beta, "estimator": "k3", "weights": weights}
        loss, stats = policy_loss(**(batch | {"log_probs": log_probs}), **settings)
        loss.sum().backward()
        return loss.detach(), stats, log_probs.grad

    loss, stats, objective = run(0.0, None)
    kl = run(0.1, None)[2] - objective
    weighted_loss, weighted_stats, weighted = run(0.0, weights)
    torch.testing.assert_close(weighted, objective * weights)
    assert torch.equal(weighted_loss, loss) and all(torch.equal(stats[k], weighted_stats[k]) for k in stats)
    torch.testing.assert_close(run(0.1, weights)[2], objective * weights + kl)


def test_importance_ratios_are_of_the_responses_tokens():
    log_probs, sampled = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
    ratios = importance_ratios(log_probs, sampled, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(ratios, torch.tensor([[math.exp(0.5), math.exp(-1.0), 1.0]]))


def test_sequence_kl_sums_the_valid_tokens():
    kl = sequence_kl(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -9.0]]), torch.tensor([[True, False]]))
    assert kl.tolist() == [0.5]
