"""The testbed of overoptimisation: judges and statistics by hand, the shared trunk on a tiny model."""

import copy
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.overoptimization import analysis, gold, report, start, testbed
from benchmarks.overoptimization.analysis import Curve
from benchmarks.overoptimization.model import Trunk, sample_together, share
from benchmarks.overoptimization.run import TOGETHER, carry_out, groups, path_of, plan
from benchmarks.overoptimization.testbed import ARMS, SCENARIOS, Run, Scenario
from r2m.demo.movie_reviews import Splits
from r2m.policy.generate import Sampling
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

    text = ["the", "film", "was", "unheard", "of", ",", "good", "film"]
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

SETTINGS = Sampling(0.7, 9, list(range(2, 40)), [], 5)  # an eighth of what is sampled ends a response
PROMPTS = ["one", "another one"]


@pytest.fixture
def shared():
    """Three policies of four layers, whose upper two differ, on one trunk; and the same without."""
    plain = [tiny.policy(num_hidden_layers=4) for _ in range(3)]
    for seed, policy in enumerate(plain):
        torch.manual_seed(seed)
        for parameter in policy.model.layers[2:].parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    policies = copy.deepcopy(plain)
    trunk = Trunk(policies[0].model.layers[:2])
    for policy in policies:
        share(trunk, policy.model)
    return trunk, policies, plain


def padded(rows):
    width = max(map(len, rows))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {
        "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "use_cache": False,
    }  # fmt: skip


@pytest.fixture
def sampled(shared):
    """The ids of the prompts, of three responses to each by each policy, and of the suffix behind them."""
    trunk, policies, _ = shared
    tokenizer = tiny.tokenizer(pad="</s>")
    prompt_ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    drawn = sample_together(policies, trunk, tokenizer, prompt_ids, 3, SETTINGS, " end")
    return prompt_ids, drawn, tokenizer(" end").input_ids


@torch.no_grad()
def test_policies_sample_what_each_says(shared, sampled):
    (_, _, plain), (prompt_ids, drawn, _) = shared, sampled
    assert len({str(responses) for responses in drawn}) == 3 and [len(responses) for responses in drawn] == [6] * 3
    lengths = {len(row) for responses in drawn for row in responses}
    assert max(lengths) == 9 and len(lengths) > 2
    # The same again from the whole model, a token at a time.
    for twin, responses in zip(plain, drawn, strict=True):
        draws = torch.Generator().manual_seed(SETTINGS.seed)
        rows = [list(ids) for ids in prompt_ids for _ in range(3)]
        for step in range(9):
            chances = (twin(**padded(rows)).logits[:, -1] / SETTINGS.temperature).softmax(-1)
            tokens = torch.multinomial(chances, 1, generator=draws)[:, 0].tolist()
            for row, response, token in zip(rows, responses, tokens, strict=True):
                if step < len(response):
                    assert response[step] == token
                    row.append(token)
    assert all(set(row[:-1]).isdisjoint(SETTINGS.eos_ids) for responses in drawn for row in responses)


