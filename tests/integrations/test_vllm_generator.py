"""Runs on vLLM, without a GPU: one engine in this process for each kind of policy, in real runs of the trainer."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.append(str(Path(__file__).parents[1] / "r2m"))  # for tiny

import tiny
from small_run import write_config

from r2m import R2MTrainer
from r2m.config import Lora, config_from_dict
from r2m.policy.generate import GeneratorFailed, Sampling
from r2m.policy.load import add_adapter
from r2m.runs.folder import checkpoints, read_metrics

WIDTH = 64  # vLLM's CPU attention takes heads of 32 numbers or more
PROMPTS = ["hello ", "what is it? ", "a b", "xyz"]


def small_policy(kind="llama", width=WIDTH):
    torch.manual_seed(7)
    if kind == "gpt2":  # transposed weights, biases, a table of positions
        sizes = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 256}
        settings = GPT2Config(vocab_size=264, **sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=1)
        return GPT2LMHeadModel(settings).eval()
    policy = tiny.policy(width, num_hidden_layers=1, tie_word_embeddings=kind == "tied")
    return add_adapter(policy, Lora(rank=2)) if kind == "adapter" else policy


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny.save_reward_checkpoint(tmp_path_factory.mktemp("reward"))


def without_costs(rows):
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "memory"))} for row in rows]


@pytest.fixture
def make(checkpoint, tmp_path):
    def build(kind="llama", width=WIDTH, generation_engine="vllm", **settings):
        values = {
            "rounds": 2, "prompts_per_round": 2, "num_generations": 4, "micro_batch_size": 4, "precision": "float32",
            "learning_rate": 1e-2, "output_dir": "run", "checkpoints": {"every": 1},
            "generation": {"engine": generation_engine, "max_new_tokens": 12, "max_prompt_tokens": 40},
        }  # fmt: skip
        for key, value in settings.items():
            values[key] = values[key] | value if isinstance(values.get(key), dict) else value
        values["output_dir"] = str(tmp_path / values["output_dir"])
        policy = small_policy(kind, width)
        reward_model = tiny.reward_model(checkpoint, policy)
        return R2MTrainer(policy, reward_model, tiny.tokenizer(), PROMPTS, config_from_dict(values))

    return build


# ---- the policy that samples is the policy that is trained ----


def difference(trainer, rollout, log_probs):
    """The greatest, in nats, between log-probabilities as vLLM sampled and `log_probs`."""
    return ((rollout.sampled_log_probs - log_probs) * rollout.completion_mask).abs().max().item()


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "adapter"])
def test_each_round_samples_from_the_policy_as_it_is(make, kind):
    trainer, start = make(kind), small_policy(kind)
    for t in (1, 2):
        row, rollout, batch = trainer.round(t)
        assert difference(trainer, rollout, batch.log_probs) < 5e-5
        assert row["generation/importance_ratio"] == pytest.approx(1, abs=5e-5)
        assert row["generation/truncated_share"] == 0
    trainer.policy, trainer.learner.policy = start, start
    part = rollout.part(list(range(len(rollout.prompts))))
    before = trainer.learner.log_probs(trainer.learner.logits(part), part)
    assert difference(trainer, rollout, before) > 0.05  # the weights of round 2 are not those of the start


def test_greedy_responses_are_transformers_own(make):
    settings = {"algorithm": "remax", "generation": {"temperature": 0.3}}
    own, theirs = make(**settings).sample(1), make(**settings, generation_engine="transformers").sample(1)
    assert torch.equal(own.greedy.input_ids, theirs.greedy.input_ids)
    assert own.greedy.sampled_log_probs is None


def launch(config, *options):
    """`r2m train` in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "r2m.cli", "train"]
    return subprocess.run(
        [*command, "--config", str(config), *options],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


JUDGE = """
import os, pathlib, signal
killed, calls = pathlib.Path(__file__).with_name("killed"), []
def judge(prompts, responses):
    calls.append(1)
    if len(calls) == 2 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(prompts)
"""


def test_two_processes_of_which_one_is_killed_go_on(checkpoint, tmp_path):
    """Each has an engine of its own, and a part of the policy; the first is killed after round 2, before that round's
    checkpoint."""
    config = write_config(tmp_path, checkpoint, width=WIDTH)
    (tmp_path / "judge.py").write_text(JUDGE)
    values = ["rounds=3", "generation.engine=vllm", "placement.shard_policy=true"]
    values.append(f"evaluation.judge={tmp_path}/judge.py:judge")
    killed = launch(config, *values)
    assert killed.returncode != 0 and (tmp_path / "killed").exists(), killed.stderr[-2000:]
    assert list(checkpoints(tmp_path / "out")) == [1]
    resumed = launch(config, *values, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    rows = read_metrics(tmp_path / "out")
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert all(row["generation/importance_ratio"] == pytest.approx(1, abs=5e-5) for row in rows)


# ---- how a response ends ----


def ask(generator, count=8, **settings):
    values = {"temperature": 0.7, "max_new_tokens": 12, "eos_ids": [1], "stop_strings": [], "seed": 0} | settings
    return generator.generate([[60, 61, 62], [70]], count, Sampling(**values))


@pytest.fixture
def generator(make):
    generator = make(generation={"stop_strings": ["q"]}).learner.generator
    generator.update(small_policy())
    return generator


def test_each_end_token_ends_a_response_and_the_checkpoints_own_does_not(generator):
    ends = list(range(2, 60))
    rows, log_probs = ask(generator, eos_ids=ends)
    assert len({len(row) for row in rows}) > 1
    assert list(map(len, log_probs)) == list(map(len, rows))
    for row in rows:
        assert not set(row[:-1]) & set(ends) and (row[-1] in ends or len(row) == 12)
    own, _ = ask(generator, count=64, eos_ids=[], temperature=2.0)
    assert {len(row) for row in own} == {12} and any(1 in row[:-1] for row in own)


def test_the_token_that_completes_a_stop_string_is_a_responses_last(generator):
    tokenizer, stops = tiny.tokenizer(), list("abcdefghij")
    rows, log_probs = ask(generator, stop_strings=stops)
    texts = list(map(tokenizer.decode, rows))
    assert any(len(row) < 12 for row in rows) and list(map(len, log_probs)) == list(map(len, rows))
    for row, text in zip(rows, texts, strict=True):
        assert not any(stop in text[:-1] for stop in stops) and (text[-1] in stops or row[-1] == 1 or len(row) == 12)


def test_the_seed_alone_decides_what_is_drawn(generator):
    torch.manual_seed(3)
    first, state = ask(generator, seed=1), torch.get_rng_state()
    torch.manual_seed(4)
    assert ask(generator, seed=1) == first
    assert ask(generator, seed=2) != first
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)  # the trainer's own are untouched
    rows, _ = first
    assert len({tuple(row) for row in rows}) == 16


# ---- what goes wrong ----


def test_an_engine_that_fails_ends_the_run_which_goes_on(make, monkeypatch):
    whole = without_costs(make(output_dir="whole").train())
    failing = make()
    engine, calls = failing.learner.generator.engine, []

    def generate(*args, **options):
        calls.append(1)
        if len(calls) == 3:  # the check before the run, round 1, round 2
            raise RuntimeError("out of blocks")
        return type(engine).generate(engine, *args, **options)

    monkeypatch.setattr(engine, "generate", generate)
    with pytest.raises(GeneratorFailed, match=r"round 2: generator VLLM: RuntimeError: out of blocks; .*checkpoint-1"):
        failing.train()
    assert without_costs(make().train("last")) == whole


def test_a_model_that_vllm_cannot_run_is_named_with_its_reason(make):
    trainer = make(width=32)
    with pytest.raises(GeneratorFailed, match=r"generator VLLM: RuntimeError: Unsupported CPU attention .*head_dim=16"):
        trainer.train()


def test_too_little_memory_is_named_with_what_it_takes(make, monkeypatch):
    monkeypatch.setattr("r2m.integrations.vllm.cache_bytes", lambda *_: 2**50)
    message = r"did not start: .*Available memory.* 1048576\.00 GiB for keys and values of 8 sequences; a lower gener"
    with pytest.raises(GeneratorFailed, match=message):
        make()
