"""Warnings, samples in the log, trackers, and the learning rates of the rounds."""

import json
import logging
import math

import accelerate.tracking
import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from r2m import R2MTrainer
from r2m.config import R2MConfig, config_from_dict
from r2m.runs import session
from r2m.runs.monitor import (
    check_trackers,
    sample_table,
    warn_about_clipping,
    warn_about_degenerate_groups,
    warn_about_exploitation,
    warn_about_settings,
)

K = 3


@pytest.fixture
def make(reward_checkpoint, tmp_path):
    """A trainer on fresh tiny models; keywords are keys of the config."""

    def build(folder="run", generator=None, **overrides):
        values = {
            "rounds": 4, "prompts_per_round": 2, "num_generations": K, "micro_batch_size": K, "precision": "float32",
            "learning_rate": 1e-3, "output_dir": str(tmp_path / folder),
            "generation": {"max_new_tokens": 3}, "r2m": {"learning_rate": 1e-3},
            "checkpoints": {"every": 1, "keep": 9},
        }  # fmt: skip
        for key, value in overrides.items():
            values[key] = values[key] | value if isinstance(values.get(key), dict) else value
        policy = tiny.policy(num_hidden_layers=1)
        reward_model = tiny.reward_model(reward_checkpoint, policy)
        prompts = ["hello ", "a  b\n", "xyz"]
        return R2MTrainer(
            policy, reward_model, tiny.tokenizer(), prompts, config_from_dict(values), generator=generator
        )

    return build


def messages(caplog, level):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "r2m.runs.monitor" and record.levelno == level
    ]


# ---- warnings ----


def test_degenerate_groups_are_warned_about_whenever_they_become_most(caplog):
    shares, history = [0.5, 0.6, 0.9, 0.5, 0.75, 1.0], []
    for t, share in enumerate(shares, 1):
        history.append({"round": t, "reward/degenerate_share": share})
        warn_about_degenerate_groups(history)
    expected = "in {} % of the groups all responses get the same reward; nothing can be learned from them"
    assert messages(caplog, logging.WARNING) == [f"round 2: {expected.format(60)}", f"round 5: {expected.format(75)}"]


def test_a_run_whose_responses_are_all_alike_says_so_once(make, caplog):
    make(generator=lambda prompt_ids, count: [[100, 101]] * (len(prompt_ids) * count), rounds=3).train()
    lines = [line for line in messages(caplog, logging.WARNING) if "same reward" in line]
    assert lines == [
        "round 1: in 100 % of the groups all responses get the same reward; nothing can be learned from them"
    ]


@pytest.mark.parametrize("floor", [0.9, 0.95, 1.0])
def test_a_floor_that_hides_the_attention_throughout_is_warned_about(caplog, floor):
    caplog.set_level(logging.INFO)
    warn_about_settings(config_from_dict({"r2m": {"floor": floor}}), has_adapter=False)
    assert messages(caplog, logging.WARNING) == [
        f"w(t) never falls below 0.9 in 100 rounds with r2m.floor = {floor:g}: it hides the attention throughout"
    ]
    assert messages(caplog, logging.INFO) == []


@pytest.mark.parametrize("rounds", [5, 10, 100, 122])
def test_the_round_from_which_the_attention_shows_is_named(caplog, rounds):
    caplog.set_level(logging.INFO)
    warn_about_settings(config_from_dict({"rounds": rounds}), has_adapter=False)
    # cos(pi t / T) / 2 + 1/2 < 0.9 from t > T acos(0.8) / pi on
    first = math.floor(rounds * math.acos(0.8) / math.pi) + 1
    assert messages(caplog, logging.INFO) == [
        f"w(t) hides most of the attention until it falls below 0.9, in round {first}"
    ]
    assert messages(caplog, logging.WARNING) == []


@pytest.mark.parametrize("values", [{"rounds": 4}, {"rounds": 100, "r2m": {"feedback": "none", "floor": 1.0}}])
def test_nothing_is_said_where_the_attention_shows_from_the_first_round_or_is_not_asked(caplog, values):
    caplog.set_level(logging.INFO)
    warn_about_settings(config_from_dict(values), has_adapter=False)
    assert messages(caplog, logging.INFO) + messages(caplog, logging.WARNING) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, []),
        ({"micro_batch_size": 12}, ["micro_batch_size = 12 is no multiple of num_generations = 8"]),
        (
            {"micro_batch_tokens": 4096},
            ["micro_batch_tokens = 4096 has no room for 8 sequences of the greatest length"],
        ),
        ({"minibatches": 2}, []),
        ({"micro_batch_size": 12, "algorithm": "remax"}, []),
    ],
)
def test_micro_batches_that_split_groups_cost_a_pass_and_are_mentioned(caplog, values, said):
    caplog.set_level(logging.INFO)
    warn_about_settings(config_from_dict({"rounds": 4, **values}), has_adapter=False)
    lines = [line.split(": scoring takes a forward pass of its own")[0] for line in messages(caplog, logging.INFO)]
    assert lines == said


