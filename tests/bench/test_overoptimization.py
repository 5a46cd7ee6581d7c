"""The testbed of overoptimisation: judges and statistics by hand, the shared trunk on a tiny model."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.overoptimization import analysis, gold, testbed
from benchmarks.overoptimization.analysis import Curve
from benchmarks.overoptimization.model import RecordingGenerator, Trunk, share
from benchmarks.overoptimization.run import path_of, pending, plan
from benchmarks.overoptimization.testbed import ARMS, SCENARIOS, Run
from r2m.config import Generation
from r2m.policy.rollout import sample
from tests.r2m import tiny

# ---- gold ----

TEXTS = ["the film was good", "the film was bad , the film was long", "a good film"]


def test_trigrams_against_witten_bell_by_hand():
    model = gold.Trigrams(TEXTS)
    read = [["<", "<", *text.split()] for text in TEXTS]
    base = len({word for text in TEXTS for word in text.split()}) + 2

    def probability(history, word):
        """Of a word after one, two or no words."""
        lower = probability(history[1:], word) if history else 1 / base
        size = len(history)
        followers = Counter(
            text[i] for text in read for i in range(2, len(text)) if tuple(text[i - size : i]) == history
        )
        if not followers:
            return lower
        return (followers[word] + len(followers) * lower) / (followers.total() + len(followers))

    text = "the film was unheard of , good film".split()
    padded = ["<", "<", *text]
    expected = [math.log(probability(tuple(padded[i - 2 : i]), padded[i])) for i in range(2, len(padded))]
    assert model.mean_log_probability(" ".join(text), 0) == pytest.approx(np.mean(expected))
    assert model.mean_log_probability(" ".join(text), 5) == pytest.approx(np.mean(expected[5:]))


def test_gold_falls_with_repetition_and_reads_no_prompt():
    judges = gold.Judges(lambda texts: np.zeros(len(texts)), gold.Trigrams(TEXTS))
    parts = judges.parts(["Movie review: the film"] * 2, [" was good", " was was was\nwas"])
    assert parts[0, 2] == 1.0 and parts[1, 2] == pytest.approx(1 / 3)
    assert parts[0, 1] > parts[1, 1]
    assert parts[0, 1] == pytest.approx(judges.trigrams.mean_log_probability("the film was good", 2))


def test_standard_is_of_deviations_inside_prompts():
    parts = np.random.default_rng(0).normal(size=(5, 8, 3)) + 100 * np.arange(5)[:, None, None]
    found = gold.standard(parts)
    np.testing.assert_allclose(found.deviation**2, parts.var(1, ddof=1).mean(0))
    far = found.mean + 100 * found.deviation
    assert found(far).tolist() == [gold.CLIP] * 3 and gold.gold(found(far)) == pytest.approx(gold.CLIP * 3**0.5)


# ---- the shared trunk ----


@pytest.fixture
def shared():
    """A policy of four layers whose upper two were moved away from those of another model; both on one trunk."""
    policy, other = (tiny.policy(num_hidden_layers=4) for _ in range(2))
    for parameter in policy.model.layers[2:].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    policy.get_base_model = lambda: policy
    plain = [tiny.policy(num_hidden_layers=4) for _ in range(2)]
    plain[0].load_state_dict(policy.state_dict())
    trunk = Trunk(policy.model.layers[:2])
    share(trunk, policy.model)
    share(trunk, other.model)
    return trunk, (policy, other), plain


def test_what_is_looked_up_is_what_is_computed(shared):
    trunk, models, plain = shared
    tokenizer = tiny.tokenizer(pad="</s>")
    generator = RecordingGenerator(models[0], tokenizer, trunk, " end")
    torch.manual_seed(0)
    rollout = sample(
        models[0], tokenizer, ["one", "another one"], 3, Generation(max_new_tokens=9), generator=generator
    )
    assert {len(row) for row in rollout.completions} != {0}
    suffix = tokenizer(" end").input_ids
    for batch in range(2):
        for model, twin in zip(models, plain, strict=True):
            rows = [row[m].tolist() for row, m in zip(rollout.input_ids, rollout.attention_mask, strict=True)]
            rows = [row + suffix for row in rows] if batch else rows
            rows.append([5, 6, 7])  # nobody sampled that
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            inputs = {
                "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
                "use_cache": False,
            }  # fmt: skip
            ran = []
            hook = trunk.layers[0].register_forward_pre_hook(lambda _, args, ran=ran: ran.append(len(args[0])))
            with torch.no_grad():
                found, expected = model(**inputs).logits, twin(**inputs).logits
            hook.remove()
            assert ran == [1]  # the one that is not known
            torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


def test_a_response_ends_with_its_end(shared):
    trunk, (policy, _), _ = shared
    tokenizer = tiny.tokenizer(pad="</s>")
    generator = RecordingGenerator(policy, tokenizer, trunk, " end")
    settings = Generation(max_new_tokens=12, eos_token_ids=list(range(2, 90)))  # a third of what is sampled
    rollout = sample(policy, tokenizer, ["one"], 8, settings, generator=generator)
    lengths = rollout.completion_lengths
    assert len(set(lengths)) > 1
    suffix = tokenizer(" end").input_ids
    for row, m_row in zip(rollout.input_ids, rollout.attention_mask, strict=True):
        assert (*row[m_row].tolist(), *suffix) in trunk.known


# ---- statistics ----


@pytest.mark.parametrize(
    ("level", "expected"), [(1.0, 10.0), (4.0, 20.0), (6.25, 25.0), (9.0, 30.0), (9.1, math.nan), (0.5, 10.0)]
)
def test_at_kl(level, expected):
    curve = Curve(np.array([1.0, 4.0, 9.0, 3.0]), {"gold": np.array([10.0, 20.0, 30.0, 0.0])})
    assert analysis.at_kl(curve, "gold", level) == pytest.approx(expected, nan_ok=True)


def test_a_curve_is_of_changes_from_the_start_in_windows():
    parts = np.zeros((4, 2, 3))
    parts[:, :, 0] = np.array([1.0, 2.0, 3.0, 100.0])[:, None]
    start = {name: np.full(5, 0.5) for name in ("gold", *gold.PARTS)}
    result = {"parts": parts, "prompts": [[0, 3]] * 4, "kl": [[0, 2], [4, 4], [6, 6], [9, 9]], "proxy": [[1, 1]] * 4}
    found = analysis.curve(result, start)
    assert found.kl.tolist() == pytest.approx([2.5, 11 / 3, 19 / 3, 7.5])
    clipped = [1.0, 2.0, 3.0, gold.CLIP]
    means = [np.mean(clipped[:2]), np.mean(clipped[:3]), np.mean(clipped[1:]), np.mean(clipped[2:])]
    np.testing.assert_allclose(found.values["sentiment"], np.array(means) - 0.5)
    np.testing.assert_allclose(found.values["gold"], np.array(means) / 3**0.5 - 0.5)


def test_an_estimate_leaves_out_what_is_missing_and_states_its_power():
    found = analysis.estimate([1.0, 2.0, math.nan, 3.0])
    assert (found.mean, found.seeds) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert found.p == pytest.approx(0.07418, abs=1e-4)
    assert analysis.estimate([1.0, 2.0, 3.0], seeds=10).detectable == analysis.detectable(1.0, 10)
    assert math.isnan(analysis.estimate([1.0]).low)


def test_the_detectable_mean_is_detected_with_the_stated_power():
    rng, mean = np.random.default_rng(0), analysis.detectable(1.0, 10)
    found = [analysis.estimate(rng.normal(mean, 1.0, 10)).p < analysis.LEVEL for _ in range(1000)]
    assert np.mean(found) == pytest.approx(analysis.POWER, abs=0.04)


def test_holm():
    assert analysis.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


# ---- runs ----


def test_no_two_arms_or_scenarios_are_the_same():
    chosen = [
        testbed.settings(Run(scenario, arm, 0)) for scenario, arm in itertools.product(SCENARIOS, ARMS)
    ]
    assert all(chosen.count(one) == 1 for one in chosen)


def test_a_result_is_of_its_settings(tmp_path, monkeypatch):
    run = Run("base", "fixed", 0)
    testbed.write({"settings": testbed.settings(run)}, path_of(run, tmp_path))
    assert pending([run, Run("base", "fixed", 1)], tmp_path) == [Run("base", "fixed", 1)]
    monkeypatch.setattr(testbed, "FLIPPED", 0.5)
    with pytest.raises(ValueError, match=r"fixed-0\.json\.gz: .*flipped was 0\.25, is 0\.5; delete it"):
        pending([run], tmp_path)


def test_order_of_runs():
    runs = plan(list(SCENARIOS), ["fixed", "r2m"], [0, 1])
    assert runs[:3] == [Run("base", "fixed", 0), Run("base", "r2m", 0), Run("base", "fixed", 1)]
