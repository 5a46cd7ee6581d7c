"""What the command line does with a config or with the folder of a run."""

import logging
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import accelerate.tracking
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import HELD_OUT, PAIRS, PROMPTS, K, judge, write_config, write_jsonl

from r2m import R2MRewardModel, load_config
from r2m.commands import evaluate as run_module
from r2m.commands.build import build_trainer, load_data
from r2m.commands.evaluate import evaluate_run
from r2m.commands.train import dry_run, run
from r2m.data.sources import Preference
from r2m.fitting import pairs as fitting
from r2m.runs.checkpoint import load_checkpoint
from r2m.runs.folder import SAMPLES, best_round, checkpoints, read_metrics, read_rows, run_to_evaluate


def other_judge(prompts, responses):
    return [42.0] * len(responses)


@pytest.fixture
def run_file(tmp_path, reward_checkpoint):
    return write_config(tmp_path, reward_checkpoint)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, reward_checkpoint):
    """The folder of a run, to be read only."""
    config = load_config(write_config(tmp_path_factory.mktemp("finished"), reward_checkpoint))
    run(config)
    return tmp_path_factory.getbasetemp() / config.output_dir


def without_costs(rows):
    return [{key: x for key, x in row.items() if not key.startswith(("seconds/", "memory/"))} for row in rows]


# ---- mistakes in a config ----

CHEAP = [
    (['prompts=""'], ValueError, "prompts is not set; expected it in the config file or as prompts=..."),
    (["prompts=none.txt"], OSError, "prompts: .*none.txt"),
    (["columns.prompt=question"], ValueError, r'prompts: .*prompts.jsonl, line 1: the field "question" is missing'),
    (["evaluation.prompts=none.jsonl"], OSError, "evaluation.prompts: .*none.jsonl"),
    (["evaluation.pairs=none.csv"], OSError, "evaluation.pairs: .*none.csv"),
    (["evaluation.pairs=pairs.txt"], ValueError, r"evaluation.pairs: pairs.txt: a .txt file holds prompts only"),
    (
        ['evaluation.prompts=""'],
        ValueError,
        "evaluation.judge is set without evaluation.prompts; expected the ",
    ),
    (["evaluation.judge=judge"], ValueError, "evaluation.judge: judge is 'judge'; expected 'module:function' or"),
    (["evaluation.judge=no_such:judge"], ImportError, "evaluation.judge: judge is 'no_such:judge'; no_such cannot be"),
    (["placement.device=gpu"], ValueError, "placement.device is 'gpu', which cannot be used: "),
    (["placement.reward_model=gpu"], ValueError, "placement.reward_model is 'gpu', which cannot be used: "),
    (["trackers=[wandb]"], ImportError, "trackers names wandb, not installed: pip install wandb"),
]


@pytest.mark.parametrize(("overrides", "error", "message"), CHEAP, ids=[case[0][0] for case in CHEAP])
def test_a_mistake_names_its_key_before_a_model_is_looked_for_or_a_folder_made(
    run_file, tmp_path, monkeypatch, overrides, error, message
):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    config = load_config(run_file, ["policy=nowhere", "reward_model=nowhere", *overrides])
    with pytest.raises(error, match=message):
        run(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["policy", "reward_model"])
def test_a_model_that_is_not_there_names_its_key(run_file, tmp_path, key):
    with pytest.raises(OSError, match=f"{key}: .*{tmp_path / 'none'}"):
        build_trainer(load_config(run_file, [f"{key}={tmp_path / 'none'}"]))


# ---- what a config describes ----


def test_a_trainer_has_what_the_config_names_and_weights_by_its_seed(run_file):
    def weights(*overrides):
        trainer = build_trainer(load_config(run_file, ["lora.rank=2", *overrides]))
        named = [*trainer.policy.named_parameters(), *trainer.reward_model.named_parameters()]
        return trainer, {name: p.detach() for name, p in named}

    (trainer, first), (_, again), (_, other) = weights(), weights(), weights("seed=1")
    evaluator = trainer.evaluator
    assert (trainer.prompts, evaluator.prompts) == (PROMPTS, HELD_OUT)
    assert evaluator.judge(["a"], ["abc"]) == [3]
    assert len(evaluator.pairs[1].prompts) == 2 * (len(PAIRS) - 1)  # one pair is longer than the reward model reads
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert any("lora_A" in name for name in differing)
    assert any(name.startswith("attention.") for name in differing)