def rising(own, initial, std=1.0):
    return [
        {"round": t, "reward/mean": x, "reward/initial": y, "reward/std": std}
        for t, (x, y) in enumerate(zip(own, initial, strict=True), 1)
    ]


RISE = [0.0, 0.0, 0.0, 0.2, 0.6, 1.0, 1.4, 1.8, 0.0, 0.0, 0.0, 2.0]


def warned_rounds(caplog, history):
    for t in range(1, len(history) + 1):
        warn_about_exploitation(history[:t])
    return [line.partition(":")[0] for line in messages(caplog, logging.WARNING)]


def test_a_reward_that_rises_without_the_initial_models_score_is_warned_about_when_it_begins(caplog):
    """The mean over the last three rounds passes half a deviation in round 6, and again after it has been below."""
    assert warned_rounds(caplog, rising(RISE, [-0.7] * 12)) == ["round 6", "round 12"]
    first = messages(caplog, logging.WARNING)[0]
    assert "rose from 0.000 to 0.600, and the initial reward model's score went from -0.700 to -0.700" in first
    assert "raise kl.beta" in first


@pytest.mark.parametrize(
    "history",
    [
        rising(RISE, [0.3 * x for x in RISE]),  # the initial model agrees
        rising(RISE, [0.0] * 12, std=4.0),  # less than the rewards scatter
        rising(RISE[:5], [0.0] * 5),  # too few rounds
        [{key: x for key, x in row.items() if key != "reward/std"} for row in rising(RISE, [0.0] * 12)],
    ],
    ids=["initial", "spread", "few", "one response"],
)
def test_no_exploitation_is_claimed_where_there_is_none_to_see(caplog, history):
    assert warned_rounds(caplog, history) == []


def test_many_clipped_ratios_are_warned_about_whenever_they_become_many(caplog):
    history = [{"round": t, "policy/clip_share": share} for t, share in enumerate([0.25, 0.5, 0.5, 0.0, 0.26], 1)]
    for t in range(1, 6):
        warn_about_clipping(history[:t])
    lines = messages(caplog, logging.WARNING)
    assert [line.partition(" of the")[0] for line in lines] == ["round 2: 50 %", "round 5: 26 %"]
    assert "Lower learning_rate" in lines[0]


def test_a_run_looks_for_both_in_every_round(make, monkeypatch):
    seen = []
    for name in ("warn_about_exploitation", "warn_about_clipping"):
        monkeypatch.setattr(session, name, lambda history, name=name: seen.append((name, len(history))))
    make(rounds=2).train()
    assert sorted(seen) == [(name, t) for name in ("warn_about_clipping", "warn_about_exploitation") for t in (1, 2)]


# ---- samples ----


def test_a_table_shows_samples_from_all_over_the_round_each_on_one_line(make):
    trainer = make(prompts_per_round=4, generator=lambda prompt_ids, _: [[100 + i] * 90 for i in range(4 * K)])
    rollout = trainer.sample(1)
    batch = tiny.apart(trainer).annotate(rollout, 1, {})
    titles, *lines = sample_table(rollout, batch, 3, judged=[float(i) for i in range(4 * K)]).splitlines()
    assert titles.split() == ["prompt", "response", "reward", "initial", "judge"]
    assert len(lines) == 3
    for line, i in zip(lines, (0, 4, 8), strict=True):
        prompt = " ".join(rollout.prompts[i].split())
        response = rollout.completions[i]
        assert len(response) == 90
        assert line.startswith(prompt)
        assert f"{response[:69]}...  {batch.rewards[i]:.3f}" in line
        assert line.split()[-3:] == [f"{x:.3f}" for x in (batch.rewards[i], batch.initial[i], i)]


# ---- trackers ----


