"""A run that is killed in its last rollout and, started again, goes on; started by test_trl_adapter.py."""

import os
import signal
import sys
from pathlib import Path

import torch
from test_trl_adapter import At, Run, answer_all, measured, saved_and_labelled

folder, checkpoint, labeller = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
goes_on = any(folder.glob("checkpoint-*"))
callbacks = [At(lambda: answer_all(folder))]
if not goes_on:
    callbacks.append(At(lambda: os.kill(os.getpid(), signal.SIGKILL), step=5))
run = Run(folder, checkpoint, callbacks=callbacks, **saved_and_labelled(labeller))
run.train(resume_from_checkpoint=goes_on)
torch.save({"history": measured(run.callback.history), "weights": run.weights()}, folder / "result.pt")
