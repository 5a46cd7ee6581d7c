"""Training in several processes (gloo, on the CPU) beside training in one."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_run import write_config
from train_in_processes import train
from transformers import AutoModelForCausalLM

from r2m import processes
from r2m.config import config_from_dict

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_in_processes.py")
SHARDED = {"placement": {"shard_policy": True}}
# Room for the greatest group, 4 x 20 tokens, and little for padding: micro-batches take several passes.
BUDGET = {"micro_batch_size": None, "micro_batch_tokens": 80, "generation": {"max_prompt_tokens": 15}}
LABELS = {"labeller": "train_in_processes:verifier", "per_round": 3}
# With rounds scored by a pass of their own, and, where groups of four fit, by the first epoch's.
CASES = {
    "copies": {},
    "minibatches": {"minibatches": 2, "micro_batch_size": 3},
    "grpo": {"algorithm": "grpo", "r2m": {"standardize": True, "pair_source": "recomputed"}},
    "reinforce++": {"algorithm": "reinforce++", "kl": {"placement": "reward"}},
    "head": {"r2m": {"feedback": "head"}},
    "reference": {"r2m": {"standardize": True, "source": "reference"}},
    "anchored": {"r2m": {"standardize": True, "scale_anchor": True}},
    "labels": {"r2m": {"standardize": True}, "preferences": LABELS},
    "late labels": {"r2m": {"standardize": True}, "preferences": LABELS | {"labeller": "queue", "wait": 0}},
    "labels, head": {"r2m": {"feedback": "head"}, "preferences": LABELS},
    "adapter": {"adapter": True},
    "sharded": SHARDED,
    "budget": BUDGET,
    "budget, checkpointing": BUDGET | {"gradient_checkpointing": True},
    "budget, sharded": BUDGET | SHARDED,
    "budget, sharded, scored apart": BUDGET | SHARDED | {"micro_batch_tokens": 30},
}
TIMEOUT = 240  # seconds; a run takes a few


def start(folder, checkpoint, cases, world=2):
    """Start `world` processes of training runs; returns them."""
    return launch([str(SCRIPT), str(folder), str(checkpoint), json.dumps(cases)], world)


def launch(arguments, world=2):
    """Start `world` processes of Python as torchrun does; returns them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
    command = [sys.executable, *arguments]
    environments = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    return [
        subprocess.Popen(
            command,
            env=os.environ | {name: str(value) for name, value in environment.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]


def finish(started, timeout=TIMEOUT):
    """(exit status, output) of each."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def run(folder, checkpoint, cases, world=2):
    for status, output in finish(start(folder, checkpoint, cases, world)):
        assert status == 0, output
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(world)] for name in cases}


@pytest.fixture(scope="module")
def in_two(tmp_path_factory, reward_checkpoint):
    folder = tmp_path_factory.mktemp("two")
    return folder, run(folder, reward_checkpoint, CASES | {"sampled": {"sampled": True, "sgd": False}})


def measured(history):
    costs = ("seconds/", "memory/", "tokens/computed")
    return [{name: value for name, value in row.items() if not name.startswith(costs)} for row in history]


def assert_same_run(result, expected, tolerance):
    for row, other in zip(measured(result["history"]), measured(expected["history"]), strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)
    for part in ("policy", "reward_model"):
        assert result[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(result[part][name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(in_two, reward_checkpoint, tmp_path, case):
    options = {name: value for name, value in CASES[case].items() if name != "placement"}
    expected = train(tmp_path / "one", reward_checkpoint, **options)
    before = train(tmp_path / "none", reward_checkpoint, rounds=1, learning_rate=0, **options)["policy"]
    first, second = in_two[1][case]
    assert_same_run(first, expected, 1e-5)
    assert_same_run(second, expected, 1e-5)
    moved = max((value - before[name]).abs().max() for name, value in expected["policy"].items())
    assert moved > 1e-3  # a hundred times what is tolerated


def test_what_the_processes_say_and_hold_is_the_same(in_two):
    for first, second in in_two[1].values():
        assert measured(first["history"]) == measured(second["history"])
        for part in ("policy", "reward_model"):
            for name, value in first[part].items():
                assert torch.equal(value, second[part][name])


def test_processes_run_equally_many_passes_whatever_their_lengths(in_two):
    for case in (case for case in CASES if case.startswith("budget")):
        first, second = (result["passes"] for result in in_two[1][case])
        assert first["number"] == second["number"]
        assert first["lengths"] != second["lengths"]
        assert (max(first["number"][0]) > 1) == ("apart" not in case)


def test_one_process_writes(in_two):
    folder, results = in_two
    for case, (first, _) in results.items():
        written = [json.loads(line) for line in (folder / case / "metrics.jsonl").read_text().splitlines()]
        assert written == first["history"]
        assert (folder / case / "checkpoint-2" / "manifest.json").is_file()


def test_a_sharded_policy_is_saved_whole(in_two):
    folder, results = in_two
    loaded = AutoModelForCausalLM.from_pretrained(folder / "sharded" / "policy").state_dict()
    expected = results["sharded"][0]["policy"]
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    saved = load_file(folder / "sharded" / "checkpoint-2" / "policy.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())


# A buffer that is computed in the default dtype (gemma2) or in bfloat16 (recurrent_gemma), a block inside a block
# (mamba), a block with a tied weight (bert), experts that transformers merges (qwen2_moe).
LOADED = ["llama", "gemma2", "recurrent_gemma", "mamba", "bert", "qwen2_moe"]


def test_a_sharded_policy_and_its_reference_have_the_bits_of_the_whole(tmp_path):
    folders = []
    for name in LOADED:
        model = architectures.tiny_model(architectures.tiny_config(name))
        for dtype in (torch.float32, torch.bfloat16):
            folders.append(str(tmp_path / f"{name}-{dtype}"))
            model.to(dtype).save_pretrained(folders[-1], max_shard_size=20_000)  # bytes: several files
    ended = finish(launch([str(SCRIPT.with_name("load_in_processes.py")), json.dumps(folders)]), 3 * TIMEOUT)
    for status, output in ended:
        assert status == 0, output
        assert not [line for line in output.splitlines() if line.startswith(str(tmp_path))], output
    assert "read whole into the memory of each process" in ended[0][1]  # of merged experts


def test_any_number_of_processes_resumes(reward_checkpoint, tmp_path):
    """With the same responses they make the same run: weights, and what the optimizer has gathered."""
    options = {"rounds": 3, "sgd": False, **SHARDED}
    whole = run(tmp_path, reward_checkpoint, {"run": options})["run"][0]
    moments = load_file(tmp_path / "run" / "checkpoint-3" / "optimizer.safetensors")
    for world in (1, 4):
        again = {"run": options | {"resume": str(tmp_path / "run" / "checkpoint-2")}}
        for result in run(tmp_path, reward_checkpoint, again, world)["run"]:
            assert_same_run(result, whole, 1e-3)
        resumed = load_file(tmp_path / "run" / "checkpoint-3" / "optimizer.safetensors")
        assert resumed.keys() == moments.keys()
        for name, value in moments.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-2, atol=1e-2 * value.abs().max().item())


def test_each_process_draws_its_own_samples(in_two):
    first, second = in_two[1]["sampled"]
    assert len(first["texts"]) == len(second["texts"]) == 8
    assert not set(first["texts"]) & set(second["texts"])


def test_on_sigterm_none_leaves_before_the_checkpoint_is_written(reward_checkpoint, tmp_path):
    started = start(
        tmp_path, reward_checkpoint, {"run": {"rounds": 3, "terminated_in": 2, "checkpoints": {"every": 0}}}
    )
    for status, output in finish(started):
        assert status == 128 + signal.SIGTERM, output
    assert (tmp_path / "run" / "left").read_text() == "True"


@pytest.mark.parametrize("settings", [{"preferences": LABELS}, SHARDED], ids=["copies, labels", "sharded"])
def test_a_killed_process_ends_the_others_and_the_run_resumes(reward_checkpoint, tmp_path, settings):
    options = {"sgd": False, "rounds": 3, **settings}
    (status, output), (killed, _) = finish(
        start(tmp_path, reward_checkpoint, {"run": {**options, "killed_in": 2}, "never": {}})
    )
    assert killed == -9
    assert status > 0
    assert "Error" in output
    assert not (tmp_path / "never").exists()
    results = run(tmp_path, reward_checkpoint, {"run": {**options, "resume": "last"}, "whole": options})
    for resumed, whole in zip(results["run"], results["whole"], strict=True):
        assert_same_run(resumed, whole, 0)


@pytest.mark.parametrize(("settings", "failing"), [({}, 1), (SHARDED, 0)], ids=["copies", "sharded"])
def test_an_error_in_one_process_ends_all_with_its_reason(reward_checkpoint, tmp_path, settings, failing):
    """Also where the one that fails holds the store, and long before the 30 minutes of `placement.timeout`."""
    ended = finish(start(tmp_path, reward_checkpoint, {"run": {"fails_in": [2, failing], **settings}, "never": {}}))
    assert "FloatingPointError: phase" not in ended[1 - failing][1]
    for status, output in ended:
        assert status == 1, output
        assert "a reward is not finite; last good checkpoint: " in output
    assert f"process {failing} failed: FloatingPointError: a reward is not finite" in ended[1 - failing][1]
    assert not (tmp_path / "never").exists()


def test_accelerate_launch_runs_the_command_line(tmp_path, reward_checkpoint):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    config = write_config(tmp_path, reward_checkpoint)
    command += ["-m", "r2m.cli", "train", "--config", str(config), "rounds=1", f"output_dir={tmp_path}/run"]
    # Without GPUs the same launch gives processes on the CPU. The judge needs this folder.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("metrics.jsonl and metrics.png are in") == 1
    assert (tmp_path / "run" / "metrics.png").is_file()


def test_a_process_takes_its_share_of_memory():
    """While a sharded run starts, saves and resumes; the script fails where it is more."""
    script = Path(__file__).parents[2] / "benchmarks" / "sharded.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=4 * TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- shares ----


@given(st.lists(st.integers(), min_size=1, max_size=20), st.integers(1, 6), st.integers(1, 3))
def test_shares_are_equal_and_make_up_the_whole(items, world, group):
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "number", lambda: world)
        for rank in range(world):
            patch.setattr(processes, "index", lambda rank=rank: rank)
            shares.append([x for item in processes.share(items) for x in [item] * group])
        patch.setattr(processes, "_all", lambda _: shares)
        gathered = processes.gather_items(shares[0], group)
    assert len({len(share) for share in shares}) == 1
    assert gathered[: len(items) * group] == [x for item in items for x in [item] * group]


def test_one_process_gets_back_what_it_gives():
    rows = torch.randn(4, 2)
    assert processes.gather(rows) is rows
    assert processes.total(rows) is rows
    assert processes.share([1, 2]) == processes.gather_items([1, 2]) == [1, 2]
    assert processes.from_first({"a": 1.0}) == processes.mean({"a": 1.0}) == {"a": 1.0}


# ---- bad input ----


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (4, "prompts_per_round is 6 on 4 processes; expected a multiple of 4"),
        (3, "minibatches is 3 on 3 processes; expected a divisor of the 8 sequences of each"),
    ],
)
def test_groups_that_cannot_be_dealt_out_are_an_error(number, message):
    config = config_from_dict({"prompts_per_round": 6, "num_generations": 4, "minibatches": 3})
    config.check_processes(2)
    with pytest.raises(ValueError, match=message):
        config.check_processes(number)


def test_a_sharded_policy_waits_in_no_host_memory():
    with pytest.raises(ValueError, match=r"shard_policy and placement.offload_reference are both true"):
        config_from_dict({"placement": {"shard_policy": True, "offload_reference": True}})


def test_a_sharded_policy_has_no_adapter(reward_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"placement.shard_policy is true with an adapter; expected false"):
        train(tmp_path, reward_checkpoint, adapter=True, **SHARDED)


def test_a_launch_for_something_else_is_an_error(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"accelerate is configured for FSDP; expected .* placement.shard_policy=true"):
        processes.start(1.0)