def test_a_tracker_that_is_not_installed_is_an_error_with_the_command_that_installs_it(monkeypatch):
    check_trackers(["tensorboard"])
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    check_trackers([])
    with pytest.raises(ImportError, match=r"trackers names tensorboard, not installed: pip install tensorboard$"):
        check_trackers(["tensorboard"])
    with pytest.raises(ImportError, match="names wandb, tensorboard, not installed: pip install wandb tensorboard"):
        check_trackers(["wandb", "tensorboard"])


def test_a_trainer_without_its_tracker_is_not_made(make, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ImportError, match="trackers names tensorboard"):
        make(trackers=["tensorboard"])
    assert not (tmp_path / "run").exists()


def recorded(folder):
    """{metric: [(round, value), ...]} as TensorBoard reads a run's folder."""
    events = EventAccumulator(str(folder / "r2m"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(folder):
    """The same of metrics.jsonl."""
    series = {}
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for key, value in row.items():
            series.setdefault(key, []).append((row["round"], pytest.approx(value, rel=1e-6)))
    return series


@pytest.mark.parametrize("resume_from", [None, "checkpoint-2", "last"])
def test_tensorboard_has_every_metric_of_every_round_once_after_any_number_of_resumes(make, tmp_path, resume_from):
    folder = tmp_path / "run"
    make(trackers=["tensorboard"]).train()
    if resume_from is not None:
        start = "last" if resume_from == "last" else folder / resume_from
        make(trackers=["tensorboard"]).train(start)
        make(trackers=["tensorboard"]).train(start)
    series = recorded(folder)
    assert series == logged(folder)
    assert [t for t, _ in series["reward/mean"]] == [1, 2, 3, 4]


def test_a_resumed_run_goes_on_under_its_own_name(make, tmp_path):
    make(trackers=["tensorboard"], rounds=1).train()
    name = (tmp_path / "run" / "run_id").read_text()
    assert name.startswith("run-")
    make(trackers=["tensorboard"], rounds=1).train("last")
    assert (tmp_path / "run" / "run_id").read_text() == name
    make(trackers=["tensorboard"], rounds=1, folder="other").train()
    assert (tmp_path / "other" / "run_id").read_text() != name
    make(rounds=1, folder="untracked").train()
    assert not (tmp_path / "untracked" / "run_id").exists()


# ---- learning rates ----


@pytest.mark.parametrize(
    ("has_adapter", "rate", "said"), [(True, 1e-6, True), (True, 1e-4, False), (False, 1e-6, False)]
)
def test_an_adapter_at_the_learning_rate_of_a_whole_model_is_warned_about(caplog, has_adapter, rate, said):
    caplog.set_level(logging.WARNING)
    warn_about_settings(R2MConfig(learning_rate=rate), has_adapter=has_adapter)
    assert ("learning_rate = 1e-06 on an adapter, which starts at zero" in caplog.text) == said


def rates_of(trainer, resume_from=None):
    """The learning rates of policy and reward model in each step, times 1 / the config's."""
    rates = {"policy": [], "reward_model": []}
    for name, optimizer, base in (
        ("policy", trainer.learner.optimizer, trainer.config.learning_rate),
        ("reward_model", trainer.updater.optimizer, trainer.config.r2m.learning_rate),
    ):
        optimizer.register_step_pre_hook(
            lambda step, *_, seen=rates[name], base=base: seen.append(step.param_groups[0]["lr"] / base)
        )
    trainer.train(resume_from)
    return rates


def closed_form(schedule, warmup, t, rounds):
    """No round at 0, neither the first of a warm-up nor the last."""
    done = t - 1
    if done < warmup:
        return t / (warmup + 1)
    share = (done - warmup) / max(1, rounds - warmup)
    return {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[schedule]


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_both_learning_rates_follow_the_schedule_over_the_rounds_and_on_after_a_resume(
    make, tmp_path, schedule, warmup
):
    settings = {"rounds": 5, "lr_schedule": schedule, "warmup_rounds": warmup, "epochs": 2, "prompts_per_round": 1}
    expected = [pytest.approx(closed_form(schedule, warmup, t, 5)) for t in range(1, 6)]
    rates = rates_of(make(**settings))
    assert rates["policy"] == [rate for rate in expected for _ in range(2)]
    assert rates["reward_model"] == expected
    resumed = rates_of(make(**settings), tmp_path / "run" / "checkpoint-3")
    assert resumed["policy"] == rates["policy"][6:]
    assert resumed["reward_model"] == rates["reward_model"][3:]
