"""The benchmark of a training round: what its rows hold, and what becomes of shapes that do not fit."""

import weakref

import pytest
import torch

from benchmarks import round as suite
from r2m.devices import compute_dtype

CPU = torch.device("cpu")
# Of two rounds the median is the mean, and means add up: no part can hide in the difference of medians.
ROUNDS = 2
DTYPE = str(compute_dtype("cpu")).removeprefix("torch.")  # which precision it takes where that is left open


@pytest.fixture(scope="module")
def rows():
    return {feedback: suite.measure_round("tiny", feedback, device=CPU, rounds=ROUNDS) for feedback in suite.PROVIDERS}


@pytest.mark.parametrize("feedback", suite.PROVIDERS)
def test_a_row_says_what_was_measured(rows, feedback):
    row = rows[feedback]
    assert (row.status, row.suite, row.op, row.mode) == ("ok", "round", "training_round", "round")
    assert (row.case, row.provider, row.dtype) == ("tiny", suite.PROVIDERS[feedback], DTYPE)
    sizes = {"n": 2, "K": 4, "S_prompt": 16, "S_response": 8}
    assert row.shape == sizes | {"parameters": 106816, "trained": 106816}
    assert 0 < row.p20 <= row.median <= row.p80
    assert row.runs == ROUNDS
    assert row.noise >= 0


@pytest.mark.parametrize("feedback", suite.PROVIDERS)
def test_phases_and_parts_add_up_to_the_round(rows, feedback):
    row = rows[feedback]
    assert row.parts.keys() == {*suite.PHASES, *suite.PARTS.values()}
    assert sum(row.parts[name] for name in suite.PHASES) == pytest.approx(row.median)
    parts = sum(row.parts[part] for part in suite.PARTS.values())
    # Every phase is one clocked method, but for the last one's few lines around the reward model's step. The rest is
    # the clock's own time, microseconds of a tenth of a second.
    assert 0.9 * row.median < parts <= row.median * (1 + 1e-9)


def test_only_r2m_has_parts_of_its_own(rows):
    for part in suite.PARTS.values():
        own = part.startswith(suite.OWN)
        assert (rows["none"].parts[part] == 0) == own, part
        assert rows["trained"].parts[part] > 0, part


def test_peak_memory_is_that_of_everything(rows):
    plain, ours = rows["none"], rows["trained"]
    # Policy, reference, gradients and AdamW's moments in float32, the reward model in bfloat16 at least.
    assert plain.peak_bytes > 22 * plain.shape["parameters"]
    # Four weights of the cross-attention and the head, with AdamW's moments.
    assert ours.peak_bytes - plain.peak_bytes > 3 * 4 * (4 * 64 * 64)


def test_one_round_has_no_noise():
    row = suite.measure_round("tiny", "none", device=CPU, rounds=1)
    assert row.median == row.p20 == row.p80 > 0
    assert row.noise is None
    with pytest.raises(ValueError, match="rounds is 0; expected at least 1"):
        suite.measure_round("tiny", "none", device=CPU, rounds=0)


@pytest.mark.parametrize("feedback", suite.PROVIDERS)
def test_a_shape_that_does_not_fit_is_not_built(monkeypatch, feedback):
    monkeypatch.setattr(suite, "free_memory", lambda device: 24e9)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(suite, "build", lambda *_: pytest.fail("built"))
    row = suite.measure_round("3b", feedback, device=CPU, rounds=3)
    assert row.status == "cannot run: needs 67.9 GB, this device has 24.0 GB free"
    assert row.shape["parameters"] == row.shape["trained"] == 3_085_846_528
    assert row.median is row.peak_bytes is row.parts is None
    assert row.status in suite.side_by_side(row, row)


def test_models_are_freed_also_when_memory_runs_out(monkeypatch):
    built, build, run = [], suite.build, suite.R2MTrainer.round

    def noted(*arguments):
        trainer = build(*arguments)
        built.append(weakref.ref(trainer.policy))
        return trainer

    def too_large(trainer, t):
        if t == 3:
            raise torch.OutOfMemoryError
        return run(trainer, t)

    monkeypatch.setattr(suite, "build", noted)
    assert suite.measure_round("tiny", "trained", device=CPU, rounds=1).status == "ok"
    monkeypatch.setattr(suite.R2MTrainer, "round", too_large)
    assert suite.measure_round("tiny", "trained", device=CPU, rounds=1).status == "out of memory"
    assert [policy() for policy in built] == [None, None]


def test_shares_are_of_the_round_and_of_the_peak(rows):
    text = suite.side_by_side(rows["none"], rows["trained"])
    own = sum(seconds for name, seconds in rows["trained"].parts.items() if name.startswith(suite.OWN))
    assert f"R2M's own parts: {own / rows['trained'].median:.2%}" in text
    assert f"R2M's memory: +{rows['trained'].peak_bytes / rows['none'].peak_bytes - 1:.2%}" in text


# ---- padding ----


def test_padded_rounds_measure_what_trimmed_ones_do_and_compute_more():
    padded, trimmed = suite.measure_padding(CPU, 1, "tiny").values()
    for row, other in zip(padded, trimmed, strict=True):
        assert row["tokens/computed"] > row["tokens/real"] == other["tokens/real"]
        assert row["tokens/computed"] > other["tokens/computed"]
        for measure in ("reward/mean", "policy/loss", "policy/grad_norm", "grebt/loss"):
            assert row[measure] == pytest.approx(other[measure], rel=1e-3, abs=1e-4)
    assert "padded / trimmed, round by round" in suite.padding_table({"padded": padded, "trimmed": trimmed})
