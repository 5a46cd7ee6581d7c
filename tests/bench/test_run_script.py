"""benchmarks/run.py from its command line to its files; what the suites measure is tested beside this."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

from r2m_kernels.bench.results import Results

pytestmark = pytest.mark.slow  # whole series of times

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "run.py"


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", "--quick", *options])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as for a script
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_every_suite_has_its_file(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--suite", "update", "--suite", "round", "--output", str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"update.json", "update.csv", "round.json", "round.csv"}
    update, whole_round = (Results.load(tmp_path / f"{suite}.json") for suite in ("update", "round"))
    assert {row.case for row in update.rows} == {"h resident", "h streamed"}
    assert [row.provider for row in whole_round.rows] == ["RLOO", "RLOO + R2M"]
    for results in (update, whole_round):
        assert all(row.status == "ok" or row.provider in ("triton", "extension") for row in results.rows)
        assert results.command == "python benchmarks/run.py --device cpu --suite update --suite round --quick"
        assert results.machine["commit"] is None or len(results.machine["commit"].rstrip("+")) == 40
        assert results.bandwidth.keys() == {"read", "copy"} and min(results.bandwidth.values()) > 0
    with (tmp_path / "update.csv").open() as file:
        assert [row["provider"] for row in csv.DictReader(file)] == [row.provider for row in update.rows]
    assert "plain PyTorch, projected" in capsys.readouterr().out


def test_a_time_limit_is_told_in_the_rows(monkeypatch, tmp_path):
    run(monkeypatch, "--suite", "ops", "--minutes", "0", "--json", str(tmp_path / "all.json"))
    rows = Results.load(tmp_path / "all.json").rows
    assert {row.status for row in rows} == {"not run: the time was up"}
    assert {row.op for row in rows} >= {"policy_feedback_reward", "attention_pool", "shared_prefix", "grebt_loss"}


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--device", "cuda", "--output", str(tmp_path))
    assert "--device cuda: PyTorch sees no GPU" in capsys.readouterr().err
