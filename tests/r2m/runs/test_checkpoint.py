"""A run that is killed, stopped, starved of disk or led astray: what is lost, what is said, and how it goes on."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from r2m import R2MTrainer, load_config
from r2m.commands.build import build_trainer
from r2m.config import Lora, config_from_dict
from r2m.policy.load import add_adapter
from r2m.runs.checkpoint import MAY_CHANGE, claim, cut_back, load_checkpoint, save_checkpoint
from r2m.runs.folder import SAMPLES, checkpoints, find_checkpoint, read_metrics, read_rows

PROMPTS = ["hello ", "what is it? ", "a b", "xyz", [{"role": "user", "content": "hi"}]]
K = 4


def settings(folder, **overrides):
    """A float32 run of a few rounds with whole groups in a micro-batch, as the keys of a YAML file."""
    values = {
        "rounds": 4, "prompts_per_round": 2, "num_generations": K, "micro_batch_size": K, "precision": "float32",
        "learning_rate": 1e-3, "output_dir": str(folder),
        "generation": {"max_new_tokens": 5, "max_prompt_tokens": 40, "eos_token_ids": list(range(1, 50))},
        "r2m": {"learning_rate": 1e-3, "inner_width": 16},
        "checkpoints": {"every": 1, "keep": 100},
    }  # fmt: skip
    for key, value in overrides.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    return values


def with_adapter(seed=0, rank=2):
    policy = tiny.policy(num_hidden_layers=1, seed=seed)
    torch.manual_seed(7)
    return add_adapter(policy, Lora(rank=rank))


@pytest.fixture
def make(reward_checkpoint, tmp_path):
    """A trainer on fresh tiny models; keywords that the trainer does not know are keys of the config."""

    def build(*, policy=None, folder="run", prompts=PROMPTS, reward=None, **other):
        trainer_keys = ("generator", "sample_metrics", "eval_prompts", "judge")
        options = {key: other.pop(key) for key in trainer_keys if key in other}
        policy = tiny.policy(num_hidden_layers=1) if policy is None else policy
        return R2MTrainer(
            policy,
            tiny.reward_model(reward or reward_checkpoint, policy),
            tiny.tokenizer(),
            prompts,
            config_from_dict(settings(tmp_path / folder, **other)),
            **options,
        )

    return build


def measured(rows):
    """Rows without what the clock and the machine's memory put into them."""
    return [{key: x for key, x in row.items() if not key.startswith(("seconds/", "memory/"))} for row in rows]


