"""What a config or a command names: wrong names are errors at once, before torch is loaded and a hub is asked; and
arguments of another kind than a function takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from typer.testing import CliRunner

from r2m import Preference, R2MRewardModel, R2MTrainer, R2MUpdater, fit_reward, load_config
from r2m.cli import app
from r2m.commands.train import dry_run, run
from r2m.config import R2M, R2MConfig, check_names
from r2m.data.tokenization import encode_prompts, usable_pairs
from r2m.fitting.recipe import fit_head
from r2m.names import check_model, load_function
from r2m.policy.loss import policy_loss
from r2m.policy.rollout import collate
from r2m.trainer import lr_factor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder, made the current one, with a policy and causal LM, prompts, pairs, a judge, and a config of them."""
    monkeypatch.chdir(tmp_path)
    tiny.policy(num_hidden_layers=1).save_pretrained("models/policy")
    tiny.tokenizer().save_pretrained("models/policy")
    tiny.save_reward_checkpoint(Path("models/reward"))
    Path("data").mkdir()
    Path("data/prompts.jsonl").write_text('{"prompt": "hello "}\n')
    Path("data/pairs.jsonl").write_text('{"prompt": "a ", "chosen": "b", "rejected": "c"}\n')
    Path("judge.py").write_text("def judge(prompts, responses):\n    return [1.0] * len(responses)\n")
    values = {
        "policy": "models/policy", "reward_model": "models/reward", "prompts": "data/prompts.jsonl",
        "rounds": 1, "prompts_per_round": 1, "num_generations": 2,
        "evaluation": {"prompts": "data/prompts.jsonl", "pairs": "data/pairs.jsonl", "judge": "judge.py:judge"},
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_a_right_config_passes(files):
    check_names(load_config("run.yaml", ["lora.adapter=models/policy"]))


WRONG = {
    "policy=models/polcy": r"policy: models/polcy: no such .*; did you mean models/policy\?; expected the folder",
    "policy=models/none": r"policy: models/none: no such .* \(models is a folder here, so this is taken for a path",
    "policy=./none": r"policy: ./none: no such file or folder; expected the folder",
    "policy=~/none": r"policy: ~/none: no such file or folder",
    "policy=/no/such/folder": r"policy: /no/such/folder: no such file or folder",
    "policy=a/b/c": r"policy: a/b/c: no such file or folder",
    "policy=modls": r"policy: modls: no such .*; did you mean models\?",
    "policy=run.yaml": "policy: run.yaml is a file; expected the folder",
    "reward_model=models/rewrd": "reward_model: models/rewrd: no such",
    "lora.adapter=models/adapter": "lora.adapter: models/adapter: no such",
    "prompts=data/prompt.jsonl": r"prompts: data/prompt.jsonl: no such .*; did you mean data/prompts.jsonl\?",
    "prompts=data/none": r"prompts: data/none: no such .* \(data is a folder here",
    "evaluation.prompts=none.csv": "evaluation.prompts: none.csv: no such",
    "evaluation.pairs=data/pairs.json": r"evaluation.pairs: .*; did you mean data/pairs.jsonl\?",
    "evaluation.judge=judges.py:judge": "evaluation.judge: judge is 'judges.py:judge'; there is no file judges.py",
    "evaluation.judge=no_such.module:judge": "evaluation.judge: .*; no_such.module cannot be imported",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_name_that_is_none_is_an_error_with_key_and_word(files, override):
    with pytest.raises((OSError, ValueError, ImportError), match=WRONG[override]):
        check_names(load_config("run.yaml", [override]))


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "owner/name_v1.0"])
def test_a_hub_id_is_left_to_the_hub(files, name):
    check_model(name)


COMMANDS = {
    "train --config run.yaml r2m.flor=1": "unknown key 'r2m.flor'",
    "train --config run.yaml policy=models/polcy": "policy: models/polcy",
    "train --config run.yaml reward_model=models/policy": "reward_model: models/policy is a LlamaForCausalLM, whose",
    "train --config run.yaml reward_model=models/policy --dry-run": "r2m fit-reward --pairs FILE",
    "train --config run.yml": "config: run.yml is no file and no preset",
    "train --config run.yaml --resume-from runs/none": "--resume-from: runs/none holds no manifest.json",
    "train --config run.yaml output_dir=old": "output_dir old holds a run already",
    "fit-reward --pairs data/pair.jsonl --reward-model models/reward --output out": "--pairs: data/pair.jsonl",
    "fit-reward --pairs data/pairs.jsonl --held-out none.csv --reward-model x/y --output out": "--held-out: none.csv",
    "fit-reward --pairs data/pairs.jsonl --reward-model models/rewrd --output out": "--reward-model: models/rewrd",
    "fit-reward --pairs data/pairs.jsonl --reward-model x/y --policy ./none --output out": "--policy: ./none",
    "fit-reward --pairs data/pairs.jsonl --reward-model x/y --columns promt=a --output out": "--columns: unknown field",
    "evaluate none": "none holds no config.yaml",
    "evaluate old --checkpoint 7": "checkpoint '7' is not in old; there is none",
    "plot none": "none holds no metrics.jsonl",
    "diagnose run.yaml --pairs data/pair.jsonl": "--pairs: data/pair.jsonl",
    "diagnose run.yaml --pairs data/pairs.jsonl reward_model=models/policy": "r2m fit-reward --pairs FILE",
    "diagnose models": "models holds no metrics.jsonl with a round",
    "export none --output out": "none holds no config.yaml",
    "export old --output out --checkpoint best": "checkpoint 'best' is not in old",
    "doctor --config run.yaml rounds=many": "rounds: ",
    "bench --policy models/polcy": "--policy: models/polcy",
}


