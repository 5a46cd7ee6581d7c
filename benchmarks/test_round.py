"""One training round of a toy with and without R2M: `pytest benchmarks` shows that both arms run, and what they cost.

Shapes that say something take minutes: python benchmarks/round.py --shape 0.5b
"""

import itertools
import math

import pytest
import torch

from benchmarks.round import PROVIDERS, build, run_config

ROUNDS = 5


@pytest.mark.parametrize("feedback", PROVIDERS)
def test_round(benchmark, feedback):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = build("tiny", run_config("tiny", feedback, device, rounds=ROUNDS + 1), device)
    metrics = trainer.round(1)[0]
    losses = ["policy/loss", "grebt/loss"] if feedback == "trained" else ["policy/loss"]
    assert all(math.isfinite(metrics[loss]) for loss in losses)
    t = itertools.count(2)
    benchmark.pedantic(lambda: trainer.round(next(t)), rounds=ROUNDS)
