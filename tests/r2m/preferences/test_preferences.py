"""Fresh labels: who gives them, which pairs are asked for, what is kept and learned, and what a run survives."""

import json
import logging
import math
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tiny
import torch
import torch.nn.functional as F

from r2m import R2MTrainer
from r2m.config import Preferences, check_names, config_from_dict
from r2m.preferences import queue, store
from r2m.preferences.choosing import CHOICES, choose_pairs
from r2m.preferences.labellers import Pair, checked, load_labeller
from r2m.preferences.store import LABELS, append_labels, read_labels, wilson
from r2m.runs.monitor import warn_about_labels

PROMPTS = ["hello ", "what is it? ", "a b", "xyz", [{"role": "user", "content": "hi"}]]
K = 4
PAIRS = [Pair("a", "long", "x", 3), Pair([{"role": "user", "content": "b"}], "y", "\u2028 é", 3)]

asked = []  # pairs that `verifier` was asked about


def verifier(pairs):
    asked.extend(pairs)
    return [
        None if len(pair.first) == len(pair.second) else float(len(pair.first) > len(pair.second)) for pair in pairs
    ]


def broken(pairs):
    raise OSError("the judge is down")


def leaves(pairs):
    raise SystemExit(1)


def doubtful(pairs):
    return [1.0, *[math.nan] * (len(pairs) - 1)]


def settings(folder, **overrides):
    values = {
        "rounds": 3, "prompts_per_round": 4, "num_generations": K, "micro_batch_size": K, "precision": "float32",
        "learning_rate": 1e-3, "output_dir": str(folder),
        "generation": {"max_new_tokens": 5, "max_prompt_tokens": 40, "eos_token_ids": list(range(1, 50))},
        "r2m": {"learning_rate": 1e-3, "inner_width": 16},
        "preferences": {"labeller": f"{__name__}:verifier", "per_round": 3},
        "checkpoints": {"every": 1, "keep": 100},
    }  # fmt: skip
    for key, value in overrides.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    return values


@pytest.fixture
def make(reward_checkpoint, tmp_path):
    """A trainer on fresh tiny models; keywords are keys of the config."""
    asked.clear()

    def build(folder="run", sample_metrics=None, **other):
        policy = tiny.policy(num_hidden_layers=1)
        config = config_from_dict(settings(tmp_path / folder, **other))
        reward_model = tiny.reward_model(reward_checkpoint, policy)
        return R2MTrainer(policy, reward_model, tiny.tokenizer(), PROMPTS, config, sample_metrics=sample_metrics)

    return build


def measured(rows):
    return [{key: x for key, x in row.items() if not key.startswith(("seconds/", "memory/"))} for row in rows]


def weights(trainer):
    parameters = [*trainer.policy.parameters(), *trainer.reward_model.parameters()]
    return torch.cat([p.detach().flatten() for p in parameters])


def told(name, pairs):
    """Labels, problem and failure of a labeller, asked once."""
    labeller = load_labeller(name, None)
    labeller.ask(pairs, {})
    answers, problem, failed = labeller.answers(pairs, 60)
    assert [pair for pair, _ in answers] == pairs
    return [label for _, label in answers], problem, failed


# ---- who gives labels ----