def weights(trainer):
    state = dict(trainer.policy.named_parameters()) | dict(trainer.reward_model.named_parameters())
    return {name: p.detach().clone() for name, p in state.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- killed ----


def judge(prompts, responses):
    return [len(response) % 7 for response in responses]


def label(pairs):
    return [len(pair.first) / (len(pair.first) + len(pair.second)) for pair in pairs]


@pytest.fixture
def run_file(tmp_path, reward_checkpoint):
    """A run from files, with a judge and a labeller, adapters left out: every kind of state is in its checkpoints."""
    tiny.policy(num_hidden_layers=1).save_pretrained(tmp_path / "policy")
    tiny.tokenizer().save_pretrained(tmp_path / "policy")
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    values = settings(
        "",
        policy=str(tmp_path / "policy"),
        reward_model=str(reward_checkpoint),
        prompts=str(tmp_path / "prompts.jsonl"),
        rounds=30,
        lr_schedule="cosine",
        warmup_rounds=2,
        checkpoints={"every": 2, "keep": 2},
        evaluation={"every": 3, "prompts": str(tmp_path / "prompts.jsonl"), "judge": f"{__file__}:judge"},
        preferences={"labeller": f"{__file__}:label", "reservoir": 5},
        placement={"device": "cpu"},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def go_on(file, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    trainer = build_trainer(load_config(file, [f"output_dir={folder}"]))
    trainer.train("last")
    trainer.save_pretrained(folder)


@pytest.fixture(scope="session")
def processes():
    """Children that find everything imported: each is forked from a server that has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoint", "transformers.models.llama.modeling_llama"])
    finish(context.Process(target=int))  # the server is up: what comes next is timed
    return context


def finish(process, patience=None):
    """Start `process` and wait for its end, or kill it when `patience` (seconds) is over; returns how it ended."""
    process.start()
    process.join(patience)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def outcome(folder):
    files = {
        path.name: load_file(path)
        for path in (folder / "policy", folder / "reward_model")
        for path in path.glob("*.safetensors")
    }
    return files, measured(read_metrics(folder))


def assert_equal_runs(folder, expected):
    (files, rows), (expected_files, expected_rows) = outcome(folder), expected
    assert rows == expected_rows
    assert files.keys() == expected_files.keys() == {"model.safetensors", "r2m.safetensors"}
    assert all(same(files[name], expected_files[name]) for name in files)


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_equals_one_that_never_stopped(run_file, tmp_path, processes):
    start = time.perf_counter()
    assert finish(processes.Process(target=go_on, args=(run_file, tmp_path / "straight"))) == 0
    duration, expected = time.perf_counter() - start, outcome(tmp_path / "straight")
    assert [row["round"] for row in expected[1]] == list(range(1, 31))

    moments, killed, folder = random.Random(0), 0, tmp_path / "killed-0"
    while killed < 10:
        child = processes.Process(target=go_on, args=(run_file, folder))
        end = finish(child, moments.uniform(0.05, 0.5) * duration)
        killed += end == -signal.SIGKILL
        rounds = [row["round"] for row in read_metrics(folder)]
        assert rounds == list(range(1, len(rounds) + 1))
        if end == 0:
            assert_equal_runs(folder, expected)
            folder = tmp_path / f"killed-{killed}"
        else:
            assert end == -signal.SIGKILL
    assert finish(processes.Process(target=go_on, args=(run_file, folder))) == 0
    assert_equal_runs(folder, expected)


def killed_at(step):
    """This process dies as it makes, moves or removes something on the disk for the `step`-th time from now."""
    calls = 0

    def counted(original):
        def call(*args, **keywords):
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **keywords)

        return call

    os.fsync, os.mkdir, os.rename, os.unlink, os.rmdir = map(
        counted, (os.fsync, os.mkdir, os.rename, os.unlink, os.rmdir)
    )


@pytest.mark.slow
def test_a_save_killed_at_any_step_leaves_complete_checkpoints_alone(make, tmp_path):
    trainer, other = make(checkpoints={"keep": 1}), make(folder="other")
    trainer.train()
    step, status = 0, 1
    while status != 0:
        step += 1
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"step-{step}")
        trainer.run.config.output_dir = str(folder)
        if (child := os.fork()) == 0:
            killed_at(step)
            save_checkpoint(trainer.run, 5)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        found = checkpoints(folder)
        assert list(found) in ([4], [4, 5], [5])
        for t, checkpoint in found.items():
            assert load_checkpoint(other.run, checkpoint) == t
        assert len(cut_back(folder, 6)) == 4
        assert list(folder.glob(".unfinished*")) == []
    assert list(found) == [5]
    assert step > 15


# ---- stopped by SIGTERM ----


def terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    return {}


@pytest.mark.parametrize(("moment", "last"), [("rollout", 2), ("policy", 3), ("end of round", 3)])
def test_sigterm_saves_at_once_or_at_the_end_of_the_round_and_the_run_goes_on_from_there(
    make, monkeypatch, moment, last
):
    straight = make(folder="straight", checkpoints={"every": 0})
    expected = straight.train()
    trainer = make(checkpoints={"every": 0})
    owner, name = {
        "rollout": (trainer.learner, "sample"),
        "policy": (trainer.learner, "step"),
        "end of round": (trainer.evaluator, "held_out"),
    }[moment]
    original, handler = getattr(owner, name), signal.getsignal(signal.SIGTERM)

    def stopping(*args):
        if len(trainer.history) == 2:
            terminate()
        return original(*args)

    monkeypatch.setattr(owner, name, stopping)
    trainer.config.evaluation.every = 3
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert list(checkpoints(trainer.run.folder)) == [last]
    resumed = make(checkpoints={"every": 0})
    assert measured(resumed.train("last")) == measured(expected)
    assert same(weights(resumed), weights(straight))


def test_sigterm_before_the_first_round_is_over_leaves_nothing_to_resume_and_resuming_starts(make, monkeypatch):
    trainer = make()
    monkeypatch.setattr(trainer.learner, "sample", terminate)
    with pytest.raises(SystemExit):
        trainer.train()
    assert checkpoints(trainer.run.folder) == {}
    assert [row["round"] for row in make().train("last")] == [1, 2, 3, 4]


# ---- what is kept ----


def test_the_last_checkpoints_and_the_best_by_the_judge_are_kept(make, caplog):
    caplog.set_level("INFO")
    scores = iter([1.0, 5.0, 2.0, 5.0, 3.0, 4.0])
    trainer = make(
        rounds=6,
        checkpoints={"keep": 2},
        evaluation={"every": 1},
        eval_prompts=["hello"],
        judge=lambda *_: [next(scores)],
    )
    rows = trainer.train()
    assert [row["eval/judge"] for row in rows] == [1.0, 5.0, 2.0, 5.0, 3.0, 4.0]
    assert list(checkpoints(trainer.run.folder)) == [2, 5, 6]
    assert find_checkpoint(trainer.run.folder, "best").name == "checkpoint-2"
    assert find_checkpoint(trainer.run.folder, "last").name == "checkpoint-6"
    assert find_checkpoint(trainer.run.folder, "5").name == "checkpoint-5"
    with pytest.raises(FileNotFoundError, match=r"checkpoint '4' is not in .*; there are 2, 5, 6, last, best"):
        find_checkpoint(trainer.run.folder, "4")
    saved = [record.getMessage() for record in caplog.records if "checkpoint-" in record.getMessage()]
    manifest = json.loads((trainer.run.folder / "checkpoint-6" / "manifest.json").read_text())
    size = sum(manifest["files"].values()) / 2**20
    assert len(saved) == 6
    assert f"checkpoint-6: {size:.1f} MiB in 0." in saved[-1]


def test_a_round_that_the_judge_likes_best_is_saved_out_of_turn(make):
    scores = iter([1.0, 2.0, 0.0, 0.0])
    trainer = make(
        checkpoints={"every": 4, "keep": 1},
        evaluation={"every": 1},
        eval_prompts=["a"],
        judge=lambda *_: [next(scores)],
    )
    trainer.train()
    assert list(checkpoints(trainer.run.folder)) == [2, 4]


def test_an_adapters_checkpoint_holds_the_adapter_alone(make):
    trainer = make(policy=with_adapter(), rounds=1)
    trainer.train()
    saved = load_file(trainer.run.folder / "checkpoint-1" / "policy.safetensors")
    assert saved
    assert all("lora" in name for name in saved)


# ---- resuming something else ----


@pytest.fixture
def saved(make):
    trainer = make(policy=with_adapter(), folder="saved")
    trainer.train()
    return trainer.run.folder / "checkpoint-2"


def assert_unchanged_by(trainer, folder, message):
    before = weights(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train(folder)
    assert same(weights(trainer), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 9}, r"rounds is 9, the checkpoint's run has 4 and w\(t\) depends on it"),
        ({"learning_rate": 0.5}, r"learning_rate is 0.5, the checkpoint's run has 0.001; .* may change only policy, "),
        ({"r2m": {"floor": 0.2}}, "r2m.floor is 0.2, the checkpoint's run has 0.6"),
        ({"kl": {"beta": 1.0}}, "kl.beta is 1.0"),
    ],
)
def test_a_setting_that_makes_another_run_is_an_error(make, saved, change, message):
    assert_unchanged_by(make(policy=with_adapter(), **change), saved, message)


def test_settings_that_may_change_do(make, saved):
    changes = {
        "evaluation": {"every": 2},
        "checkpoints": {"every": 0},
        "micro_batch_size": 2 * K,
        "trust_remote_code": True,
    }
    rows = make(policy=with_adapter(), folder="elsewhere", **changes).train(saved)
    assert [row["round"] for row in rows] == [3, 4]


def test_the_list_of_what_may_change_names_keys_that_exist():
    config = config_from_dict({})
    for pattern in MAY_CHANGE:
        block, _, key = pattern.partition(".")
        assert hasattr(config, block)
        assert key in ("", "*") or hasattr(getattr(config, block), key)


def test_a_checkpoint_of_another_base_model_of_the_same_shape_is_an_error(make, saved):
    message = "is of another model: its run started from policy .* whose frozen weights are not those of"
    assert_unchanged_by(make(policy=with_adapter(seed=5)), saved, message)


def test_a_checkpoint_of_another_reward_model_of_the_same_shape_is_an_error(make, saved, tmp_path):
    other = tiny.save_reward_checkpoint(tmp_path / "other", seed=9)
    assert_unchanged_by(
        make(policy=with_adapter(), reward=other), saved, "another model: its run started from reward_model"
    )


def test_a_checkpoint_of_another_start_of_full_tuning_is_an_error(make):
    trainer = make(folder="full", rounds=1)
    trainer.train()
    other = make(policy=tiny.policy(num_hidden_layers=1, seed=5), rounds=1)
    assert_unchanged_by(other, trainer.run.folder / "checkpoint-1", "started from policy")


def test_a_checkpoint_of_a_run_on_other_prompts_is_an_error(make, saved):
    trainer = make(policy=with_adapter(), prompts=[*PROMPTS[:-1], "something else"])
    assert_unchanged_by(trainer, saved, "is of a run on 5 usable prompts; the 5 given are not the same")


def test_an_adapter_of_another_rank_is_an_error(make, saved):
    assert_unchanged_by(
        make(policy=with_adapter(rank=3)), saved, r"resume_from: the trainable weights in .* are not those"
    )


def test_a_folder_without_a_checkpoint_is_an_error(make, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no manifest.json; expected a folder checkpoint-<round>"):
        make().train(tmp_path)


@pytest.mark.parametrize("name", ["policy.safetensors", "state.pt", "reward_model/r2m.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_named_with_the_others(make, saved, name, damage):
    size = (saved / name).stat().st_size
    if damage == "truncated":
        os.truncate(saved / name, size // 2)
    else:
        (saved / name).unlink()
    state = f"has {size // 2} bytes" if damage == "truncated" else "is missing"
    others = "other checkpoints there: checkpoint-1, checkpoint-3, checkpoint-4"
    message = f"checkpoint-2 is damaged: {name} {state}, expected {size} bytes; {others}"
    assert_unchanged_by(make(policy=with_adapter()), saved, message)


def test_a_half_written_checkpoint_does_not_count_and_goes_away(make):
    trainer = make(rounds=1)
    trainer.train()
    complete = trainer.run.folder / "checkpoint-1"
    (complete / "manifest.json").unlink()
    complete.rename(trainer.run.folder / ".unfinished-checkpoint-1")
    assert checkpoints(trainer.run.folder) == {}
    assert [row["round"] for row in make(rounds=1).train("last")] == [1]
    assert list(trainer.run.folder.glob(".unfinished*")) == []


def test_a_folder_that_holds_a_run_is_not_started_over(make):
    make(rounds=1).train()
    trainer = make(rounds=1)
    with pytest.raises(FileExistsError, match=r"holds a run already; resume it \(--resume\), or choose another folder"):
        trainer.train()
    assert len(read_metrics(trainer.run.folder)) == 1


def test_rounds_after_the_checkpoint_are_taken_out_with_their_checkpoints_and_run_again(make):
    expected = measured(make().train())
    trainer = make()
    samples = read_rows(trainer.run.folder / SAMPLES)
    assert [row["round"] for row in samples] == [1, 2, 3, 4]
    assert measured(trainer.train(trainer.run.folder / "checkpoint-2")) == expected
    assert read_rows(trainer.run.folder / SAMPLES) == samples
    assert list(checkpoints(trainer.run.folder)) == [1, 2, 3, 4]


def test_a_metrics_row_cut_short_is_left_out(make):
    trainer = make(rounds=2)
    rows = trainer.train()
    file = trainer.run.folder / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert read_metrics(trainer.run.folder) == rows[:1]


# ---- disks, folders, and what is not finite ----


def test_a_full_disk_ends_the_run_with_one_error_and_the_last_checkpoint_stays(make):
    trainer = make()

    def starve(*_):
        if len(trainer.history) == 2:  # no file may grow beyond this from the third round on
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        return {}

    trainer.session.sample_metrics = starve
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"the checkpoint of round 3 cannot be written to .*run: "):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(checkpoints(trainer.run.folder)) == [1, 2]
    assert list(trainer.run.folder.glob(".unfinished*")) == []
    expected = measured(make(folder="straight").train())
    assert measured(make().train("last")) == expected


def test_a_disk_without_room_is_noticed_before_anything_is_written(make, monkeypatch):
    trainer = make()
    usage = shutil.disk_usage(trainer.run.folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(OSError, match=r"checkpoint of round 1 cannot be written .* it needs \d+ MiB, 0 MiB are free"):
        trainer.train()
    assert len(read_metrics(trainer.run.folder)) == 1


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_round(make, tmp_path):
    (tmp_path / "file").write_text("")
    trainer = make(folder="file/run")
    with pytest.raises(OSError, match=r"output_dir .*file/run cannot be written: .*Not a directory"):
        trainer.train()


def test_a_read_only_folder_is_an_error(tmp_path):
    # Permissions do not bind root: become nobody for a moment, in a place that nobody may enter.
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place) / "run"
        folder.mkdir(mode=0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(OSError, match=r"output_dir .*run cannot be written: .*denied"), claim(folder):
                pass
        finally:
            if os.getuid() == 0:
                os.seteuid(0)


def hold(folder, connection):
    with claim(folder):
        connection.send("held")
        connection.recv()


@pytest.mark.slow
def test_a_second_run_on_one_folder_is_an_error_until_the_first_is_gone_however_it_went(make, processes):
    trainer = make(rounds=1)
    ours, theirs = processes.Pipe()
    other = processes.Process(target=hold, args=(trainer.run.folder, theirs))
    other.start()
    assert ours.recv() == "held"
    with pytest.raises(OSError, match=r"output_dir .*: another run is writing there"):
        trainer.train()
    other.kill()
    other.join()
    assert len(trainer.train()) == 1


@pytest.mark.slow
def test_a_nan_at_round_50_names_the_last_good_checkpoint_from_which_the_run_goes_on(make, monkeypatch):
    trainer = make(rounds=51, prompts_per_round=1, epochs=1, checkpoints={"every": 7, "keep": 1})
    collect = trainer.updater.collect

    def broken(rows, hidden, mask):
        collect(rows, hidden * (math.nan if len(trainer.history) == 49 else 1), mask)

    monkeypatch.setattr(trainer.updater, "collect", broken)
    with pytest.raises(
        FloatingPointError, match=r"phase reward_model, round 50: .*; last good checkpoint: .*checkpoint-49$"
    ):
        trainer.train()
    resumed = make(rounds=51, prompts_per_round=1, epochs=1, checkpoints={"every": 7, "keep": 1})
    assert len(resumed.train("last")) == 51


def test_weights_that_are_not_finite_are_not_saved(make):
    trainer = make(rounds=2, learning_rate=0.0)

    def poison(*_):
        if len(trainer.history) == 1:
            trainer.policy.model.norm.weight.data[0] = math.inf
        return {}

    trainer.session.sample_metrics = poison
    with pytest.raises(
        FloatingPointError, match=r"weight model.norm.weight is not finite; last good checkpoint: .*-1$"
    ):
        trainer.train()
    assert list(checkpoints(trainer.run.folder)) == [1]
