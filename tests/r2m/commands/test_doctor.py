"""What the doctor says of this machine, and of a config on it."""

import re
from importlib import metadata

import pytest
import tiny
import torch
import yaml
from typer.testing import CliRunner

from r2m.cli import app
from r2m.commands import doctor
from r2m.config import config_from_dict
from r2m_kernels import __version__, available_implementations


@pytest.fixture
def settings(tmp_path):
    """Config files alone: no weights, no tokenizer, no prompts."""
    tiny.llama_config(32, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    generation = {"max_prompt_tokens": 8, "max_new_tokens": 8}
    small = {"prompts_per_round": 2, "num_generations": 2, "micro_batch_size": 2, "generation": generation}
    classifier = tiny.llama_config(32, architectures=["LlamaForSequenceClassification"], num_labels=1)
    classifier.save_pretrained(tmp_path / "reward_model")
    return {"policy": str(tmp_path / "model"), "reward_model": str(tmp_path / "reward_model"), **small}


def ask(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_versions_devices_operators_and_compilers_are_listed():
    text = doctor.report()
    assert f"r2m-kernels {__version__}\n" in text
    assert f"torch {torch.__version__}" in text and f"transformers {metadata.version('transformers')}" in text
    assert re.search(r"cpu: \d+ cores, \d+\.\d GiB memory, \d+\.\d GiB free, (no )?native bfloat16 products", text)
    why_not = available_implementations()
    for name, reason in why_not.items():
        assert f"{name}: {reason or 'can run'}" in text
    assert f'impl="auto" takes {"torch" if why_not["extension"] else "extension"}' in text
    assert "C++: " in text and "ninja: " in text
    assert "memory\n" not in text


def test_an_optional_package_that_is_missing_says_so(monkeypatch):
    monkeypatch.setattr(doctor, "_OPTIONAL", ("a_package_nobody_has",))
    assert "a_package_nobody_has not installed (optional)" in doctor.report()


def test_a_run_that_fits_gets_parts_phases_and_the_verdict(settings):
    text = doctor.report(config_from_dict(settings))
    for name in ("policy weights", "generation cache", "logits", "rollout", "annotate", "policy", "reward_model"):
        assert re.search(rf"^ +\d+\.\d\d  {name}$", text, re.MULTILINE), name
    assert "cpu: fits, " in text and "keys that lower it" not in text


def test_a_run_that_does_not_fit_gets_the_keys_that_help_and_no_others(settings, monkeypatch):
    monkeypatch.setattr(doctor, "free_memory", lambda device: 1e3)
    text = doctor.report(config_from_dict(settings | {"gradient_checkpointing": True}))
    assert "cpu: does not fit, " in text
    hints = text.partition("keys that lower it:")[2]
    assert "generation.batch_size, now 4" in hints and "micro_batch_size, now 2" in hints and "lora, " in hints
    assert "gradient_checkpointing" not in hints  # it is on
    budget = doctor.report(config_from_dict(settings | {"micro_batch_size": None, "micro_batch_tokens": 999}))
    assert "micro_batch_tokens, now 999: " in budget and "micro_batch_size" not in budget
    assert "placement" not in hints  # all is in host memory
    text = doctor.report(config_from_dict(settings | {"placement": {"device": "cuda"}, "micro_batch_size": 1}))
    hints = text.partition("keys that lower it:")[2]
    assert "gradient_checkpointing=true" in hints and "micro_batch_size" not in hints
    assert "placement.offload_reference=true" in hints and "placement.offload_reward_model" in hints


def test_a_device_of_another_machine_gets_no_verdict(settings):
    placement = {"device": "cuda", "reward_model": "cpu"}
    text = doctor.report(config_from_dict(settings | {"placement": placement}))
    assert re.search(r"cuda: \d+\.\d\d GiB at the peak; this machine has no such device", text)
    assert "cpu, the reward model's: fits" in text


def test_a_kind_of_gpu_gets_its_own_verdict_and_the_seconds_of_a_round(settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    text = ask("--config", str(tmp_path / "run.yaml"), "--gpu", "h100", "--processes", "2").stdout
    assert "h100, of each of 2 processes: fits, " in text and re.search(r"of 79.65 GiB$", text, re.MULTILINE)
    title, _, seconds = text.partition("seconds of a round on 2 x h100")
    assert re.search(r"^ +\S+  gradients, averaged$", title, re.MULTILINE)
    for name in ("rollout", "annotate", "policy", "reward_model", "round", "of it R2M's own"):
        assert re.search(rf"^ +\S+  {name}", seconds, re.MULTILINE), name


def test_several_processes_share_host_memory_and_are_told_of_shards(settings, monkeypatch):
    peak = max(doctor.estimate_memory(config_from_dict(settings), 2).phases.values())
    monkeypatch.setattr(doctor, "free_memory", lambda device: 1.5 * peak)
    text = doctor.report(config_from_dict(settings), number=2)
    assert "cpu, of each of 2 processes: does not fit" in text
    assert re.search(r"placement.shard_policy=true spreads \d+\.\d\d GiB over the 2 processes", text)


def test_a_gpu_that_is_not_known_and_one_without_a_run_are_refused(settings):
    with pytest.raises(ValueError, match="--gpu is 'b300'; expected one of a100, h100, h200"):
        doctor.report(config_from_dict(settings), gpu="b300")
    assert "error: --gpu and --processes are about a run; expected --config" in ask("--gpu", "h100").stderr


def test_a_model_that_cannot_be_estimated_says_so_below_the_rest(settings, monkeypatch):
    def fail(config, number):
        raise RuntimeError("no meta tensors here")

    monkeypatch.setattr(doctor, "estimate_memory", fail)
    text = doctor.report(config_from_dict(settings))
    assert "versions" in text and text.endswith("cannot be made without their weights: no meta tensors here")


def test_the_command_takes_a_file_and_overrides(settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = ask("--config", str(tmp_path / "run.yaml"), "generation.batch_size=2", "placement.device=cuda")
    assert result.exit_code == 0, result.output
    assert "parts on cuda" in result.stdout
    assert "operators" in ask().stdout and "parts on" not in ask().stdout


def test_a_mistake_in_the_config_ends_in_one_line(settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | {"reward_model": ""}))
    result = ask("--config", str(tmp_path / "run.yaml"))
    assert result.exit_code == 1 and "error: reward_model is not set" in result.stderr