def test_functions_and_commands_are_labellers(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text(
        "import json, sys\n"
        "def label(pairs):\n"
        "    return [float(len(pair.first) > len(pair.second)) for pair in pairs]\n"
        "if __name__ == '__main__':\n"
        "    for row in map(json.loads, sys.stdin.readlines()):\n"
        "        print('null' if row['prompt'] == 'a' else row['round'] / 4 * (row['second'] == '\\u2028 é'))\n"
    )
    assert told(f"{file}:label", PAIRS) == ([1.0, 0.0], "", False)
    assert told(f"{__name__}:verifier", PAIRS) == ([1.0, 0.0], "", False)
    assert told(f"{sys.executable} {file}", PAIRS) == ([None, 0.75], "", False)


def test_the_pages_verifier_is_the_examples_and_a_labeller():
    root = Path(__file__).parents[3]
    code = re.search(r"```python\n(.*?)```", (root / "docs" / "labels.md").read_text(), re.DOTALL)[1]
    assert (root / "examples" / "verifier.py").read_text().endswith(code)
    pairs = [Pair("2 + 3 =", "5", "It is 6.", 1), Pair("2 + 3 =", "no", "2 + 3 = 5.", 1), Pair("1 + 1", "2", "= 2", 1)]
    assert told(f"{root}/examples/verifier.py:label", pairs) == ([1.0, 0.0, None], "", False)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_module:label", ImportError, "labeller is 'no_such_module:label'.*there is no module no_such_module"),
        ("missing.py:label", ValueError, "labeller is 'missing.py:label'; there is no file missing.py"),
        ("math:no", ValueError, "labeller is 'math:no'; math has no function no"),
        ("no-such-program --fast", ValueError, "there is no program 'no-such-program': expected 'module:function'"),
        ("sh 'open", ValueError, "it is no command: No closing quotation"),
    ],
)
def test_a_labeller_that_is_not_there_is_an_error(name, error, message):
    with pytest.raises(error, match=message):
        load_labeller(name, None)


@pytest.mark.parametrize(
    ("labeller", "problem"),
    [
        ("sh -c 'echo no key >&2; exit 3'", "RuntimeError: exit status 3: no key"),
        ("echo better", "ValueError: it wrote 'better'; expected a number between 0 and 1 a line, or null"),
        (f"{__name__}:broken", "OSError: the judge is down"),
        (f"{__name__}:leaves", "RuntimeError: SystemExit(1)"),
    ],
)
def test_a_labeller_that_fails_says_how(labeller, problem):
    assert told(labeller, PAIRS) == ([None, None], problem, True)