def test_no_command_loads_torch_to_find_a_mistake(files):
    Path("old").mkdir()
    Path("old/metrics.jsonl").write_text('{"round": 1}\n')
    Path("old/config.yaml").write_text(Path("run.yaml").read_text())
    code = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from r2m.cli import app\n"
        "results = [CliRunner().invoke(app, line.split()) for line in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[result.exit_code, result.stderr] for result in results]))\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'datasets') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, json.dumps(list(COMMANDS))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert printed[1] == "[]"
    for (line, message), (code, stderr) in zip(COMMANDS.items(), json.loads(printed[0]), strict=True):
        assert code == 1, line
        assert stderr.startswith("error: ") and message in stderr, f"{line}: {stderr}"


def test_fit_reward_skips_rows_that_are_no_pair_on_request(files):
    pairs = [{"prompt": "a", "chosen": "b", "rejected": text} for text in ("b", "c")]
    Path("ties.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = ["fit-reward", "--pairs", "ties.jsonl", "--reward-model", "models/reward", "--output", "out"]
    for option, message in (([], "are equal"), (["--skip-invalid"], "ties.jsonl has 1 that can be used")):
        result = CliRunner().invoke(app, [*command, *option])
        assert result.exit_code == 1 and message in result.stderr.splitlines()[-1]


# ---- a head that nothing has fitted ----


@pytest.fixture
def headless(policy, tokenizer, tmp_path):
    """A reward model on a causal LM."""
    policy.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return R2MRewardModel.from_pretrained(tmp_path / "lm", policy=policy, dtype=torch.float32, inner_width=8)


def test_a_run_refuses_a_causal_lm_as_reward_model(files):
    config = load_config("run.yaml", ["reward_model=models/policy"])
    for start in (run, dry_run):
        with pytest.raises(ValueError, match=r"reward_model: models/policy is a LlamaForCausalLM, .* r2m fit-reward"):
            start(config)
    config_file = Path("models/policy/config.json")
    claimed = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | claimed))
    with pytest.raises(ValueError, match=r"reward_model: .*scoring head would be random.* r2m fit-reward"):
        run(config)  # whatever it calls itself, its weights have no head


def test_python_refuses_it_until_it_is_fitted(headless, policy, tokenizer, tmp_path):
    config = R2MConfig(prompts_per_round=1, num_generations=2, rounds=1, output_dir=str(tmp_path / "run"))
    assert headless.head_is_new
    with pytest.raises(
        ValueError, match=r"reward_model: .*lm is no sequence-classification checkpoint, .* r2m fit-rew"
    ):
        R2MTrainer(policy, headless, tokenizer, ["a"], config)
    with pytest.raises(ValueError, match="r2m fit-reward"):
        R2MUpdater(headless, R2M(), total_steps=1, num_generations=2)
    rte = torch.randn(4, 32)
    rte = torch.cat([rte + 1, rte - 1])  # chosen, rejected
    fit_head(headless, rte, rte)
    assert not headless.head_is_new
    R2MUpdater(headless, R2M(), total_steps=1, num_generations=2)


def test_a_fitted_head_is_not_new(reward_checkpoint, policy, tmp_path):
    model = tiny.reward_model(reward_checkpoint, policy)
    assert not model.head_is_new
    model.save_pretrained(tmp_path)
    assert not R2MRewardModel.from_pretrained(tmp_path).head_is_new


# ---- text where a list is expected ----