PLACES = [
    ["placement.offload_reference=true"],
    ["placement.offload_reward_model=true"],
    ["placement.reward_model=cpu", "placement.offload_reference=true", "placement.offload_reward_model=true"],
    ["lora.rank=2", "placement.offload_reference=true"],
]


@pytest.mark.parametrize("overrides", PLACES, ids=" ".join)
def test_where_models_wait_changes_no_bit(run_file, finished, tmp_path, overrides):
    adapter = [item for item in overrides if item.startswith("lora")]
    if adapter:
        expected = build_trainer(load_config(run_file, [*adapter, f"output_dir={tmp_path / 'plain'}"])).train()
    else:
        expected = read_metrics(finished)
    trainer = build_trainer(load_config(run_file, overrides))
    assert without_costs(trainer.train()) == without_costs(expected)


def test_attention_by_hand_gives_the_metrics_of_fused_attention(run_file, tmp_path):
    rows = []
    for name in ("eager", "sdpa"):
        overrides = [f"placement.attention={name}", f"output_dir={tmp_path / name}", "rounds=1", "learning_rate=0"]
        trainer = build_trainer(load_config(run_file, overrides))
        assert trainer.policy.config._attn_implementation == name
        assert trainer.reward_model.backbone.config._attn_implementation == name
        (row,) = without_costs(trainer.train())
        rows.append({key: x for key, x in row.items() if key.startswith(("reward/", "policy/", "length/", "eval/"))})
    # The reward model's backbone is in bfloat16, and the loss follows its rewards.
    assert rows[0] == pytest.approx(rows[1], rel=2e-2, abs=2e-2)
    for key in ("policy/entropy", "policy/reference_log_prob", "policy/kl", "length/mean", "eval/length"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4, abs=1e-4)


# ---- a dry run ----


