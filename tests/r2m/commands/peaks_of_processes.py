"""Peaks of anonymous resident memory, phase by phase, of one of several processes: `test_memory_of_processes.py`.

argv: the run's config, and the folder for `peaks-RANK.json`.
"""

import json
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch

from r2m import processes
from r2m.commands.build import build_trainer
from r2m.config import load_config
from r2m.runs.checkpoint import save_checkpoint

PAGES = os.open("/proc/self/statm", os.O_RDONLY)


def resident():
    """Bytes that no file holds."""
    _, resident, shared, *_ = os.pread(PAGES, 200, 0).split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class Peaks(dict):
    """Name of a phase -> the most bytes beyond `base` that were seen in it."""

    def __init__(self):
        self.base, self.seen, self.over = resident(), 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def of(self, phase):
        self.seen = resident()
        yield
        self[phase] = max(self.seen, resident()) - self.base

    def _watch(self):
        while not self.over.wait(0.003):
            self.seen = max(self.seen, resident())


def main(config, folder):
    torch.ones(1000, 1000).mm(torch.ones(1000, 1000)).sum()  # what products take at their first
    processes.start(config.placement.timeout)
    peaks = Peaks()
    with peaks.of("start"):
        trainer = build_trainer(config)
    trainer.run.folder.mkdir(exist_ok=True)
    with peaks.of("r2m evaluate"):
        trainer.evaluator.held_out()
    for t in (1, 2):  # what a round leaves lies there in the next one
        row = {}
        with peaks.of("rollout"):
            rollout = trainer.sample(t)
        with peaks.of("annotate"):
            batch = trainer.annotate(rollout, t, row)
        with peaks.of("policy"):
            trainer.optimize_policy(rollout, batch, t, row)
        with peaks.of("reward_model"):
            trainer.align_reward_model(batch, t, row)
        with peaks.of("evaluation"):
            trainer.evaluator.held_out()
        with peaks.of("checkpoint"):
            save_checkpoint(trainer.run, t)
    (folder / f"peaks-{processes.index()}.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    with processes.ends_all():
        main(load_config(sys.argv[1]), Path(sys.argv[2]))
    processes.stop()
