"""The testbed of overoptimisation: statistics by hand, what runs and what is reported."""

import itertools
import json
import math

import numpy as np
import pytest

from benchmarks.overoptimization import analysis, report, testbed
from benchmarks.overoptimization.analysis import Curve
from benchmarks.overoptimization.run import TOGETHER, carry_out, groups, path_of, plan, workers
from benchmarks.overoptimization.testbed import ARMS, SCENARIOS, Run, Scenario
from r2m.demo import gold
from tests.r2m.demo import world as world_module
from tests.r2m.demo.world import small_world

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
    assert found.detectable == analysis.detectable(1.0, 3)
    assert math.isnan(analysis.estimate([1.0]).low)


def test_the_detectable_mean_is_detected_with_the_stated_power():
    rng, mean = np.random.default_rng(0), analysis.detectable(1.0, 10)
    found = [analysis.estimate(rng.normal(mean, 1.0, 10)).p < analysis.LEVEL for _ in range(1000)]
    assert np.mean(found) == pytest.approx(analysis.POWER, abs=0.04)


def test_holm():
    assert analysis.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


# ---- the report ----


def result(run, gains):
    """Two prompts with two samples; every sample's sentiment gains as much in a round."""
    rounds = len(gains)
    parts = np.zeros((rounds, 4, 3))
    parts[..., 0] = np.array(gains)[:, None] * 3**0.5
    metrics = {"labels/agreement": [0.6] * rounds} if ARMS[run.arm].labels else {}
    return {
        "settings": testbed.settings(run), "seconds": 1.0, "accuracy": 0.55, "metrics": metrics,
        "machine": {"device": "a CPU", "torch": "2"}, "parts": parts.tolist(), "vader": np.zeros((rounds, 4)).tolist(),
        "start": np.zeros((rounds, 2, 4)).tolist(), "kl": np.tile(np.linspace(0, 20, rounds)[:, None], 4).tolist(),
        "proxy": np.ones((rounds, 4)).tolist(), "prompts": [[0, 1]] * rounds,
        "texts": [[f"{run.arm} says {i}" for i in range(4)]] * rounds,
    }  # fmt: skip


GAINS = {"gold": [2.0, 2.2, 1.5], "fixed": [1.0, 1.3, 0.5], "labels": [1.5, 1.55, 1.0], "r2m": [1.1, 1.4, 0.4]}


@pytest.fixture
def root(tmp_path):
    """A repository with three seeds of four arms, which gain in late rounds, and pages with markers."""
    steady = np.r_[np.zeros(analysis.LATE + 1), np.ones(12)]
    for arm, gains in GAINS.items():
        for seed, gain in enumerate(gains):
            run = Run("base", arm, seed)
            testbed.write(result(run, gain * steady), path_of(run, tmp_path / report.RESULTS.relative_to(report.ROOT)))
    for run in (Run("base", "labels", 7), Run("base", "noise", 7)):  # of no pair; of an arm that is no test
        testbed.write(result(run, 9 * steady), path_of(run, tmp_path / report.RESULTS.relative_to(report.ROOT)))
    (tmp_path / "docs").mkdir()
    markers = [report.CLAIMS, report.TABLES, report.SAMPLES]
    (tmp_path / "docs" / "results.md").write_text("\n".join("".join(pair) for pair in markers))
    (tmp_path / "README.md").write_text("".join(report.BRIEF))
    (tmp_path / report.STORY).parent.mkdir(parents=True)
    (tmp_path / report.STORY).write_text("{}")
    return tmp_path


SHARE = (1 / 3 + 2 / 3 + 11) / 13  # the first two of thirteen late rounds are means with rounds before the gain


def late(values):
    return analysis.estimate(np.array(values) * SHARE)


def test_the_report_compares_seed_by_seed(root):
    report.write(root)
    page = (root / "docs" / "results.md").read_text()
    own, lost = late([0.5, 0.25, 0.5]), late([1.0, 0.9, 1.0])
    exploited = next(line for line in page.splitlines() if line.startswith("| Is the fixed model exploited?"))
    assert f"| {report.interval(lost)} |  | {lost.detectable:.2f} | **yes** |" in exploited
    p = min(1, 2 * own.p)  # of two contrasts the smaller
    row = f"| Do fresh labels? | `labels` less `fixed` | {report.interval(own)} | {p:.3f} | {own.detectable:.2f} |"
    assert row in page
    places = [page.index(part) for part in ("### base", "| `labels` | 4 |", "no test:", "| `noise` | 1 |")]
    assert places == sorted(places)
    assert "- `r2m`: r2m says 0\n" in page and "- `r2m`: r2m says 2\n" in page  # the first of each prompt
    told = json.loads((root / report.STORY).read_text())
    assert told["seeds"] == 3 and len(told["lines"]) == 3
    assert report.interval(late([0.1, 0.1, -0.1])) in told["lines"][1] and report.interval(own) in told["lines"][2]
    assert all(line in (root / "README.md").read_text() for line in told["lines"])


