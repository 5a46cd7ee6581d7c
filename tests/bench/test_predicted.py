"""Predictions beside measurements: figures worked out by hand."""

import predicted
import pytest

from r2m_kernels.bench.results import Results, Row

PREDICTIONS = {
    "by": "a model",
    "bandwidth": {"H100": 3e12, "H200": 4.2e12},
    "shapes": [[64, 1024], [16, 8192]],
    "rows": [
        {"provider": "triton", "lengths": lengths, "mode": mode, "D_p": 2048, "H100": [0.91, 0.93], "H200": [0.8, 0.82]}
        for lengths in ("full", "masked")
        for mode in predicted.MODES
    ],
}


def row(batch, length, mode="score", **fields):
    shape = {"B": batch, "S": length, "D_p": 2048}
    return Row("ops", "attention_pool", mode, "predicted", "triton", "bfloat16", shape, **fields)


@pytest.fixture(autouse=True)
def _predictions(monkeypatch):
    monkeypatch.setattr(predicted, "load", lambda: PREDICTIONS)


def test_predictions_alone():
    text = predicted.tables([])
    assert text.count("predicted:") == 2  # full, masked
    assert "| 2048 | 91 / 93 | 80 / 82 | 91 / 93 | 80 / 82 | 91 / 93 | 80 / 82 |" in text


def test_beside_what_a_gpu_of_that_name_measured_and_no_other():
    bandwidth = {"read": 3.9e12, "copy": 4e12}
    rows = [row(64, 1024, median=1e-4, ideal_bytes=300_000_000), row(16, 8192, status="out of memory: at all")]
    gpu = Results("", {"device": "NVIDIA H200", "commit": "0123456789abcdef"}, bandwidth, rows)
    cpu = Results("", {"device": "A CPU", "commit": None}, bandwidth, rows)
    text = predicted.tables([gpu, cpu])
    assert text.count("measured") == 1
    assert "**NVIDIA H200**, B=64 S=1024 / B=16 S=8192, predicted -> measured, commit 0123456789ab:" in text
    # 300 MB in 100 us are 3 TB/s, of 4
    assert "| 2048 | 80 -> 75 / 82 -> out of memory | 80 -> not run / 82 -> not run |" in text
