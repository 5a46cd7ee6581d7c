"""`r2m bench`: the table and three files for a user's shapes, and mistakes that end in one line; and the same without
r2m, `python -m r2m_kernels.bench`."""

import importlib.util
import json
import socket
import sys

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from r2m.cli import app
from r2m_kernels import bench as benchmarks
from r2m_kernels.bench.__main__ import main
from r2m_kernels.bench.results import Results

pytestmark = pytest.mark.slow  # whole series of times

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ["--batch", "4", "--responses", "2", "--seq", "8", "--inner-width", "16", "--seconds", "0", "--device", "cpu"]


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *SMALL, *arguments])


@pytest.fixture(autouse=True)
def without_bandwidths_and_the_hub(monkeypatch):
    monkeypatch.setattr(benchmarks, "bandwidth", lambda device: {"read": 2e9, "copy": 1e9})
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: pytest.fail(f"{host} was asked"))


@pytest.fixture
def policy(tmp_path):
    """Configs alone: no weights."""
    LlamaConfig(hidden_size=48, num_attention_heads=2).save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


@pytest.fixture
def reward_model(tmp_path):
    """One that r2m has saved, whose config names its backbone."""
    LlamaConfig(hidden_size=40, num_attention_heads=2).save_pretrained(tmp_path / "backbone")
    settings = {
        "backbone": str(tmp_path / "backbone"), "backbone_revision": None, "policy": "", "policy_revision": None,
        "policy_width": 48, "inner_width": 16, "num_heads": 1, "floor": 0.6, "standardize": False,
        "rte_token": "last", "suffix": "", "max_length": 8,
    }  # fmt: skip
    (tmp_path / "reward_model").mkdir()
    (tmp_path / "reward_model" / "r2m_config.json").write_text(json.dumps(settings))
    return str(tmp_path / "reward_model")


def test_tables_are_printed_and_three_files_written(monkeypatch, tmp_path, policy, reward_model):
    monkeypatch.setattr(sys, "argv", ["r2m", "bench", "--policy", "a folder"])
    out = tmp_path / "out"
    result = bench("--policy", policy, "--reward-model", reward_model, "--output", str(out))
    assert result.exit_code == 0, result.output
    found = Results.load(out / "bench.json")
    assert found.command == "r2m bench --policy 'a folder'"
    assert found.bandwidth == {"read": 2e9, "copy": 1e9}
    assert [*dict.fromkeys((row.op, row.mode, row.case) for row in found.rows)] == [
        *(("policy_feedback_reward", mode, "policy") for mode in ("score", "forward", "forward+backward")),
        *(("attention_pool", mode, "policy") for mode in ("score", "forward", "forward+backward")),
        ("reward_model_update", "update", "h resident"),
        ("reward_model_update", "update", "h streamed"),
    ]
    shapes = {row.op: row.shape for row in found.rows}
    assert shapes["policy_feedback_reward"] == {"B": 4, "S": 8, "D_p": 48, "D_rm": 40, "d": 16, "heads": 1}
    assert shapes["attention_pool"] == {"B": 4, "S": 8, "D_p": 48, "heads": 1}
    assert shapes["reward_model_update"] == {"n": 2, "K": 2, "S": 8, "D_p": 48, "D_rm": 40, "d": 16}
    assert {"projected, eager", "triton", "extension"} <= {row.provider for row in found.rows}
    assert not [row for row in found.rows if row.status.startswith("wrong") or "compiled" in row.provider]

    lines = result.stdout.splitlines()
    assert lines[0] == f"device: {found.machine['device']}" and "read: 2 GB/s" in lines
    assert "policy_feedback_reward, score: policy, bfloat16, B=4 S=8 D_p=48 D_rm=40 d=16 heads=1" in lines
    assert "reward_model_update, update: h streamed, bfloat16, n=2 K=2 S=8 D_p=48 D_rm=40 d=16" in lines
    assert lines[-1] == f"results are in {out / 'bench.json'}, {out / 'bench.csv'} and {out / 'bench.png'}"
    assert (out / "bench.csv").read_text().count("\n") == 1 + len(found.rows)
    assert (out / "bench.png").read_bytes().startswith(PNG)


def test_several_heads_leave_the_update_out_and_say_so(tmp_path, policy):
    options = ["--policy", policy, "--reward-model", policy, "--output", str(tmp_path), "--dtype", "float32"]
    result = bench("--heads", "2", *options)
    assert result.exit_code == 0, result.output
    assert "reward_model_update: left out, it is measured with one head only\n" in result.stdout
    rows = Results.load(tmp_path / "bench.json").rows
    assert {row.op for row in rows} == {"policy_feedback_reward", "attention_pool"}
    assert {(row.shape["heads"], row.dtype) for row in rows} == {(2, "float32")}
    assert not [row for row in rows if row.status.startswith("wrong")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--responses", "3"], "batch is 4; expected a multiple of responses, which is 3"),
        (["--heads", "3"], "heads is 3; expected a divisor of inner_width, which is 16"),
        (["--dtype", "int8"], "dtype is 'int8'; expected one of bfloat16, float16, float32"),
        (["--device", "mps"], "device is 'mps'; expected one of this machine: "),
        (["--policy", "/no/model"], "--policy: /no/model: no such file or folder; expected the folder of a model"),
        (
            ["--reward-model", "/no/model"],
            "--reward-model: /no/model: no such file or folder; expected the folder of a model",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_asked_or_measured(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmarks, "start", lambda *_: pytest.fail("measured"))
    result = bench(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {message}") and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def bench_kernels(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    main()


@pytest.mark.parametrize("with_matplotlib", [True, False])
def test_the_kernels_alone(monkeypatch, tmp_path, capsys, with_matplotlib):
    find_spec = importlib.util.find_spec
    missing = None if with_matplotlib else "matplotlib"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    options = ["--dtype", "float32", "--seconds", "0", "--device", "cpu", "--output", str(tmp_path)]
    bench_kernels(monkeypatch, "--shape", "B=4", "S=8", "D_p=48", "D_rm=40", "d=16", "heads=2", "K=2", *options)
    found = Results.load(tmp_path / "bench.json")
    assert found.command.startswith("python -m r2m_kernels.bench --shape B=4 S=8")
    assert found.rows[0].shape == {"B": 4, "S": 8, "D_p": 48, "D_rm": 40, "d": 16, "heads": 2}
    assert (tmp_path / "bench.png").exists() == with_matplotlib
    assert ("matplotlib is not installed" in capsys.readouterr().out) != with_matplotlib


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "T=4"], "expected one of B, S, D_p, D_rm, d, heads, K and a size, as in S=1024, got 'T=4'"),
        (["--shape", "S=0"], "got 'S=0'"),
        (["--shape", "B=4", "K=3"], "batch is 4; expected a multiple of responses, which is 3"),
    ],
)
def test_a_wrong_shape_of_the_kernels_alone(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench_kernels(monkeypatch, *arguments)
    assert message in capsys.readouterr().err