def test_a_command_ends_with_the_process_that_asked(tmp_path):
    code = (
        "import sys\n"
        "from r2m.preferences.labellers import Pair, load_labeller\n"
        "labeller = load_labeller('sh -c \"echo $$; exec sleep 60\"', None)\n"
        "labeller.ask([Pair('a', 'b', 'c', 1)], {})\n"
        "assert not labeller.answers([], 0.2).answers\n"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.monotonic() - started < 50


def test_labels_are_probabilities_or_none():
    assert checked([True, 0.25], PAIRS) == ([1.0, 0.25], "")
    assert checked((None, 0), PAIRS) == ([None, 0.0], "")
    for wrong in (math.nan, 1.5, -1, "first"):
        labels, problem = checked([1, wrong], PAIRS)
        assert labels == [1.0, None]
        assert problem == f"it returned {wrong!r} for a pair; expected a number between 0 and 1, or None"
    for wrong, message in (([1], "it returned 1 labels for 2 pairs"), (None, "it returned None; expected a label")):
        with pytest.raises(ValueError, match=message):
            checked(wrong, PAIRS)


# ---- which pairs ----

REWARDS, VANILLA = [0.0, 3.0, 1.0, 1.5], [0.0, 3.1, 1.1, -4.0]


@pytest.mark.parametrize(("choose", "pair"), [("best_worst", {0, 1}), ("uncertain", {2, 3}), ("disagreement", {1, 3})])
def test_a_choice_takes_the_pair_of_a_prompt_that_is_worth_most(choose, pair):
    ((i, j),) = choose_pairs(choose, REWARDS, VANILLA, "abcd", group=4, count=1, seed=0, t=1)
    assert {i, j} == pair


def test_pairs_have_distinct_texts_and_share_no_response():
    texts = ["a", "a", "b", "a", "same", "same", "same", "same", "c", "d", "e", "f", "g", "h", "g", "h"]
    rng = random.Random(0)
    rewards = [rng.random() for _ in texts]
    for choose in CHOICES:
        rows = choose_pairs(choose, rewards, rewards, texts, group=4, count=9, seed=1, t=2)
        assert [i // 4 for i, _ in rows] == [j // 4 for _, j in rows]
        # One of each prompt before a second one of any; the first prompt has two texts, all of the second's are alike.
        assert sorted(i // 4 for i, _ in rows[:3]) == [0, 2, 3] and sorted(i // 4 for i, _ in rows[3:]) == [2, 3]
        assert all(texts[i] != texts[j] for i, j in rows)
        assert len({row for pair in rows for row in pair}) == 10


def test_prompts_and_order_are_drawn_by_seed_and_round():
    def rows(seed, t):
        return choose_pairs("best_worst", REWARDS * 9, VANILLA * 9, "abcd" * 9, group=4, count=6, seed=seed, t=t)

    assert rows(0, 1) == rows(0, 1)
    assert len({str(rows(seed, t)) for seed in (0, 1) for t in (1, 2)}) == 4
    assert {i % 4 for i, _ in rows(0, 1)} == {0, 1}  # the better one comes first, or second


def test_the_config_names_the_choices():
    assert get_args(get_type_hints(Preferences)["choose"]) == tuple(CHOICES)


# ---- what is kept ----


def test_answers_are_read_back_without_a_line_that_is_cut_short(tmp_path):
    file = tmp_path / "run" / LABELS
    append_labels(file, list(zip(PAIRS, [1.0, None], strict=True)), 5, {PAIRS[1].key: "3-1"})
    whole = file.read_text()
    assert [json.loads(line).get("id") for line in whole.splitlines()] == [None, "3-1"]
    file.write_text(whole + whole[:20])
    assert read_labels(file) == {PAIRS[0].key: (1.0, 5), PAIRS[1].key: (None, 5)}
    for line in ("{}", whole.splitlines()[0].replace("1.0", "7")):
        file.write_text(f"{whole}{line}\n")
        with pytest.raises(ValueError, match=r"labels.jsonl, line 3: .* is no row of this file"):
            read_labels(file)


def test_the_loss_is_bradley_terry_of_fresh_labels_and_of_the_last_ones(make):
    trainer = make(preferences={"reservoir": 4, "noise": 0.1, "weight": 2.0})
    labels, updater = trainer.labels, trainer.updater
    assert labels.loss() is None
    told = []
    for t in (1, 2, 3):
        row, *_ = trainer.round(t)
        told.append(labels.labels[-labels.fresh :] if labels.fresh else labels.labels[:0])
        assert len(told[-1]) == row["labels/given"]
    older = torch.cat(told[:2])[-4:]
    assert torch.equal(labels.labels, torch.cat([older, told[2]]))
    margins = updater.margins(labels.kept)
    p = 0.9 * labels.labels + 0.1 * (1 - labels.labels)
    losses = -p * F.logsigmoid(margins) - (1 - p) * F.logsigmoid(-margins)
    torch.testing.assert_close(labels.loss(), 2 * (losses[: len(older)].mean() + losses[len(older) :].mean()))


# ---- runs ----


def test_a_run_asks_counts_and_writes(make):
    trainer = make()
    rows = trainer.train()
    written = [json.loads(line) for line in (trainer.run.folder / LABELS).read_text().splitlines()]
    assert [(row["first"], row["second"], row["round"]) for row in written] == [
        (pair.first, pair.second, pair.round) for pair in asked
    ]
    for row in rows:
        own = [line["label"] for line in written if line["round"] == row["round"]]
        assert row["labels/asked"] == len(own) > 0
        assert row["labels/skipped"] == own.count(None)
        assert row["labels/given"] == len(own) - own.count(None)
        assert row["labels/failed"] == 0
    seen = sum(row["labels/given"] for row in rows)
    agreed = sum(row["labels/given"] * row.get("labels/agreement", 0) for row in rows)
    assert rows[-1]["labels/agreement_so_far"] == pytest.approx(agreed / seen)


@pytest.mark.parametrize("feedback", ["trained", "head"])
def test_labels_change_the_reward_model(make, feedback):
    r2m = {"feedback": feedback, "learning_rate": 1e-2}
    runs = [
        make(f"run-{name}", rounds=1, r2m=r2m, preferences=preferences)
        for name, preferences in (("without", {"labeller": None}), ("with", {}), ("alone", {"grebt": 0.0}))
    ]
    for trainer in runs:
        trainer.train()
    heads = [trainer.reward_model.head.weight.tolist() for trainer in runs]
    assert heads[0] != heads[1] != heads[2] != heads[0]


def test_agreement_is_that_of_the_weights_before_they_learn(make):
    trainer = make(rounds=1, preferences={"per_round": 9})
    before = trainer.reward_model.head.weight.clone()
    row, rollout, batch = trainer.round(1)
    assert not torch.equal(before, trainer.reward_model.head.weight)
    lines = read_labels(trainer.labels.file)
    index = {
        (str(json.dumps(p)), c): i for i, (p, c) in enumerate(zip(rollout.prompts, rollout.completions, strict=True))
    }
    right = [
        (batch.initial[index[prompt, first]] > batch.initial[index[prompt, second]]).item() == (label == 1)
        for (_, prompt, first, second), (label, _) in lines.items()
        if label is not None
    ]
    assert row["labels/agreement_vanilla"] == pytest.approx(sum(right) / len(right))


def test_a_resumed_run_has_the_same_bits_and_asks_nothing_twice(make):
    straight = make("straight")
    expected = straight.train()
    stopped = make("stopped")
    stopped.train()
    folder = stopped.run.folder
    for t in (2, 3):  # as a kill leaves it after the labels of round 3 were written, and the last checkpoint in round 1
        (folder / f"checkpoint-{t}").rename(folder / f".unfinished-checkpoint-{t}")
    with (folder / LABELS).open("a") as file:
        file.write('{"prompt": "cut sh')
    asked.clear()
    resumed = make("stopped")
    assert measured(resumed.train("last")) == measured(expected)
    assert torch.equal(weights(resumed), weights(straight))
    assert asked == []


def test_a_labeller_that_fails_costs_no_round(make, caplog):
    failing = make("failing", preferences={"labeller": f"{__name__}:broken"})
    without = make("without", preferences={"labeller": None})
    with caplog.at_level(logging.WARNING, "r2m.preferences"):
        rows = failing.train()
    own = [{key: x for key, x in row.items() if not key.startswith("labels/")} for row in measured(rows)]
    assert own == measured(without.train())
    assert torch.equal(weights(failing), weights(without))
    assert [row["labels/failed"] for row in rows] == [1, 1, 1]
    assert all(row["labels/given"] == 0 and row["labels/skipped"] == row["labels/asked"] > 0 for row in rows)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("r2m.preferences")]
    assert warnings == [
        f"round 1: labeller {__name__}:broken: OSError: the judge is down. The run goes on; "
        "labels/skipped, waiting and failed count on"
    ]


def test_what_is_no_label_is_skipped_alone(make, caplog):
    trainer = make(preferences={"labeller": f"{__name__}:doubtful"})
    with caplog.at_level(logging.WARNING, "r2m.preferences"):
        rows = trainer.train()
    assert [(row["labels/given"], row["labels/failed"]) for row in rows] == [(1, 0)] * 3
    assert (
        [label for label, _ in read_labels(trainer.labels.file).values()].count(None)
        == sum(row["labels/skipped"] for row in rows)
        > 0
    )
    assert "it returned nan for a pair; expected a number between 0 and 1, or None" in caplog.text


def test_labels_that_cannot_be_written_stop_the_run(make):
    trainer = make(rounds=1)
    (trainer.run.folder / LABELS).mkdir(parents=True)
    with pytest.raises(OSError, match=r"labels.jsonl cannot be written: Is a directory"):
        trainer.train()


# ---- labels that come late ----


def test_late_labels_are_learned_from_in_a_later_round(make, monkeypatch, caplog):
    may_go_on = [threading.Event(), threading.Event()]
    calls = iter(may_go_on)
    monkeypatch.setattr(sys.modules[__name__], "verifier", lambda pairs: next(calls).wait(60) and [1.0] * len(pairs))
    trainer = make(preferences={"wait": 0.01})
    labels = trainer.labels

    def round_of(t):
        row = trainer.round(t)[0]
        return [row[f"labels/{name}"] for name in ("asked", "given", "late", "skipped", "waiting", "failed")]

    with caplog.at_level(logging.WARNING, "r2m.preferences"):
        assert round_of(1) == [3, 0, 0, 0, 3, 0]
        assert round_of(2) == [0, 0, 0, 0, 3, 0]  # nobody else is asked
    assert labels.loss() is None
    (warning,) = caplog.records
    assert "it takes longer than preferences.wait = 0.01 seconds" in warning.getMessage()
    may_go_on[0].set()
    labels.labeller._outcome.put(labels.labeller._outcome.get(timeout=60))  # it has answered in between
    assert round_of(3) == [3, 0, 3, 0, 3, 0]
    assert labels.fresh == 3 and len(labels.labels) == 3
    assert [taken for _, taken in read_labels(labels.file).values()] == [3, 3, 3]
    may_go_on[1].set()


def test_pairs_that_a_function_was_busy_with_are_asked_about_again(make, monkeypatch):
    over = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "verifier", lambda pairs: over.wait(60))
        killed = make(preferences={"wait": 0})
        killed.round(1)
    resumed = make()
    resumed.labels.load_state_dict(killed.labels.state_dict())
    row, *_ = resumed.round(2)
    assert [pair.round for pair in asked] == [1, 1, 1, 2, 2, 2]
    assert row["labels/waiting"] == 0
    assert row["labels/late"] + row["labels/given"] + row["labels/skipped"] == 6
    over.set()


def test_of_too_many_pairs_without_an_answer_the_oldest_are_dropped(make, monkeypatch):
    monkeypatch.setattr(store, "WAITING", 4)
    trainer = make(preferences={"labeller": "queue", "wait": 0})
    dropped = [trainer.round(t)[0]["labels/dropped"] for t in (1, 2)]
    assert dropped == [0, 2]
    assert [pair.round for pair in trainer.labels.waiting] == [1, 2, 2, 2]
    assert len(trainer.labels.kept_waiting.rte) == 4


class Person:
    """Answers, after each of the first `until` rounds, what was asked in the rounds before it."""

    def __init__(self, folder, until):
        self.folder, self.until, self.rounds = folder, until, 0

    def __call__(self, prompts, completions):
        self.rounds += 1
        answers = queue.answers(self.folder)
        for id, row in queue.questions(self.folder).items():
            if row["round"] < self.rounds <= self.until and id not in answers:
                (label,) = verifier([Pair(row["prompt"], row["first"], row["second"], row["round"])])
                queue.answer(self.folder, id, label, by="test", left="first")
        return {}


def test_a_person_answers_late_and_a_resumed_run_has_the_same_bits(make, tmp_path):
    queued = {"rounds": 3, "preferences": {"labeller": "queue", "wait": 0}}
    straight = make("straight", Person(tmp_path / "straight", 2), **queued)
    expected = straight.train()
    assert [row["labels/late"] + row["labels/skipped"] > 0 for row in expected] == [False, False, True]
    assert [row["labels/given"] for row in expected] == [0] * 3
    stopped = make("stopped", Person(tmp_path / "stopped", 2), **queued)
    stopped.train()
    folder = stopped.run.folder
    for t in (2, 3):  # as a kill leaves it once round 3 has asked and been told, and the last checkpoint in round 1
        (folder / f"checkpoint-{t}").rename(folder / f".unfinished-checkpoint-{t}")
    asked, taken = (folder / name for name in (queue.QUESTIONS, LABELS))
    before = asked.read_text(), taken.read_text()
    resumed = make("stopped", **queued)
    assert measured(resumed.train("last")) == measured(expected)
    assert torch.equal(weights(resumed), weights(straight))
    assert (asked.read_text(), taken.read_text()) == before
    assert {row["id"] for row in map(json.loads, before[1].splitlines())} < queue.questions(folder).keys()


def test_an_answer_given_while_the_run_was_down_is_learned_from(make, tmp_path):
    queued = {"rounds": 2, "preferences": {"labeller": "queue", "wait": 0}}
    stopped = make(**queued)
    stopped.train()
    folder = stopped.run.folder
    (folder / "checkpoint-2").rename(folder / ".unfinished-checkpoint-2")
    queue.answer(folder, "1-0", 1, by="test", left="first")
    queue.answer(folder, "2-1", 0.5, by="test", left="second")
    _, row = make(**queued).train("last")
    assert (row["labels/given"], row["labels/late"], row["labels/waiting"]) == (1, 1, 4)


def test_the_questions_say_what_the_reward_model_thinks(make):
    trainer = make(rounds=1, preferences={"labeller": "queue", "wait": 0})
    _, rollout, batch = trainer.round(1)
    rewards = dict(
        zip(zip(map(json.dumps, rollout.prompts), rollout.completions, strict=True), batch.rewards, strict=True)
    )
    for row in queue.questions(trainer.run.folder).values():
        first, second = (rewards[json.dumps(row["prompt"]), row[name]] for name in ("first", "second"))
        assert row["reward"] == pytest.approx(torch.sigmoid(first - second).item())


def test_wilsons_interval():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # table in Brown, Cai and DasGupta (2001)
    assert wilson(1, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


# ---- settings ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"r2m": {"feedback": "frozen"}}, "r2m.feedback 'frozen' learns nothing; expected trained or head"),
        ({"r2m": {"feedback": "head"}, "preferences": {"choose": "disagreement"}}, "'head' changes no margin"),
        ({"preferences": {"noise": 0.5}}, "preferences.noise is 0.5; expected at least 0 and less than 0.5"),
        ({"preferences": {"per_round": 0}}, "preferences.per_round is 0; expected at least 1"),
        ({"preferences": {"wait": -1}}, "preferences.wait is -1.0; expected seconds, 0 or more"),
        ({"preferences": {"labeller": None, "grebt": 0.5}}, "preferences.grebt is 0.5 without preferences.labeller"),
    ],
)
def test_settings_that_cannot_be_are_an_error(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(settings(tmp_path, **overrides))


def test_a_labeller_that_is_not_there_is_told_before_a_model_is_loaded(tmp_path):
    config = config_from_dict(settings(tmp_path, preferences={"labeller": "missing.py:label"}))
    with pytest.raises(ValueError, match=r"preferences.labeller: labeller is 'missing.py:label'; there is no file"):
        check_names(config)


def test_processes_wait_for_one_another_longer_than_for_the_labeller(tmp_path):
    config = config_from_dict(settings(tmp_path, preferences={"wait": 120}, placement={"timeout": 2}))
    config.check_processes(1)
    with pytest.raises(ValueError, match=r"preferences.wait is 120 seconds on 2 processes.* placement.timeout = 2 min"):
        config.check_processes(2)


def test_a_warning_when_rewards_disagree_with_the_last_labels(caplog):
    agreements = [0.8, 0.9, 0.3, 0.3, 0.3, 0.4, 0.9]
    history = [{"round": t, "labels/given": 25, "labels/agreement": x} for t, x in enumerate(agreements, 1)]
    with caplog.at_level(logging.WARNING, "r2m.runs.monitor"):
        for t in range(1, len(history) + 1):
            warn_about_labels(history[:t])
    assert [record.getMessage()[:55] for record in caplog.records] == [
        "round 4: rewards agree with 30 % of the last labels, be"
    ]