def test_the_check_names_what_is_not_up_to_date(root):
    assert {str(path) for path in report.check(root)} == {
        "docs/results.md", "README.md", "r2m/demo/story.json", "docs/results/overoptimization.png",
    }  # fmt: skip
    report.write(root)
    assert report.check(root) == []
    path = path_of(Run("base", "r2m", 1), root / report.RESULTS.relative_to(report.ROOT))
    path.unlink()
    assert report.FIGURE in report.check(root)


@pytest.mark.parametrize(
    ("values", "p", "expected"),
    [
        ([1.0, 1.1, 0.9], 0.01, "**yes**"),
        ([-1.0, -1.1, -0.9], 0.01, "**no, the opposite**"),
        ([0.1, -0.1, 0.0], 0.5, "absent, within the interval"),
        ([1.0, -1.0, 0.0], 0.5, "not tested"),
    ],
)
def test_verdicts_are_the_plan_s(values, p, expected):
    assert report.verdict(analysis.estimate(values), p, lost=3.0) == expected


@pytest.mark.parametrize("scenario", ["base", "beta"])
def test_other_results_are_printed_with_questions_where_the_plan_asks_them(scenario, tmp_path, monkeypatch, capsys):
    run = Run(scenario, "fixed", 100)
    testbed.write(result(run, np.ones(analysis.LATE + 13)), path_of(run, tmp_path))
    monkeypatch.setattr("sys.argv", ["report.py", "--results", str(tmp_path)])
    report.main()
    printed = capsys.readouterr().out
    assert "1 runs" in printed
    assert ("verdict" in printed) == (scenario == "base")


def test_committed_pages_show_the_committed_results():
    assert report.check(report.ROOT) == [], "run python benchmarks/overoptimization/report.py"


def test_no_results_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no results; run python"):
        report.load(tmp_path)


# ---- runs ----


@pytest.fixture
def world(tmp_path, monkeypatch):
    world = small_world(tmp_path, monkeypatch)
    monkeypatch.setattr(testbed, "SCENARIOS", {"base": Scenario(pairs=8), "half": Scenario(pairs=8, backbone="half")})
    monkeypatch.setattr(testbed, "load", lambda: world)


CHANGED = [*world_module.CHANGED, "precision=float32"]


def test_all_arms_run(world):
    runs = [Run("base", arm, 3) for arm in ARMS]
    found = dict(zip(ARMS, testbed.perform(runs, CHANGED), strict=True))
    for arm, of_arm in found.items():
        assert np.shape(of_arm["parts"]) == (2, 24, 3) and np.isfinite(of_arm["parts"]).all()
        assert np.shape(of_arm["start"]) == (2, 3, 4) and np.shape(of_arm["texts"]) == (2, 24)
        assert of_arm["texts"][0] == found["fixed"]["texts"][0], arm  # the same policies, the same noise
        assert ("labels/agreement" in of_arm["metrics"]) == bool(ARMS[arm].labels)
        assert np.isfinite(analysis.curve(of_arm).values["gold"]).all()
    assert found["labels"]["metrics"]["labels/given"] == [12, 12]
    assert found["labels-few"]["metrics"]["labels/given"] == [6, 6]
    # What is not fixed gives other rewards in the second round; before it has learned, the first round's are the same.
    fixed = found["fixed"]["reward"]
    for arm in ("labels", "labels-step", "labels-clean"):
        assert found[arm]["reward"][0] == fixed[0] and found[arm]["reward"][1] != fixed[1], arm
    assert found["labels-before"]["reward"][0] != fixed[0] and found["refits"]["reward"][0] != fixed[0]
    worth = gold.gold(np.array(found["gold"]["parts"]))
    np.testing.assert_allclose(found["gold"]["reward"], worth, atol=2e-3)


def test_a_reward_model_on_another_backbone(world):
    runs = [Run("half", arm, 3) for arm in ("fixed", "labels-r2m")]
    fixed, labelled = testbed.perform(runs, CHANGED)
    assert np.isfinite(fixed["reward"]).all() and np.isfinite(labelled["reward"]).all()
    (same,) = testbed.perform([Run("base", "fixed", 3)], CHANGED)
    assert same["texts"][0] == fixed["texts"][0] and same["reward"][0] != fixed["reward"][0]


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
    assert len(runs) == 2 * (len(ARMS) + len(testbed.EVERYWHERE))
    found = groups(runs, tmp_path)
    assert [run for group in found for run in group] == runs
    assert {len({(run.scenario, run.seed) for run in group}) for group in found} == {1}
    assert max(map(len, found)) <= TOGETHER
    store(tmp_path, found[0][1])
    assert groups(runs, tmp_path)[0] == [found[0][0], *found[0][2:]]


@pytest.mark.parametrize(("gigabytes", "expected"), [(1, 1), (20, 2), (100, 4)])
def test_a_worker_has_a_core_and_memory(monkeypatch, gigabytes, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    monkeypatch.setattr("benchmarks.overoptimization.run.free_memory", lambda device: gigabytes * 1e9)
    assert workers() == expected


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
