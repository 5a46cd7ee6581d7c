"""The command line: a run from files to files, and mistakes that end in one clear line."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from r2m import R2MRewardModel, R2MTrainer, load_config
from r2m.cli import app
from r2m.devices import resolve_precision
from r2m.presets import preset_path

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run_file(tmp_path, reward_checkpoint):
    """A YAML config of a small run beside its policy and prompts."""
    tiny.policy(num_hidden_layers=1).save_pretrained(tmp_path / "policy")
    tiny.tokenizer().save_pretrained(tmp_path / "policy")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello "}\n{"prompt": [{"role": "user", "content": "hi"}]}\n')
    settings = {
        "policy": str(tmp_path / "policy"),
        "reward_model": str(reward_checkpoint),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "rounds": 3,
        "prompts_per_round": 2,
        "num_generations": 3,
        "generation": {"max_new_tokens": 4},
        "r2m": {"inner_width": 16},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def train(file, *arguments):
    return CliRunner().invoke(app, ["train", "--config", str(file), *arguments])


def test_a_run_writes_policy_reward_model_metrics_plot_and_config(run_file, tmp_path, reward_checkpoint):
    result = train(run_file, "rounds=2", "r2m.floor=0.7", "learning_rate=1e-3", "kl.beta=0.01")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert f"policy, reward model, metrics.jsonl and metrics.png are in {out}" in result.stdout
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2]
    assert (out / "metrics.png").read_bytes().startswith(PNG)
    config = load_config(out / "config.yaml")
    given = load_config(run_file, ["rounds=2", "r2m.floor=0.7", "learning_rate=1e-3", "kl.beta=0.01"])
    assert config == resolve_precision(given)

    policy = AutoModelForCausalLM.from_pretrained(out / "policy")
    start = dict(tiny.policy(num_hidden_layers=1).named_parameters())
    assert all(not torch.equal(p, start[name]) for name, p in policy.named_parameters())
    names = json.loads((out / "reward_model" / "r2m_config.json").read_text())
    assert (names["policy"], names["backbone"]) == (str(tmp_path / "policy"), str(reward_checkpoint))
    reward_model = R2MRewardModel.from_pretrained(out / "reward_model")
    assert (reward_model.config.floor, reward_model.config.inner_width) == (0.7, 16)


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_ctrl_c_names_the_last_checkpoint_and_the_command_that_goes_on(run_file, tmp_path, monkeypatch, caplog):
    sample, out = R2MTrainer.sample, tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(R2MTrainer, "sample", lambda *given: interrupted() if given[1] == 2 else sample(*given))
        assert train(run_file, "checkpoints.every=1", "seed=3").exit_code != 0
    said, _, command = caplog.messages[-1].partition("; to go on from it: ")
    assert said == f"interrupted after 1 of 3 rounds; the last checkpoint is {out}/checkpoint-1"
    assert command == f"r2m train --config {out}/config.yaml --resume"
    result = CliRunner().invoke(app, command.split()[1:])
    assert result.exit_code == 0, result.output
    assert rounds_in(out) == [1, 2, 3]


def test_ctrl_c_before_a_checkpoint_says_that_there_is_none(run_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(R2MTrainer, "sample", interrupted)
    assert train(run_file).exit_code != 0
    line = "interrupted after 0 of 3 rounds; there is no checkpoint; to start again: r2m train --config "
    assert caplog.messages[-1].startswith(line)


def test_sigterm_names_the_checkpoint_that_it_wrote(run_file, tmp_path, monkeypatch, caplog):
    sample = R2MTrainer.sample

    def terminated(trainer, t):
        if t == 2:
            signal.raise_signal(signal.SIGTERM)
        return sample(trainer, t)

    monkeypatch.setattr(R2MTrainer, "sample", terminated)
    assert train(run_file, "checkpoints.every=0").exit_code == 143
    assert caplog.messages[-1].startswith(
        f"stopped by SIGTERM after 1 of 3 rounds; the last checkpoint is {tmp_path}/out/checkpoint-1; to go"
    )


def test_a_run_that_is_interrupted_before_its_first_round_leaves_no_folder(run_file, tmp_path, monkeypatch):
    monkeypatch.setattr("r2m.commands.build.load_models", interrupted)
    assert train(run_file, f"output_dir={tmp_path}/some/where").exit_code != 0
    assert not (tmp_path / "some").exists()
    (tmp_path / "there").mkdir()
    assert train(run_file, f"output_dir={tmp_path}/there").exit_code != 0
    assert (tmp_path / "there").is_dir()


def rounds_in(folder):
    return [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", ["--resume", "--resume-from"])
@pytest.mark.slow
def test_an_adapter_run_can_be_resumed(run_file, tmp_path, how):
    settings = ["rounds=2", "lora.rank=2", "checkpoints.every=1"]
    out = tmp_path / "out"
    assert train(run_file, *settings).exit_code == 0
    trained = load_file(out / "policy" / "adapter_model.safetensors")
    shutil.rmtree(out / "checkpoint-2")
    if how == "--resume":
        result = train(run_file, *settings, "--resume")
    else:
        result = train(
            run_file, *settings, f"output_dir={tmp_path / 'other'}", "--resume-from", str(out / "checkpoint-1")
        )
        out = tmp_path / "other"
    assert result.exit_code == 0, result.output
    again = load_file(out / "policy" / "adapter_model.safetensors")
    assert trained.keys() == again.keys()
    assert all(torch.equal(weight, trained[name]) for name, weight in again.items())
    assert rounds_in(out) == ([1, 2] if how == "--resume" else [2])


def test_resuming_starts_where_there_is_nothing_yet_and_starting_does_not_overwrite(run_file, tmp_path):
    assert train(run_file, "rounds=1", "--resume").exit_code == 0
    assert rounds_in(tmp_path / "out") == [1]
    result = train(run_file, "rounds=1")
    assert result.exit_code == 1
    assert "holds a run already; resume it (--resume), or choose another folder" in result.stderr


def test_resuming_from_two_places_is_an_error(run_file, tmp_path):
    result = train(run_file, "--resume", "--resume-from", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == "error: --resume and --resume-from are both given; expected one of them\n"


def test_a_preset_is_a_config_whose_keys_can_be_overridden(run_file, tmp_path):
    with open(run_file) as file:
        small = yaml.safe_load(file)
    keys = ["policy", "reward_model", "prompts", "output_dir", "prompts_per_round", "num_generations"]
    overrides = [f"{key}={small[key]}" for key in keys] + ["generation.max_new_tokens=2", "r2m.inner_width=8"]
    result = train("smollm2-demo", *overrides, "rounds=1", 'evaluation.pairs=""', 'evaluation.prompts=""')
    assert result.exit_code == 0, result.output
    written = load_config(tmp_path / "out" / "config.yaml")
    assert written.generation.temperature == load_config(preset_path("smollm2-demo")).generation.temperature
    assert (written.policy, written.rounds) == (small["policy"], 1)


def test_a_name_that_is_no_file_and_no_preset_lists_the_presets():
    result = train("smolm2-demo")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: config: smolm2-demo is no file and no preset; presets: paper-dialogue")
    assert len(result.stderr.splitlines()) == 1


def test_a_dry_run_prints_the_config_and_leaves_nothing(run_file, tmp_path):
    result = train(run_file, "rounds=50", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "rounds: 50\n" in result.stdout
    assert "one round of 2 prompts x 3 responses:\n" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_finished_run_can_be_measured_and_drawn_anew(run_file, tmp_path):
    assert train(run_file, "rounds=2").exit_code == 0
    out = tmp_path / "out"
    picture = (out / "metrics.png").read_bytes()
    (out / "metrics.png").unlink()
    result = CliRunner().invoke(app, ["plot", str(out)])
    assert (result.exit_code, result.stdout) == (0, f"{out / 'metrics.png'}\n")
    assert (out / "metrics.png").read_bytes() == picture

    def evaluate(*arguments):
        return CliRunner().invoke(app, ["evaluate", str(out), *arguments])

    result = evaluate("--prompts", str(tmp_path / "prompts.jsonl"))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("checkpoint-2 (round 2 of 2) on 2 held-out prompts\n")
    assert "judge" not in result.stdout
    for arguments, message in (
        ([], "error: evaluation.prompts is not set in the run's config; expected --prompts FILE"),
        (["--prompts", str(tmp_path / "prompts.jsonl"), "--checkpoint", "1"], "error: checkpoint '1' is not in "),
    ):
        result = evaluate(*arguments)
        assert result.exit_code == 1
        (line,) = [line for line in result.stderr.splitlines() if "error" in line]
        assert line.startswith(message)


@pytest.mark.parametrize("command", ["plot", "evaluate"])
def test_a_folder_that_holds_no_run_is_an_error(tmp_path, command):
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert str(tmp_path) in result.stderr
    assert list(tmp_path.iterdir()) == []


def mistakes(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    return {
        "unknown key": (["r2m.flor=0.5"], "unknown key 'r2m.flor'; did you mean 'r2m.floor'?"),
        "a key that moved": (["save_every=1"], "unknown key 'save_every'; "),
        "a value out of range": (["num_generations=1"], "num_generations is 1"),
        "a value of another type": (["rounds=many"], "rounds: "),
        "missing prompt file": ([f"prompts={tmp_path / 'none.txt'}"], "none.txt"),
        "empty prompt file": ([f"prompts={tmp_path / 'empty.txt'}"], "empty.txt: no prompts, the file is empty"),
        "a prompt file without prompts": (
            [f"prompts={tmp_path / 'broken.jsonl'}"],
            'broken.jsonl, line 2: the field "prompt" is missing',
        ),
        "a judge that is not there": (
            [f"evaluation.prompts={tmp_path / 'prompts.jsonl'}", "evaluation.judge=no_such:judge"],
            "evaluation.judge: judge is 'no_such:judge'; no_such cannot be imported",
        ),
        "no device": (["placement.device=gpu"], "placement.device is 'gpu', which cannot be used: "),
        "no prompt file": (["prompts="], "prompts"),
        "no policy": (["policy="], "policy"),
        "no reward model": (["reward_model="], "reward_model"),
    }


NAMES = [
    "unknown key", "a key that moved", "a value out of range", "a value of another type", "missing prompt file",
    "empty prompt file", "a prompt file without prompts", "a judge that is not there", "no device", "no prompt file",
    "no policy", "no reward model",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_line_and_exit_status_1(run_file, tmp_path, name):
    overrides, message = mistakes(tmp_path)[name]
    result = train(run_file, *overrides)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "out").exists()


def test_a_config_file_that_is_not_there_or_no_yaml_is_an_error(run_file, tmp_path):
    (tmp_path / "broken.yaml").write_text("rounds: [1, 2\npolicy: {")
    for name in ("none.yaml", "broken.yaml"):
        result = train(tmp_path / name)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        assert result.stderr.startswith("error: ")
        assert name in result.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generation.max_prompt_tokens=3"], "prompts: none of 2 has between 1 and 3 tokens"),
        (["kl.beta=.nan"], "phase policy, round 1, epoch 1"),
    ],
)
def test_what_goes_wrong_later_is_a_clear_error_too(run_file, overrides, message):
    result = train(run_file, *overrides)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"error: {message}" in result.stderr
    assert "Traceback" not in result.output


def test_a_reward_model_made_for_another_policy_is_an_error(run_file, tmp_path, reward_checkpoint):
    tiny.reward_model(reward_checkpoint, tiny.policy(48)).save_pretrained(tmp_path / "other")
    result = train(run_file, f"reward_model={tmp_path / 'other'}")
    assert result.exit_code == 1
    assert "error: reward_model attends to hidden states of width 48" in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["demo", "--help"]])
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import sys\n"
        "from r2m.cli import app\n"
        "try:\n"
        f"    app({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "print('imported:', [name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage:" in result.stdout
    assert "imported: []" in result.stdout


def test_a_key_that_has_to_be_set_is_named(run_file):
    result = train(run_file, 'reward_model=""')
    assert result.exit_code == 1
    assert result.stderr.startswith("error: reward_model is not set; expected it in ")