def test_a_dry_run_measures_one_small_round_writes_nothing_and_prints_the_config(
    run_file, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    sizes = ["rounds=100", "prompts_per_round=64", "minibatches=4", "warmup_rounds=5", "generation.batch_size=8"]
    config = load_config(run_file, [*sizes, "checkpoints.every=0", "lr_schedule=cosine", "trackers=[tensorboard]"])
    printed, _, measured = dry_run(config).partition("\n\n")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_config(tmp_path / "printed.yaml") == config
    title, *lines = measured.splitlines()
    assert title == f"one round of 2 prompts x {K} responses:"
    row = {name.strip(): float(value) for name, value in (line.split(": ") for line in lines)}
    assert {"eval/reward", "eval/judge", "rm/pair_accuracy", "reward/mean", "seconds/rollout"} <= row.keys()
    assert 0 < row["length/mean"] <= 5
    assert any(record.getMessage().startswith("checkpoint-1: ") for record in caplog.records)


def test_a_dry_run_misses_a_tracker_as_the_run_would(run_file, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ImportError, match="trackers names tensorboard, not installed: pip install tensorboard"):
        dry_run(load_config(run_file, ["trackers=[tensorboard]"]))


def test_positions_other_than_those_of_the_saved_reward_model_are_an_error(run_file, finished):
    config = load_config(run_file, [f"reward_model={finished / 'reward_model'}", "r2m.positions=response"])
    message = "r2m.positions is 'response', and the reward model was fitted on 'all'; expected r2m.positions=all, or"
    with pytest.raises(ValueError, match=message):
        build_trainer(config)


# ---- measuring a finished run ----


def test_what_a_saved_reward_model_has_decided_is_in_the_resolved_config(run_file, finished, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    saved = [f"reward_model={finished / 'reward_model'}", "r2m.inner_width=64", "r2m.standardize=true"]
    trainer = build_trainer(load_config(run_file, saved))
    assert (trainer.config.r2m.inner_width, trainer.config.r2m.standardize) == (16, False)
    assert "brings its own inner_width = 16, standardize = False" in caplog.text
    assert "inner_width: 16" in dry_run(load_config(run_file, saved))
    with pytest.raises(ValueError, match=r"r2m.zero_output is true, and reward_model .* brings its cross-attention"):
        build_trainer(load_config(run_file, [*saved, "r2m.zero_output=true"]))


def test_a_run_keeps_its_best_and_worst_samples(finished):
    rows, means = read_rows(finished / SAMPLES), [row["reward/mean"] for row in read_metrics(finished)]
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row, mean in zip(rows, means, strict=True):
        (best, second), (worst, other) = ([sample["reward"] for sample in row[kind]] for kind in ("best", "worst"))
        assert best >= second >= other >= worst and best >= mean >= worst
        assert all(sample["prompt"] in PROMPTS for sample in row["best"] + row["worst"])


def reported(text):
    """A report's numbers by their labels."""
    lines = text.partition("\n\n")[0].splitlines()[1:]
    return dict(line.strip().rsplit(": ", 1) for line in lines)


@pytest.mark.parametrize("which", ["last", "best", "1", "2"])
def test_a_checkpoint_is_measured_as_it_was_in_training(finished, which):
    text = evaluate_run(finished, which)
    rows = read_metrics(finished)
    t = {"last": 3, "best": best_round(rows)}.get(which) or int(which)
    title, row, report = text.splitlines()[0], rows[t - 1], reported(text)
    assert title == f"checkpoint-{t} (round {t} of 3) on 3 held-out prompts"
    names = {
        "reward (w = Omega)": "eval/reward",
        "initial reward model's score": "eval/initial_reward",
        "KL to the reference (nats / response)": "eval/kl",
        "length (tokens)": "eval/length",
        "share of responses that end": "eval/eos_share",
        "judge": "eval/judge",
        "reward model's pair accuracy, w = Omega": "rm/pair_accuracy",
    }
    assert {label: report[label] for label in names} == {label: f"{row[key]:.4g}" for label, key in names.items()}


def test_measuring_a_checkpoint_makes_no_gradients_and_no_optimizer_state(finished, monkeypatch):
    trainers = []
    monkeypatch.setattr(
        run_module, "build_trainer", lambda config: trainers.append(build_trainer(config)) or trainers[0]
    )
    evaluate_run(finished)
    (trainer,) = trainers
    assert trainer.learner.optimizer.state == trainer.updater.optimizer.state == {}
    weights = [*trainer.policy.parameters(), *trainer.reward_model.parameters()]
    assert all(p.grad is None for p in weights)


def test_a_report_holds_what_the_restored_trainer_measures_and_its_samples(finished):
    trainer = build_trainer(load_config(finished / "config.yaml"))
    load_checkpoint(trainer.run, finished / "checkpoint-2")
    measures, rollout, batch = trainer.evaluate(HELD_OUT)
    text = evaluate_run(finished, "2")
    report = reported(text)
    assert report["entropy (nats / token)"] == f"{measures['policy/entropy']:.4g}"
    assert report["reference log-likelihood (nats / token)"] == f"{measures['policy/reference_log_prob']:.4g}"
    assert report["reward model's pair accuracy, w = 1"] == f"{trainer.held_out_accuracy(1.0):.4g}"
    titles, *samples = text.partition("\n\n")[2].splitlines()
    assert titles.split() == ["prompt", "response", "reward", "initial", "judge"]
    for i, line in enumerate(samples):
        scores = judge(None, rollout.completions)
        assert line.startswith(HELD_OUT[i].strip())
        assert line.split()[-3:] == [f"{x:.3f}" for x in (batch.rewards[i], batch.initial[i], scores[i])]
    assert len(samples) == len(HELD_OUT)


def test_other_prompts_pairs_and_judge_take_the_place_of_the_runs(finished, tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "something else"}])
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p ", "chosen": "a", "rejected": "b"}])
    text = evaluate_run(finished, prompts=prompts, pairs=pairs, judge=f"{__file__}:other_judge")
    assert text.splitlines()[0].endswith("on 1 held-out prompts")
    assert reported(text)["judge"] == "42"
    assert reported(text)["reward model's pair accuracy, w = 1"] in ("0", "1")
    with pytest.raises(ValueError, match=r"evaluation.judge: judge is 'nonsense'"):
        evaluate_run(finished, judge="nonsense")


def test_a_judge_whose_scores_are_all_equal_recommends_nothing(run_file):
    config = load_config(run_file, [f"evaluation.judge={__file__}:other_judge", "rounds=2", "learning_rate=0"])
    assert run(config).endswith("; the judge cannot tell which round is best: its scores of all of them are equal")
    with pytest.raises(
        FileNotFoundError, match=r"'best' is not in .*: the judge's scores of all rounds are equal, it can"
    ):
        evaluate_run(config.output_dir, "best")


def test_a_damaged_checkpoint_is_what_the_option_chose(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-2" / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^checkpoint: .*checkpoint-2 is damaged: state.pt has 0 bytes"):
        evaluate_run(tmp_path / "out", "2")


