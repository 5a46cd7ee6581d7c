"""The presets: they load, they hold the paper's numbers, and they come with the package."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import tiny
import torch
from architectures import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from r2m.cli import app
from r2m.config import load_config
from r2m.presets import list_presets, preset_path, resolve_config_source

NAMES = ["paper-dialogue-llama3-8b", "paper-dialogue-qwen2.5-3b", "paper-tldr-pythia-2.8b", "smollm2-demo"]
PAPER = {
    # rounds, n, K, new tokens, lr, Omega, RM lr, policy, reward model
    "paper-dialogue-llama3-8b": (
        100, 64, 8, 512, 1e-6, 0.6, 1e-6,
        "meta-llama/Meta-Llama-3-8B-Instruct", "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
    ),
    "paper-dialogue-qwen2.5-3b": (
        100, 64, 8, 512, 6e-6, 0.7, 1e-6,
        "Qwen/Qwen2.5-3B-Instruct", "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
    ),
    "paper-tldr-pythia-2.8b": (
        122, 2048, 4, 50, 3e-6, 0.6, 5e-7,
        "cleanrl/EleutherAI_pythia-2.8b-deduped__sft__tldr", "cleanrl/EleutherAI_pythia-2.8b-deduped__reward__tldr",
    ),
}  # fmt: skip
TRAJECTORIES = {
    "paper-dialogue-llama3-8b": 51_200,
    "paper-dialogue-qwen2.5-3b": 51_200,
    "paper-tldr-pythia-2.8b": 1_000_000,
}


def test_every_preset_is_listed_with_its_description():
    presets = list_presets()
    assert [preset.name for preset in presets] == NAMES
    for preset in presets:
        assert all(preset)
        assert ("Not run at its size" in preset.status) == preset.name.startswith("paper-")
        assert ("estimate" in preset.hardware) == preset.name.startswith("paper-")


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_loads_and_writes_to_a_folder_of_its_own(name):
    config = load_config(preset_path(name))
    assert config.policy
    assert config.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name):
    config = load_config(preset_path(name))
    assert PAPER[name] == (
        config.rounds, config.prompts_per_round, config.num_generations, config.generation.max_new_tokens,
        config.learning_rate, config.r2m.floor, config.r2m.learning_rate, config.policy, config.reward_model,
    )  # fmt: skip
    round_ = config.prompts_per_round * config.num_generations
    assert config.rounds == round(TRAJECTORIES[name] / round_)
    assert (config.algorithm, config.epochs, config.generation.temperature) == ("rloo", 2, 0.7)
    assert (config.r2m.alpha, config.r2m.inner_width, config.r2m.feedback) == (0.3, 2048, "trained")
    assert (config.r2m.eps, config.clip_range, config.kl.beta) == (1e-2, 0.2, 0.05)
    assert config.lora is None


@pytest.mark.parametrize("name", PAPER)
def test_every_number_of_a_paper_preset_says_whose_it_is(name):
    lines = preset_path(name).read_text().splitlines()
    keys = [line for line in lines if line and not line.startswith("#") and not line.endswith(":")]
    unmarked = [line.strip() for line in keys if "# paper" not in line and "# decision" not in line]
    assert unmarked == [f"output_dir: runs/{name}", "keep: 1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_setups_run_on_tiny_models_of_their_architectures(name, tmp_path):
    types = {"pythia": "gpt_neox", "llama": "llama", "qwen": "qwen2"}
    places = {}
    for key, model in zip(("policy", "reward_model"), PAPER[name][-2:], strict=True):
        config = tiny_config(next(kind for word, kind in types.items() if word in model.lower()))
        config.max_position_embeddings = 1024
        config.num_labels = 1
        places[key] = tmp_path / key
        torch.manual_seed(0)
        auto = AutoModelForCausalLM if key == "policy" else AutoModelForSequenceClassification
        auto.from_config(config).save_pretrained(places[key])
        tiny.tokenizer(pad="</s>").save_pretrained(places[key])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "who "}\n{"prompt": "what is it? "}\n')
    smaller = ["rounds=1", "prompts_per_round=2", "generation.max_new_tokens=8", "generation.batch_size=3"]
    files = [f"{key}={place}" for key, place in places.items()]
    files += [f"prompts={tmp_path / 'prompts.jsonl'}", f"output_dir={tmp_path / 'run'}"]
    result = CliRunner().invoke(app, ["train", "--config", name, *files, *smaller])
    assert result.exit_code == 0, result.output
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["weight"] == PAPER[name][5]  # Omega, in the last round
    assert row["grebt/loss"] > 0 and row["policy/grad_norm"] > 0


def test_a_config_is_a_file_or_a_presets_name(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("rounds: 7\n")
    assert load_config(resolve_config_source(tmp_path / "mine.yaml")).rounds == 7
    assert load_config(resolve_config_source("paper-tldr-pythia-2.8b"), ["rounds=3"]).rounds == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-demo").write_text("rounds: 8\n")
    assert load_config(resolve_config_source("smollm2-demo")).rounds == 8


@pytest.mark.parametrize("name", ["paper-dialogue", "none.yaml", "../config"])
def test_an_unknown_name_lists_the_presets(name):
    with pytest.raises(FileNotFoundError) as error:
        resolve_config_source(name)
    assert str(error.value) == f"config: {name} is no file and no preset; presets: {', '.join(NAMES)}"
    with pytest.raises(ValueError, match="expected one of paper-dialogue-llama3-8b, "):
        preset_path(name)


def test_the_command_prints_name_summary_hardware_and_status():
    result = CliRunner().invoke(app, ["presets"])
    assert result.exit_code == 0, result.output
    for preset in list_presets():
        for text in preset:
            assert text in result.stdout


def test_the_package_has_the_files():
    found = {file.name for file in files("r2m.presets").iterdir() if file.name.endswith(".yaml")}
    assert found == {f"{name}.yaml" for name in NAMES}


def test_a_build_of_the_package_has_the_files(tmp_path):
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "-e",
        str(tmp_path),
        "build",
        "-b",
        str(tmp_path / "build"),
    ]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (folder,) = tmp_path.glob("build/lib*/r2m/presets")
    assert {file.name for file in folder.iterdir()} == {"__init__.py", *(f"{name}.yaml" for name in NAMES)}