def test_text_for_a_list_is_a_type_error_that_says_what_makes_one(reward_checkpoint, policy, tokenizer, tmp_path):
    reward_model = tiny.reward_model(reward_checkpoint, policy)
    config = R2MConfig(prompts_per_round=1, num_generations=2, rounds=1, output_dir=str(tmp_path / "run"))

    def trainer(prompts=("a",), **settings):
        return R2MTrainer(policy, reward_model, tokenizer, prompts, config, **settings)

    pair = Preference("a", "b", "c")
    for name, loader, call in (
        ("prompts", "load_prompts", lambda: trainer("prompts.jsonl")),
        ("prompts", "load_prompts", lambda: trainer(Path("prompts.jsonl"))),
        ("eval_prompts", "load_prompts", lambda: trainer(eval_prompts="prompts.jsonl")),
        ("held_out_pairs", "load_pairs", lambda: trainer(held_out_pairs="pairs.jsonl")),
        ("prompts", "load_prompts", lambda: trainer().evaluate("prompts.jsonl")),
        ("prompts", "load_prompts", lambda: encode_prompts(tokenizer, "prompts.jsonl")),
        ("prompts", "load_prompts", lambda: reward_model.embed("prompts.jsonl", ["b"])),
        ("pairs", "load_pairs", lambda: usable_pairs(tokenizer, "pairs.jsonl", 9)),
        ("pairs", "load_pairs", lambda: fit_reward(reward_model, "pairs.jsonl", [pair])),
        ("validation_pairs", "load_pairs", lambda: fit_reward(reward_model, [pair], "pairs.jsonl")),
    ):
        with pytest.raises(TypeError, match=rf"^{name} is the \w+ '.*jsonl'; expected a list, such as r2m.{loader}\('"):
            call()
    with pytest.raises(TypeError, match=r"^completions is the str 'bc'; expected a list$"):
        reward_model.embed(["a", "b"], "bc")
    with pytest.raises(TypeError, match="prompts is a list of messages, which is one prompt"):
        trainer([{"role": "user", "content": "a"}])
    with pytest.raises(TypeError, match=r"judge is 'judge.py:judge'; expected a function: r2m.names.load_function"):
        trainer(eval_prompts=["a"], judge="judge.py:judge")


# ---- names and numbers of functions ----


def test_a_name_that_a_function_does_not_know_is_an_error(reward_checkpoint, policy):
    zeros, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    settings = {"ratio_of": "sequence", "clip_range": 0.2, "beta": 0.1, "estimator": "k3"}
    for name, value in (("ratio_of", "Token"), ("estimator", "k1")):
        with pytest.raises(ValueError, match=f"{name} is '{value}'; expected"):
            policy_loss(zeros, zeros, zeros, torch.zeros(2), mask, **(settings | {name: value}))
    with pytest.raises(ValueError, match="positions is 'prompt'; expected 'all' or 'response'"):
        collate(["a"], ["b"], [[1]], [[2]], pad_id=0, positions="prompt")
    with pytest.raises(ValueError, match="schedule is 'step'; expected 'constant', 'linear', 'cosine'"):
        lr_factor("step", 0, 4, 1)
    with pytest.raises(ValueError, match="rte_token is 'first'; expected 'checkpoint' or 'last'"):
        tiny.reward_model(reward_checkpoint, policy, rte_token="first")


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_fusion_weight_outside_0_and_1_is_an_error(reward_checkpoint, policy, weight):
    model = tiny.reward_model(reward_checkpoint, policy)
    rte, hidden = torch.zeros(1, 24), torch.zeros(1, 2, 32)
    absorbed = model.absorb(rte, 1.0)
    for call in (
        lambda: model.score(rte, hidden, weight=weight),
        lambda: model.absorb(rte, weight),
        lambda: model.reward(absorbed, torch.zeros(1, 32), torch.zeros(1, 32), weight),
    ):
        with pytest.raises(ValueError, match=f"weight is {weight}; expected a value between 0 and 1"):
            call()
    with pytest.raises(ValueError, match=r"floor is .*; expected a value between 0 and 1"):
        tiny.reward_model(reward_checkpoint, policy, floor=weight)


def test_a_config_that_was_changed_key_by_key_is_checked_as_a_whole(reward_checkpoint, policy, tokenizer):
    config = R2MConfig()
    config.minibatches = 7
    with pytest.raises(ValueError, match="minibatches is 7; expected a divisor"):
        R2MTrainer(policy, tiny.reward_model(reward_checkpoint, policy), tokenizer, ["a"], config)


def test_a_judge_of_the_file_that_was_named_is_loaded(files):
    assert load_function("judge", "judge.py:judge")(["a"], ["b"]) == [1.0]


# ---- options of every command ----


def test_the_version_and_short_help():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout.startswith("r2m ")
    for arguments in (["-h"], ["train", "-h"], ["fit-reward", "-h"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0 and "Usage:" in result.stdout


def test_debug_keeps_the_traceback():
    assert isinstance(CliRunner().invoke(app, ["doctor", "rounds=0"]).exception, SystemExit)
    result = CliRunner().invoke(app, ["--debug", "doctor", "rounds=0"])
    assert isinstance(result.exception, ValueError)
    assert isinstance(CliRunner().invoke(app, ["doctor", "rounds=0"]).exception, SystemExit)
