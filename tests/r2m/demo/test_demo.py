"""The demo's whole path on the real model: two rounds of one arm, fewer pairs and reviews."""

import dataclasses
import json

import pytest

from r2m.demo import run as demo


@pytest.mark.real_model
@pytest.mark.slow
def test_the_demo_trains_the_real_model_and_reports(tmp_path, monkeypatch, capsys):
    def few(*args, **kwargs):
        splits = load_splits(*args, **kwargs)
        return dataclasses.replace(
            splits,
            pairs=splits.pairs[:16],
            validation_pairs=splits.validation_pairs[:8],
            test_pairs=splits.test_pairs[:8],
            judge_train=splits.judge_train[::15],
        )

    load_splits = demo.load_splits
    monkeypatch.setattr(demo, "load_splits", few)
    monkeypatch.setattr(demo, "ARMS", {"RLOO + R2M": "trained"})
    monkeypatch.setattr(demo, "EVAL_PROMPTS", 2)
    table = demo.run_demo(rounds=2, output=tmp_path)

    assert list(table) == ["before training", "RLOO + R2M"]
    assert table["before training"]["KL to the start (nats)"] == 0
    assert table["RLOO + R2M"]["KL to the start (nats)"] != 0
    arm = tmp_path / "rloo-plus-r2m"
    rows = [json.loads(line) for line in (arm / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2]
    assert all(row["grebt/loss"] > 0 and row["rm/grad_norm"] > 0 and "judge/logit" in row for row in rows)
    assert rows[0]["policy/kl"] == 0
    for name in ("metrics.png", "policy/adapter_config.json", "reward_model/r2m.safetensors"):
        assert (arm / name).stat().st_size > 0
    report = (tmp_path / "report.md").read_text()
    assert "RLOO + R2M" in report and "This is one seed" in report
    assert report in capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 0
    assert json.loads((tmp_path / "results.json").read_text())["table"].keys() == table.keys()
