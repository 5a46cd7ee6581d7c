"""The command line: a run from files to files, and mistakes that end in one clear line."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from r2m import R2MRewardModel, load_config
from r2m.cli import app

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
    assert config == load_config(run_file, ["rounds=2", "r2m.floor=0.7", "learning_rate=1e-3", "kl.beta=0.01"])

    policy = AutoModelForCausalLM.from_pretrained(out / "policy")
    start = dict(tiny.policy(num_hidden_layers=1).named_parameters())
    assert all(not torch.equal(p, start[name]) for name, p in policy.named_parameters())
    names = json.loads((out / "reward_model" / "r2m_config.json").read_text())
    assert (names["policy"], names["backbone"]) == (str(tmp_path / "policy"), str(reward_checkpoint))
    reward_model = R2MRewardModel.from_pretrained(out / "reward_model")
    assert (reward_model.config.floor, reward_model.config.inner_width) == (0.7, 16)


def test_an_adapter_run_can_be_resumed(run_file, tmp_path):
    settings = ["rounds=2", "lora.rank=2", "save_every=1"]
    assert train(run_file, *settings, f"output_dir={tmp_path / 'straight'}").exit_code == 0
    checkpoint = tmp_path / "straight" / "checkpoint-1"
    result = train(run_file, *settings, f"output_dir={tmp_path / 'resumed'}", "--resume-from", str(checkpoint))
    assert result.exit_code == 0, result.output
    straight, resumed = (
        dict(
            PeftModel.from_pretrained(
                tiny.policy(num_hidden_layers=1), tmp_path / name / "policy"
            ).named_parameters()
        )
        for name in ("straight", "resumed")
    )  # fmt: skip
    assert all(torch.equal(p, straight[name]) for name, p in resumed.items())
    (row,) = map(json.loads, (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines())
    assert row["round"] == 2


def mistakes(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    return {
        "unknown key": (["r2m.flor=0.5"], "unknown key 'r2m.flor'; did you mean 'r2m.floor'?"),
        "a value out of range": (["num_generations=1"], "num_generations is 1"),
        "a value of another type": (["rounds=many"], "rounds: "),
        "missing prompt file": ([f"prompts={tmp_path / 'none.txt'}"], "none.txt"),
        "empty prompt file": ([f"prompts={tmp_path / 'empty.txt'}"], "empty.txt: no prompts, the file is empty"),
        "a prompt file without prompts": (
            [f"prompts={tmp_path / 'broken.jsonl'}"],
            'broken.jsonl, line 2: the field "prompt" is missing',
        ),
        "no prompt file": (["prompts="], "prompts"),
        "no policy": (["policy="], "policy"),
        "no reward model": (["reward_model="], "reward_model"),
    }


NAMES = [
    "unknown key", "a value out of range", "a value of another type", "missing prompt file", "empty prompt file",
    "a prompt file without prompts", "no prompt file", "no policy", "no reward model",
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
