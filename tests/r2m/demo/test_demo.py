"""The demo's report on a tiny model; and its whole path on the real one, with few rounds and reviews."""

import dataclasses
import json

import pytest

from r2m.demo import run as demo
from r2m.demo import start
from r2m.demo.arms import ARMS, SETTINGS, Group
from r2m.demo.run import run_demo
from tests.r2m.demo.world import CHANGED, loads, small_world


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "load", loads(small_world(tmp_path, monkeypatch)))
    monkeypatch.setattr(
        demo,
        "Group",
        lambda *args, overrides, **kwargs: Group(*args, pairs=8, overrides=[*CHANGED, *overrides], **kwargs),
    )


def test_the_demo_reports_each_arm(small, tmp_path, capsys):
    table = run_demo(rounds=2, seed=3, output=tmp_path / "demo")
    assert list(table) == list(ARMS)
    report = (tmp_path / "demo" / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert report.count("  - RLOO, fixed reward model: ") == 2  # two samples of each arm
    assert "Means over the last 2 of 2 rounds, seed 3" in report and "seeds, with pairs of more prompts" in report
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == table
    for arm in ARMS:
        rows = [json.loads(line) for line in (tmp_path / "demo" / arm / "metrics.jsonl").read_text().splitlines()]
        assert [row["round"] for row in rows] == [1, 2] and all("judge/gold" in row for row in rows)
        assert table[arm][demo.KL] == pytest.approx(sum(row["policy/kl"] for row in rows) / 2, abs=1e-5)
        for name in ("config.yaml", "metrics.png", "policy/adapter_config.json", "reward_model/r2m.safetensors"):
            assert (tmp_path / "demo" / arm / name).stat().st_size > 0
    assert (tmp_path / "demo" / "comparison.png").stat().st_size > 0


@pytest.mark.real_model
@pytest.mark.slow
def test_the_demo_trains_the_real_model(tmp_path, monkeypatch, capsys):
    def few(*args, **kwargs):
        splits = load_splits(*args, **kwargs)
        return dataclasses.replace(splits, judge_train=splits.judge_train[::15])

    load_splits = start.load_splits
    monkeypatch.setattr(start, "load_splits", few)
    monkeypatch.setattr(demo, "PROMPTS", 16)
    monkeypatch.setattr(
        demo,
        "Group",
        lambda *args, overrides, **kwargs: Group(*args, pairs=16, overrides=[*SMALLER, *overrides], **kwargs),
    )
    table = run_demo(rounds=2, output=tmp_path / "demo")
    assert all(0 <= row[demo.KL] < 5 for row in table.values())
    assert table["fixed"] == table["labels"] != table["r2m"]  # labels tell from the third round on
    assert "about " in capsys.readouterr().out


SMALLER = ["prompts_per_round=2", "num_generations=4", "micro_batch_size=8", "preferences.per_round=4"]


def test_settings_are_named_once():
    names = [setting.partition("=")[0] for setting in SETTINGS]
    assert len(set(names)) == len(names)
