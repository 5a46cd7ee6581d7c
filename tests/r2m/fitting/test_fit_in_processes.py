"""A fit in two processes (gloo, on the CPU) beside a fit in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fit_in_processes import CASES, fit, pairs
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def in_two(*arguments, **environment):
    """What torchrun did: exit status and output."""
    quiet = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, *map(str, arguments)]
    result = subprocess.run(command, env=os.environ | quiet | environment, capture_output=True, text=True, timeout=240)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, reward_checkpoint):
    folder = tmp_path_factory.mktemp("two")
    status, output = in_two(Path(__file__).with_name("fit_in_processes.py"), folder, reward_checkpoint)
    assert status == 0, output
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_fit_as_one_does(fitted, reward_checkpoint, case):
    report, weights = fit(reward_checkpoint, **CASES[case])
    assert report["head_steps"] > 0
    first, second = (torch.load(fitted / f"{case}-{rank}.pt") for rank in range(2))
    assert first[0] == second[0] == pytest.approx(report, rel=1e-3, abs=1e-4)
    for name, value in weights.items():
        assert torch.equal(first[1][name], second[1][name])
        torch.testing.assert_close(first[1][name], value, rtol=1e-3, atol=1e-4)


def test_the_command_writes_one_folder_and_its_error_ends_all_processes(tmp_path, reward_checkpoint, policy, tokenizer):
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    file, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(vars(pair)) + "\n" for pair in pairs(20, "the")))
    command = ["-m", "r2m.cli", "fit-reward", "--pairs", file, "--reward-model", reward_checkpoint]
    command += ["--policy", tmp_path / "policy", "--inner-width", 8, "--max-epochs", 4, "--output", out]
    status, output = in_two(*command, R2M_CACHE=str(tmp_path / "cache"))
    assert status == 0, output
    assert output.count(f"reward model, fit.json and calibration.png are in {out}") == 1
    assert json.loads((out / "fit.json").read_text())["training_pairs"] == 18
    assert load_file(out / "r2m.safetensors")["attention.w_q"].isfinite().all()
    status, output = in_two(*command, R2M_CACHE=str(tmp_path / "cache"))  # only the first process looks at the folder
    assert status != 0
    assert f"output {out} is not empty; expected a new folder" in output
