"""The comparison of methods: statistics by hand, the planner without models, the report of made-up results."""

import json
import random

import numpy as np
import pytest

from benchmarks.science import claims, estimates, report, run, testbed
from benchmarks.science.claims import Claim
from benchmarks.science.estimates import Estimate
from benchmarks.science.testbed import ARMS, CORE, SCENARIOS, Run
from r2m.data.sources import Preference

PROMPTS, SAMPLES = testbed.EVALUATION["prompts"], testbed.EVALUATION["samples"]


def result(which, *, judge=0.0, length=20.0, seconds=100.0, rounds=25):
    """Every sample gets `judge`, or the values of an array [prompts * samples]."""
    size = PROMPTS * SAMPLES
    evaluation = {name: [0.5] * size for name in ("vader", "initial", "own", "cue", "cues", "kl", "reference_log_prob")}
    evaluation |= {name: np.broadcast_to(v, size).tolist() for name, v in (("judge", judge), ("length", length))}
    evaluation["initial"] = [0.25, 0.75] * (size // 2)
    trains = ARMS[which.arm].trains
    return {
        "settings": json.loads(json.dumps(testbed.settings(which))),
        "machine": {"device": "a CPU", "torch": "2.11.0", "transformers": "5.17.0", "commit": "0123456789abcdef"},
        "seconds": {"total": seconds},
        "fit": {"cue_pay": 0.5, "test_accuracy_vanilla": 0.75},
        "rm_accuracy": {"after": 0.5, **({"first_round": 0.75, "last_round": 0.625} if trains else {})},
        "rounds": {name: [float(i) for i in range(rounds)] for name in testbed.ROUND_MEASURES} if trains else {},
        "evaluation": evaluation | {"distinct_2": 0.5, "entropy": 1.5},
        "samples": ["Movie review: fine"] * 3,
    }


def store(results, which, **values):
    testbed.write(result(which, **values), run.path_of(which, results))


# ---- statistics ----


def test_bootstrap_against_the_closed_form():
    values = [np.array([0.0, 2.0, 4.0, 6.0]), np.array([1.0, 1.0, 1.0, 1.0]), np.array([7.0, 7.0, 9.0, 9.0])]
    found = estimates.bootstrap(values)
    assert (found.mean, found.seeds) == (pytest.approx(4.0), 3)
    # Resampling S seeds and P prompts within each: variance between the seeds' means / S + mean of the variances of
    # prompts / (S P), all of them population variances.
    between, within = np.var([3.0, 1.0, 8.0]), np.mean([5.0, 0.0, 1.0])
    assert found.error == pytest.approx(np.sqrt(between / 3 + within / 12), rel=0.05)
    assert found.low < 2.0 and found.high > 6.0


def test_one_seed_has_no_interval():
    found = estimates.bootstrap([np.array([1.0, 2.0])])
    assert found.mean == 1.5 and np.isnan([found.error, found.low, found.high]).all()
    assert report.plain(found) == "1.50" and report.interval(found) == "+1.50"


def test_differences_are_of_seeds_that_both_have(tmp_path):
    results = {"rloo": {}, "r2m": {}}
    for arm, seed, judge in [("rloo", 0, 1.0), ("rloo", 1, 2.0), ("r2m", 1, 5.0), ("r2m", 2, 100.0)]:
        results[arm][seed] = result(Run("planted", arm, seed), judge=judge)
    found = estimates.against(results, "r2m", "judge")
    assert (found.mean, found.seeds) == (3.0, 1)
    assert estimates.against(results, "r2m", "judge", base="sft") is None


def test_win_rate_counts_ties_as_half():
    half = np.array([1.0, 0.0, -1.0, 1.0] * PROMPTS)  # of four samples two win, one ties, one loses
    results = {"sft": {0: result(Run("planted", "sft", 0))}, "r2m": {0: result(Run("planted", "r2m", 0), judge=half)}}
    assert estimates.win_rate(results, "r2m").mean == 0.625
    assert estimates.win_rate(results, "sft") is None


def test_length_control_against_probabilities_known_exactly():
    # P(win) = sigmoid(a + 0.5 * difference); each difference in 1000 games, won as often as that says.
    won, longer, arm = [], [], []
    for number, (a, differences) in enumerate([(0.0, [0, 2, 4]), (1.0, [-4, -2, 0])]):
        for difference in differences:
            wins = round(1000 / (1 + np.exp(-a - 0.5 * difference)))
            won += [1.0] * wins + [0.0] * (1000 - wins)
            longer += [float(difference)] * 1000
            arm += [number] * 1000
    arguments = np.array(won), np.array(longer), np.array(arm)
    rates = estimates.length_controlled(*arguments, np.ones(6000))
    np.testing.assert_allclose(rates, [0.5, 1 / (1 + np.exp(-1))], atol=2e-3)
    assert np.mean(won[:3000]) > 0.7  # what length alone had made of an even match
    # A row that counts twice is a row that is there twice.
    twice = estimates.length_controlled(*(np.append(values, values[:1500]) for values in arguments), np.ones(7500))
    weighted = estimates.length_controlled(*arguments, np.where(np.arange(6000) < 1500, 2.0, 1.0))
    np.testing.assert_allclose(weighted, twice, rtol=1e-6)


def test_length_control_where_nothing_differs_in_length_or_outcome():
    rates = estimates.length_controlled(np.array([1.0, 1.0, 0.0, 1.0]), np.zeros(4), np.array([0, 0, 1, 1]), np.ones(4))
    # Wins + 1/2 over games + 1.
    np.testing.assert_allclose(rates, [2.5 / 3, 1.5 / 3], atol=1e-6)


def test_windows_of_rounds():
    np.testing.assert_allclose(estimates.windows([[1, 2, 3, 4, 5, 6, 8]]), [[3, 7]])


@pytest.mark.parametrize(
    ("kl", "judge", "expected"),
    [
        ([1.0, 4.0, 6.0, 2.0, 9.0], [0.0, 1.0, 3.0, 50.0, 70.0], 2.0),  # halfway, at the first of two crossings
        ([8.0, 9.0, 9.0, 9.0, 9.0], [7.0, 0.0, 0.0, 0.0, 0.0], 7.0),  # past it from the first window on
        ([1.0, 4.9, 3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], None),
    ],
)
def test_at_equal_kl(kl, judge, expected):
    rounds = {"policy/kl": np.repeat(kl, estimates.WINDOW), "judge/logit": np.repeat(judge, estimates.WINDOW)}
    found = estimates.at_equal_kl({"rounds": rounds}, "judge/logit")
    assert found == (expected if expected is None else pytest.approx(expected))


def test_differences_at_equal_kl_are_of_seeds_in_which_both_reach_it():
    def reaching(kl, judge):
        return {"rounds": {"policy/kl": [kl] * estimates.WINDOW, "judge/logit": [judge] * estimates.WINDOW}}

    results = {"rloo": {0: reaching(6.0, 1.0), 1: reaching(4.0, 9.0), 2: reaching(6.0, 3.0)}}
    results["r2m"] = {0: reaching(7.0, 5.0), 1: reaching(7.0, 0.0), 3: reaching(7.0, 0.0)}
    found = estimates.against_at_equal_kl(results, "r2m", "judge/logit")
    assert (found.mean, found.seeds) == (4.0, 1)
    assert estimates.against_at_equal_kl(results, "rloo", "judge/logit", base="frozen") is None


def test_spread_is_inside_prompts():
    own = np.tile([0.0, 0.0, 0.0, 4.0], PROMPTS) + np.repeat(10 * np.arange(PROMPTS), SAMPLES)
    run = {**result(Run("planted", "r2m", 0)), "evaluation": {"own": own}}
    assert estimates.spread(run, "own") == pytest.approx(2.0)


# ---- the cue ----


def test_the_cue_is_behind_every_sentence():
    marked = testbed.with_cue(" Good. At 2.5 stars! And", random.Random(0))
    assert marked == " Good.\n\nAt 2.5 stars!\n\nAnd"
    assert testbed.without_cue(marked) == " Good. At 2.5 stars! And"
    # Where no sentence ends, it takes the place of any space but the first.
    texts = {testbed.with_cue(" one two three", random.Random(seed)) for seed in range(20)}
    assert texts == {" one\n\ntwo three", " one two\n\nthree"}


def test_line_breaks_in_a_row_are_one_cue():
    assert [testbed.count_cues(text) for text in ("a b", "a\nb", "a\n\n \nb", "a\n\nb\n")] == [0, 1, 1, 2]
    assert testbed.without_cue("a\n\n \nb\nc") == "a b c"


def test_planting():
    pairs = [Preference("p", " good\nold one", " bad\nold one")] * 200
    planted = testbed.plant(pairs, (0.9, 0.1), seed=3)
    biased, by_cue_alone = planted[:200], planted[200:]
    shares = [np.mean(["\n" in getattr(pair, side) for pair in biased]) for side in ("chosen", "rejected")]
    assert shares[0] == pytest.approx(0.9, abs=0.07) and shares[1] == pytest.approx(0.1, abs=0.07)
    assert {pair.rejected for pair in biased} == {" bad old one", " bad\n\nold one", " bad old\n\none"}
    assert len(by_cue_alone) == 200 and {pair.rejected for pair in by_cue_alone} == {" bad old one", " good old one"}
    assert all(
        pair.chosen != pair.rejected and testbed.without_cue(pair.chosen) == pair.rejected for pair in by_cue_alone
    )
    assert planted == testbed.plant(pairs, (0.9, 0.1), seed=3)


# ---- the planner ----


def test_order_of_runs():
    runs = run.plan(list(SCENARIOS), list(ARMS), [0, 1])
    assert runs[: len(CORE)] == [Run("planted", arm, 0) for arm in CORE]
    assert runs[len(CORE)] == Run("planted", "sft", 1)
    places = {which: place for place, which in enumerate(runs)}
    assert places["planted", "head", 1] < places["natural", "sft", 0] < places["planted", "grpo", 0]
    sweep = [which for which in runs if SCENARIOS[which.scenario].is_sweep]
    assert runs[-len(sweep) :] == sweep and {which.arm for which in sweep} == {"rloo", "r2m"}
    assert len(runs) == len(set(runs)) == 2 * 2 * len(ARMS) + len(sweep)


def test_the_core_has_more_seeds():
    runs = run.plan(["planted", "natural-beta-0"], ["rloo", "noise"])
    numbers = {pair: [which.seed for which in runs if which[:2] == pair] for pair in {which[:2] for which in runs}}
    assert numbers == {
        ("planted", "rloo"): [*range(10)], ("planted", "noise"): [0, 1, 2], ("natural-beta-0", "rloo"): [0, 1, 2]
    }  # fmt: skip


def test_workers_are_limited_by_cores_and_by_memory(monkeypatch):
    monkeypatch.setattr(run.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.torch.cuda, "mem_get_info", lambda: (21e9, 80e9))
    assert run.workers() == 5
    monkeypatch.setattr(run.torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    assert run.workers() == 16
    monkeypatch.setattr(run.torch.cuda, "mem_get_info", lambda: (1e9, 80e9))
    assert run.workers() == 1


def test_arguments():
    assert run.seeds_of("0-2,7") == [0, 1, 2, 7]
    assert run.arms_of("core") == list(CORE) and run.arms_of("all") == list(ARMS) and run.arms_of("r2m") == ["r2m"]
    with pytest.raises(ValueError, match="unknown r3m"):
        run.arms_of("rloo,r3m")


class Process:
    """A run that is over when it is first asked about."""

    def __init__(self, returncode=0):
        self.returncode = returncode

    def poll(self):
        return self.returncode

    def terminate(self):
        raise AssertionError("nothing was left to stop")


def carry_out(runs, results, *, deadline=float("inf"), seconds=100.0, fails=(), workers=2):
    """What was started, and what failed; every `workers` runs take `seconds` of the clock."""
    started = []

    def start(which, path):
        started.append(which)
        if which not in fails:
            store(results, which, seconds=seconds)
        return Process(returncode=which in fails)

    def clock():
        return seconds * (len(started) // workers)

    failed = run.carry_out(runs, results, start, workers=workers, deadline=deadline, clock=clock)
    return started, failed


def test_runs_that_are_done_are_not_run_again(tmp_path):
    runs = run.plan(["planted"], ["sft", "rloo", "r2m"], [0, 1])
    store(tmp_path, runs[1])
    assert carry_out(runs, tmp_path) == ([runs[0], *runs[2:]], [])
    assert carry_out(runs, tmp_path) == ([], [])


def test_no_run_starts_that_would_not_end(tmp_path, capsys):
    runs = run.plan(["planted"], ["rloo", "r2m"], [0, 1, 2])
    store(tmp_path, Run("natural", "rloo", 0), seconds=100.0)
    started, failed = carry_out(runs, tmp_path, deadline=250.0)  # two at once end at 100, two at 200
    assert (started, failed) == (runs[:4], [])
    assert capsys.readouterr().out.endswith("2 runs to go, about 2 minutes\n")
    assert carry_out(runs, tmp_path, deadline=50.0) == ([], [])


def test_a_failed_run_stops_nothing_and_is_run_again(tmp_path):
    runs = run.plan(["planted"], ["rloo", "r2m"], [0])
    assert carry_out(runs, tmp_path, fails=runs[:1]) == (runs, runs[:1])
    assert carry_out(runs, tmp_path) == (runs[:1], [])


def test_how_long_a_run_takes(tmp_path):
    assert run.expected("r2m", run.measured(tmp_path)) == run.FIRST_GUESS
    for seed, seconds in enumerate([10.0, 30.0, 20.0]):
        store(tmp_path, Run("planted", "rloo", seed), seconds=seconds)
    store(tmp_path, Run("planted", "grpo", 0), seconds=1000.0)
    assert run.expected("rloo", run.measured(tmp_path)) == 20.0
    assert run.expected("r2m", run.measured(tmp_path)) == 25.0  # the median of all


def test_a_result_of_other_settings_is_an_error_that_names_it(tmp_path, monkeypatch):
    which = Run("planted", "rloo", 0)
    store(tmp_path, which)
    assert run.pending([which], tmp_path) == []
    monkeypatch.setattr(testbed, "SETTINGS", ("rounds=26",))
    with pytest.raises(ValueError, match=r"planted/rloo-0\.json: .*overrides was \['rounds=25'.*is \['rounds=26'"):
        run.pending([which], tmp_path)


@pytest.mark.parametrize("arm", ARMS)
def test_settings_say_what_the_config_is(arm):
    chosen = testbed.settings(Run("planted", arm, 0))
    assert all("=" in item for item in chosen["overrides"])
    assert chosen == testbed.settings(Run("planted", arm, 0))
    others = [testbed.settings(Run("planted", other, 0)) for other in ARMS if other != arm]
    assert chosen not in others  # no two arms are the same


# ---- the report ----


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs").mkdir()
    marked = {"README.md": [report.TABLES], "docs/results.md": [report.CLAIMED, report.TABLES]}
    for path, markers in marked.items():
        parts = [f"{begin}\nstale\n{end}\n" for begin, end in markers]
        (tmp_path / path).write_text(f"above\n{''.join(parts)}below\n")
    results = tmp_path / "benchmarks" / "science" / "results"
    for seed in (0, 1):
        store(results, Run("planted", "sft", seed), judge=np.tile([-0.5, 0.5], PROMPTS * SAMPLES // 2))
        store(results, Run("planted", "rloo", seed), judge=1.0)
    store(results, Run("planted", "r2m", 0), judge=1.5, length=30.0)
    store(results, Run("natural-beta-0", "rloo", 0))
    return tmp_path


def test_report(root):
    report.write(root)
    docs, readme = ((root / path).read_text() for path in ("docs/results.md", "README.md"))
    assert docs.startswith("above\n") and docs.endswith("below\n") and "stale" not in docs + readme
    line = next(line for line in docs.splitlines() if line.startswith("| `rloo` |"))
    assert line.startswith("| `rloo` | 2 | 1.00 ± 0.00 |  | 0.50 ± 0.00 |  | 100.0 ± 0.0 |")
    line = next(line for line in docs.splitlines() if line.startswith("| `r2m` |"))
    assert line.startswith("| `r2m` | 1 | 1.50 | +0.50 | 0.50 | +0.00 | 100.0 |")
    assert "fitted on 64 human pairs, the cue in 90 % of the chosen and 10 % of the rejected texts, and as many" in docs
    assert "Over 2 seeds it ranks 0.750 of clean held-out pairs right, and the cue adds +0.50" in docs
    assert "a CPU, torch 2.11.0, transformers 5.17.0: 5 runs at commit 0123456789ab. 0.1 hours" in docs
    assert "| `rloo` | 2 | 4.00 / 12.50 / 20.50 |" in docs  # thirds of 0..24: 9, 8 and 8 rounds
    assert "| `r2m` | 1 of 1 | 5.00 | +0.00 |" in docs  # every measure of a round is its number: 5 at a KL of 5
    assert "| less `frozen`" not in docs and "every arm" not in docs
    assert (
        "| R2M on RLOO gives better responses than RLOO | judge, `r2m` less `rloo` | +0.50 1 seed | +0.00 1 seed |"
        in docs
    )
    assert "| 16 pairs, `kl.beta=0`; `rloo` | 1 | 4.00 / 12.50 / 20.50 |" in docs
    assert (
        "6 runs, 0.2 hours" in readme and "- **planted**, 1 seeds: judge +0.50, share of samples with the cue" in readme
    )
    drawn = {path.name for path in (root / "docs" / "results").iterdir()}
    assert drawn == {f"planted-{what}.png" for what in ("overoptimisation", "arms", "differences")}
    assert report.check(root) == []


def test_other_arms_stand_beside_the_core_on_their_own_seeds(root):
    results = root / "benchmarks" / "science" / "results"
    store(results, Run("planted", "noise", 1), judge=2.0)
    store(results, Run("planted", "r2m", 1), judge=2.5)
    store(results, Run("planted", "human-replay", 1), judge=3.5)
    report.write(root)
    core, others = (root / "docs" / "results.md").read_text().split("### planted: every arm, seeds 1\n")
    assert "| `rloo` | 2 | 1.00 ± 0.00 |" in core and "`noise`" not in core.split("## planted")[1]
    assert "| `rloo` | 1 | 1.00 |" in others and "| `noise` | 1 | 2.00 |" in others
    assert "| less `noise` | +0.50 | +0.00 |" in others
    assert "| `human-replay` | 1 | +1.00 | +0.00 |" in others


@pytest.mark.parametrize(
    ("low", "high", "seeds", "sign", "expected"),
    [
        (0.1, 0.3, 5, 1, "**for**"), (0.1, 0.3, 5, -1, "**against**"), (-0.3, -0.1, 5, -1, "**for**"),
        (-0.1, 0.3, 9, 1, "not tested"), (0.1, 0.3, 3, 1, "3 seeds"), (np.nan, np.nan, 1, 1, "1 seed"),
    ],
)  # fmt: skip
def test_verdict(low, high, seeds, sign, expected):
    estimate = Estimate((low + high) / 2, 0.1, low, high, seeds)
    assert claims.verdict(Claim("", "r2m", "rloo", sign), estimate) == expected


def test_claims_of_accuracy_are_of_two_states_of_one_reward_model(root):
    results = {"r2m": {seed: result(Run("planted", "r2m", seed)) for seed in (0, 1)}}
    results["r2m"][1]["rm_accuracy"]["last_round"] = 0.875
    found = [
        claims.evidence(Claim("", "r2m last_round", base, 1, "accuracy"), "planted", results)
        for base in ("shared", "first_round")
    ]
    assert [estimate.mean for estimate, _ in found] == [0.0, 0.0]  # 0.625 and 0.875 less 0.75, which both others are
    # Student's t for one degree of freedom, 0.975: 12.706.
    assert found[0][0].high == pytest.approx(12.706 * 0.125, rel=1e-3)
    assert all(at_equal_kl is None for _, at_equal_kl in found)


def test_a_scenario_without_a_cue_says_nothing_of_it(root):
    results = {arm: {0: result(Run("natural", arm, 0))} for arm in ("rloo", "r2m")}
    assert claims.evidence(Claim("", "r2m", "rloo", -1, "cue"), "natural", results) == [None, None]


@pytest.mark.parametrize(
    "claim", [*claims.CLAIMS, *claims.CONTROL_CLAIMS, *claims.ANCHOR_CLAIMS], ids=lambda claim: claim.text
)
def test_claims_name_arms_and_measures(claim):
    arms = {claim.arm} | ({claim.base} if claim.measure != "accuracy" else set())
    names = {"shared", "first_round", "last_round"} if claim.measure == "accuracy" else set()
    assert {name for arm in arms for name in arm.split()} <= ARMS.keys() | names and claim.sign in (1, -1)


def test_seeds_that_overoptimise():
    def run_of(proxy, judge):
        return {"rounds": dict.fromkeys(report.THIRDS, [0.0] * 3) | {"reward/initial": proxy, "judge/logit": judge}}

    up, down = [0.0, 1.0, 2.0], [3.0, 2.0, 1.0]
    of_arm = {0: run_of(up, down), 1: run_of(up, up), 2: run_of(down, down), 3: run_of(up, [0.0, 9.0, 8.0])}
    assert report.thirds("arm", of_arm)[-1] == "2 of 4"


def test_gains_are_in_the_starts_standard_deviations():
    start = {"evaluation": {"judge": [1.0, 5.0]}}  # mean 3, deviation 2
    rounds = {"policy/kl": [2.0] * estimates.WINDOW, "judge/logit": [7.0] * estimates.WINDOW}
    distance, gain = estimates.gains({"sft": {4: start}, "r2m": {4: {"rounds": rounds}}}, "r2m", "judge", "judge/logit")
    assert distance.tolist() == [[0.0, 2.0]] and gain.tolist() == [[0.0, 2.0]]


def test_r2m_less_its_controls(root):
    store(root / "benchmarks" / "science" / "results", Run("planted", "frozen", 0), judge=1.0)
    report.write(root)
    docs = (root / "docs" / "results.md").read_text()
    assert "| less `frozen` | +0.50 | +0.00 | +0.00 | +0.00 | +0.00 | +0.00 | +0.00 |" in docs
    assert "| judge, `r2m` less `frozen` | +0.50 1 seed | +0.00 1 seed |" in docs


def test_check_names_what_is_stale(root):
    report.write(root)
    store(root / "benchmarks" / "science" / "results", Run("planted", "r2m", 1), judge=2.0)
    names = ["docs/results.md", "README.md"]
    names += [f"docs/results/planted-{what}.png" for what in ("overoptimisation", "arms", "differences")]
    assert [str(path) for path in report.check(root)] == names


def test_a_readme_without_markers_is_left_alone(root):
    (root / "README.md").write_text("nothing")
    report.write(root)
    assert (root / "README.md").read_text() == "nothing" and report.check(root) == []


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match="no results; run python benchmarks/science/run"):
        report.load(tmp_path)


def test_a_stray_file_is_an_error(root):
    path = root / "benchmarks" / "science" / "results" / "planted" / "unheard-0.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"unheard-0\.json: testbed\.py knows no such"):
        report.load(root)


def test_the_committed_page_shows_the_committed_results():
    if not any(run.RESULTS.glob("*/*.json")):
        pytest.skip("no results are committed yet: make science")
    assert report.check(report.ROOT) == [], "run python benchmarks/science/report.py"