def test_files_of_evaluation_may_have_columns_of_their_own(run_file, tmp_path):
    files = {
        "prompts": write_jsonl(tmp_path / "p.jsonl", [{"question": "a"}]),
        "evaluation.prompts": write_jsonl(tmp_path / "e.jsonl", [{"text": "b"}]),
        "evaluation.pairs": write_jsonl(tmp_path / "h.jsonl", [{"text": "c", "chosen": "d", "rejected": "e"}]),
    }
    overrides = ["columns.prompt=question", *(f"{key}={file}" for key, file in files.items())]
    data = load_data(load_config(run_file, [*overrides, "evaluation.columns.prompt=text"]))
    assert (data["prompts"], data["eval_prompts"]) == (["a"], ["b"])
    assert data["held_out_pairs"] == [Preference("c", "d", "e")]
    with pytest.raises(ValueError, match=r'evaluation.prompts: .*the field "question" is missing.*columns says which'):
        load_data(load_config(run_file, overrides))


def test_the_columns_of_other_files_can_be_named_when_a_run_is_measured(finished):
    config, checkpoint = run_to_evaluate(finished, "last", columns={"prompt": "text"})
    assert (config.evaluation.columns, checkpoint.name) == ({"prompt": "text"}, "checkpoint-3")


def test_rows_that_are_none_are_skipped_by_the_config(run_file, tmp_path):
    pairs = [{"prompt": "c", "chosen": "d", "rejected": "d"}, {"prompt": "c", "chosen": "d", "rejected": "e"}]
    overrides = [f"evaluation.pairs={write_jsonl(tmp_path / 'ties.jsonl', pairs)}"]
    with pytest.raises(ValueError, match=r"evaluation.pairs: .* are equal"):
        load_data(load_config(run_file, overrides))
    assert len(load_data(load_config(run_file, [*overrides, "skip_invalid=true"]))["held_out_pairs"]) == 1


def test_a_judge_that_returns_too_few_scores_is_an_error(finished, tmp_path):
    (tmp_path / "judge.py").write_text("def judge(prompts, responses):\n    return [1.0]\n")
    with pytest.raises(ValueError, match="judge returned 1 scores for 3 responses"):
        evaluate_run(finished, judge=f"{tmp_path / 'judge.py'}:judge")


def test_what_cannot_be_measured_is_said(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.yaml; expected the output_dir of a run"):
        evaluate_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"checkpoint '7' is not in .*; there are 1, 2, 3, last, best"):
        evaluate_run(finished, "7")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(finished / name, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"checkpoint 'last' is not in .*; there is none"):
        evaluate_run(tmp_path)
    values = yaml.safe_load((finished / "config.yaml").read_text())
    values["evaluation"] |= {"prompts": "", "judge": ""}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"evaluation.prompts is not set in the run's config; expected --prompts FILE"):
        evaluate_run(tmp_path)


def test_measuring_reads_no_state_of_an_optimizer_and_runs_no_more_sequences_than_a_micro_batch(finished, monkeypatch):
    made, sequences = [], []
    build, embed, stream = run_module.build_trainer, R2MRewardModel.run_backbone, fitting.stream_hidden

    def built(config):
        made.append(build(config))
        return made[-1]

    def embedded(model, rows):
        sequences.append(len(rows))
        return embed(model, rows)

    def streamed(policy, rollout, batch_size):
        sequences.append(batch_size)
        return stream(policy, rollout, batch_size)

    monkeypatch.setattr(run_module, "build_trainer", built)
    monkeypatch.setattr(R2MRewardModel, "run_backbone", embedded)
    monkeypatch.setattr(fitting, "stream_hidden", streamed)
    evaluate_run(finished)
    (trainer,) = made
    assert not trainer.learner.optimizer.state and not trainer.updater.optimizer.state
    assert max(sequences) == trainer.config.micro_batch_size == K


def test_measuring_leaves_a_run_as_it_was(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    evaluate_run(finished)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert list(checkpoints(finished)) == [1, 2, 3]


def test_a_loop_of_ones_own_around_the_trainers_round_trains_as_the_trainer_does(
    finished, run_file, tmp_path, monkeypatch, capsys
):
    script = Path(__file__).parents[3] / "examples" / "own_loop.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(run_file), "--nats", "1e9"])
    runpy.run_path(str(script), run_name="__main__")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["round 1", "round 2", "round 3"]
    for file in ("policy/model.safetensors", "reward_model/r2m.safetensors"):
        ours, theirs = load_file(tmp_path / "out" / file), load_file(finished / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