@torch.no_grad()
def test_what_is_looked_up_is_what_is_computed(shared, sampled):
    (trunk, policies, plain), (prompt_ids, drawn, behind) = shared, sampled
    for suffix in ([], behind):
        for policy, twin, responses in zip(policies, plain, drawn, strict=True):
            rows = [prompt_ids[i // 3] + response + suffix for i, response in enumerate(responses)]
            inputs, ran = padded([*rows, [50, 60, 70]]), []  # nobody sampled the last one
            hook = trunk.layers[0].register_forward_pre_hook(lambda _, args, ran=ran: ran.append(len(args[0])))
            found, expected = policy(**inputs).logits, twin(**inputs).logits
            hook.remove()
            assert ran == [1]
            m_token = inputs["attention_mask"].bool()
            torch.testing.assert_close(found[m_token], expected[m_token], atol=1e-4, rtol=1e-4)


# ---- statistics ----


@pytest.mark.parametrize(
    ("level", "expected"), [(1.0, 10.0), (4.0, 20.0), (6.25, 25.0), (9.0, 30.0), (9.1, math.nan), (0.5, 10.0)]
)
def test_at_kl(level, expected):
    curve = Curve(np.array([1.0, 4.0, 9.0, 3.0]), {"gold": np.array([10.0, 20.0, 30.0, 0.0])})
    assert analysis.at_kl(curve, "gold", level) == pytest.approx(expected, nan_ok=True)


def test_a_curve_is_of_changes_from_the_start_in_windows():
    parts = np.zeros((4, 4, 3))  # two prompts, two samples each
    parts[:, :2, 0] = np.array([1.0, 2.0, 3.0, 100.0])[:, None]
    began = np.zeros((4, 2, 4))
    began[:, 1] = 0.5
    result = {"parts": parts, "start": began, "kl": np.tile([[2], [4], [6], [9]], 4), "proxy": np.ones((4, 4))}
    found = analysis.curve(result)
    assert found.kl.tolist() == pytest.approx([3, 4, 19 / 3, 7.5])
    clipped = [1.0, 2.0, 3.0, gold.CLIP]
    means = np.array([np.mean(clipped[:2]), np.mean(clipped[:3]), np.mean(clipped[1:]), np.mean(clipped[2:])])
    np.testing.assert_allclose(found.values["sentiment"], (means - 0.5) / 2)
    np.testing.assert_allclose(found.values["gold"], (means / 3**0.5 - 0.5) / 2)


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


# ---- the report ----


def result(run, gains, kl=None):
    """Two prompts with two samples; every sample's sentiment gains as much in a round."""
    rounds = len(gains)
    parts = np.zeros((rounds, 4, 3))
    parts[..., 0] = np.array(gains)[:, None] * 3**0.5
    kl = np.linspace(0, 20, rounds) if kl is None else kl
    return {
        "settings": testbed.settings(run), "seconds": 1.0, "parts": parts.tolist(),
        "start": np.zeros((rounds, 2, 4)).tolist(), "kl": np.tile(kl[:, None], 4).tolist(),
        "proxy": np.ones((rounds, 4)).tolist(),
    }  # fmt: skip


def test_the_report_compares_seed_by_seed(tmp_path, capsys, monkeypatch):
    steady = np.r_[np.zeros(analysis.LATE + 1), np.ones(12)]
    for seed, (fixed, ours) in enumerate([(1.0, 1.5), (2.0, 2.25), (0.5, 1.0)]):
        for arm, gain in (("fixed", fixed), ("labels", ours)):
            run = Run("base", arm, seed)
            testbed.write(result(run, gain * steady), path_of(run, tmp_path))
    testbed.write(result(Run("base", "labels", 7), 9 * steady), path_of(Run("base", "labels", 7), tmp_path))
    monkeypatch.setattr("sys.argv", ["report.py", "--results", str(tmp_path)])
    report.main()
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("| Do fresh labels?"))
    share = (1 / 3 + 2 / 3 + 11) / 13  # the first two of thirteen late rounds are means with rounds before the gain
    found = analysis.estimate(np.array([0.5, 0.25, 0.5]) * share, 20)
    assert (
        f"| {found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}] | {found.p:.3f} | {found.detectable:.2f} |" in line
    )
    assert "| `labels` | 4 |" in printed and "## base" in printed


def test_committed_trials_are_of_today_s_settings():
    (curves,) = report.load(report.ROOT / "benchmarks" / "overoptimization" / "pilots").values()
    assert curves.keys() >= {"fixed", "labels", "r2m"} and all(
        of_arm.keys() == {101, 102} for of_arm in curves.values()
    )


def test_no_results_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no results; run python"):
        report.load(tmp_path)


# ---- runs ----


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """All that runs share, on a tiny model, with few short samples."""
    monkeypatch.setenv("R2M_CACHE", str(tmp_path / "cache"))
    for name, value in {"NEW_TOKENS": 6, "HELD_OUT": (3, 4), "INNER_WIDTH": 8}.items():
        monkeypatch.setattr(start, name, value)
    monkeypatch.setattr(testbed, "ROUNDS", 2)
    monkeypatch.setattr(testbed, "LABELS", 6)  # of labels-before: there are 24 pairs of start samples
    monkeypatch.setattr(testbed, "SCENARIOS", {"base": Scenario(pairs=8), "half": Scenario(pairs=8, backbone="half")})
    model = tmp_path / "model"
    tiny.policy(num_hidden_layers=4).save_pretrained(model)
    tiny.tokenizer(pad="</s>").save_pretrained(model)
    prompts = [f"Movie review: {word}" for word in ["a", "bad", "good", "fine", "dull", "long", "odd", "new"] * 2]
    splits = Splits([], [], [], prompts[:12], prompts[12:], [], [])
    judges = gold.Judges(lambda texts: np.array([float(len(text.split())) for text in texts]), gold.Trigrams(TEXTS))
    (folder := tmp_path / "samples").mkdir()
    start._sample(folder, model, splits, judges)
    train, held_out = (
        start.Samples(**torch.load(folder / f"{name}.pt", weights_only=False)) for name in ("train", "held_out")
    )
    standard = gold.Standard(held_out.parts.mean(0), np.ones(3))  # of so few samples some deviation may be 0
    world = start.Start(model, splits, judges, standard, train, held_out)
    monkeypatch.setattr(start, "load", lambda: world)
    return world


CHANGED = [
    "rounds=2", "generation.max_new_tokens=6", "generation.max_prompt_tokens=40", "lora.top_layers=2",
    "r2m.inner_width=8",
]  # fmt: skip


def test_all_arms_run(small_world):
    runs = [Run("base", arm, 3) for arm in ARMS]
    found = dict(zip(ARMS, testbed.perform(runs, CHANGED), strict=True))
    for arm, of_arm in found.items():
        assert np.shape(of_arm["parts"]) == (2, 24, 3) and np.isfinite(of_arm["parts"]).all()
        assert np.shape(of_arm["start"]) == (2, 3, 4) and np.shape(of_arm["texts"]) == (2, 24)
        assert of_arm["texts"][0] == found["fixed"]["texts"][0], arm  # the same policies, the same noise
        assert ("labels/agreement" in of_arm["metrics"]) == bool(ARMS[arm].labels)
        assert np.isfinite(analysis.curve(of_arm).values["gold"]).all()
    assert found["labels"]["metrics"]["labels/given"] == [12, 12]
    assert found["labels-few"]["metrics"]["labels/given"] == [3, 3]
    # What is not fixed gives other rewards in the second round; before it has learned, the first round's are the same.
    fixed = found["fixed"]["reward"]
    for arm in ("labels", "labels-step", "labels-clean"):
        assert found[arm]["reward"][0] == fixed[0] and found[arm]["reward"][1] != fixed[1], arm
    assert found["labels-before"]["reward"][0] != fixed[0] and found["refits"]["reward"][0] != fixed[0]


def test_a_reward_model_on_another_backbone(small_world):
    runs = [Run("half", arm, 3) for arm in ("fixed", "labels-r2m")]
    fixed, labelled = testbed.perform(runs, CHANGED)
    assert np.isfinite(fixed["reward"]).all() and np.isfinite(labelled["reward"]).all()
    (same,) = testbed.perform([Run("base", "fixed", 3)], CHANGED)
    assert same["texts"][0] == fixed["texts"][0] and same["reward"][0] != fixed["reward"][0]


def test_pairs_are_disjoint_and_labelled_by_gold(small_world):
    clean, flipped = (start.draw_pairs(small_world, 12, 5, share) for share in (0.0, 0.5))
    worth = gold.gold(small_world.standard(small_world.train.parts, gold.CLIP_OF_LABELS))
    assert all(worth[a] >= worth[b] for a, b in zip(*clean, strict=True))
    assert len({*clean.chosen, *clean.rejected}) == 24
    assert {*map(frozenset, zip(*clean, strict=True))} == {*map(frozenset, zip(*flipped, strict=True))}
    assert 0 < sum(a != b for a, b in zip(clean.chosen, flipped.chosen, strict=True)) < 12
    assert start.draw_pairs(small_world, 5, 5, 0.5).chosen == flipped.chosen[:5]
    with pytest.raises(ValueError, match="count is 100; expected at most"):
        start.draw_pairs(small_world, 100, 5, 0.0)


@pytest.mark.parametrize("reads_states", [False, True])
def test_rewards_of_start_samples_have_deviation_one_inside_prompts(small_world, reads_states):
    pairs = start.draw_pairs(small_world, 12, 5, 0.0)
    model, _ = start.fit(small_world, pairs, backbone="same", reads_states=reads_states, floor=0.6)
    samples = small_world.train
    parts = [start.feedback(samples, [i], "same") for i in range(len(samples.texts))]
    rewards = torch.cat([
        model.score(part.rte, part.hidden[None], weight=0.6) if reads_states else model.vanilla_score(part.rte)
        for part in parts
    ])  # fmt: skip
    assert rewards.view(-1, start.SAMPLES).var(1).mean().sqrt().item() == pytest.approx(1, rel=1e-3)
    assert rewards.mean().item() == pytest.approx(0, abs=1e-3)


def test_no_two_arms_or_scenarios_are_the_same():
    chosen = [testbed.settings(Run(scenario, arm, 0)) for scenario, arm in itertools.product(SCENARIOS, ARMS)]
    assert all(chosen.count(one) == 1 for one in chosen)


def store(results, run, seconds=100.0):
    testbed.write({"settings": testbed.settings(run), "seconds": seconds}, path_of(run, results))


def test_a_result_is_of_its_settings(tmp_path, monkeypatch):
    run = Run("base", "fixed", 0)
    store(tmp_path, run)
    assert groups([run, Run("base", "fixed", 1)], tmp_path) == [[Run("base", "fixed", 1)]]
    monkeypatch.setattr(testbed, "FLIPPED", 0.5)
    with pytest.raises(ValueError, match=r"fixed-0\.json\.gz: .*flipped was 0\.25, is 0\.5; delete it"):
        groups([run], tmp_path)


def test_groups_are_of_one_scenario_and_seed(tmp_path):
    runs = plan(["base", "beta"], list(ARMS), [0, 1])
    assert len(runs) == 2 * (len(ARMS) + len(testbed.CONTRASTED))
    found = groups(runs, tmp_path)
    assert [run for group in found for run in group] == runs
    assert {len({(run.scenario, run.seed) for run in group}) for group in found} == {1}
    assert max(map(len, found)) <= TOGETHER
    store(tmp_path, found[0][1])
    assert groups(runs, tmp_path)[0] == [found[0][0], *found[0][2:]]


class Process:
    """A group that is over when it is first asked about."""

    def poll(self):
        return 0

    def terminate(self):
        raise AssertionError("nothing was left to stop")


def carried_out(runs, results, *, deadline=math.inf, fails=(), workers=2):
    """The groups that were started, and what failed; every `workers` groups take 200 seconds of the clock."""
    started = []

    def begin(group, folder):
        started.append(group)
        for run in group:
            if run not in fails:
                store(results, run)
        return Process()

    failed = carry_out(
        runs, results, begin, workers=workers, deadline=deadline, clock=lambda: 200 * (len(started) // workers)
    )
    return started, failed


def test_what_is_done_is_not_run_again_and_a_failure_stops_nothing(tmp_path):
    runs = plan(["base"], ["fixed", "r2m"], [0, 1])
    assert carried_out(runs, tmp_path, fails=runs[:1]) == ([runs[:2], runs[2:]], runs[:1])
    assert carried_out(runs, tmp_path) == ([runs[:1]], [])
    assert carried_out(runs, tmp_path) == ([], [])


def test_no_group_starts_that_would_not_end(tmp_path):
    store(tmp_path, Run("beta", "fixed", 0))
    runs = plan(["base"], ["fixed", "r2m"], [0, 1, 2, 3, 4])
    started, failed = carried_out(runs, tmp_path, deadline=450.0)  # two end at 200, two at 400
    assert (len(started), failed) == (4, [])
