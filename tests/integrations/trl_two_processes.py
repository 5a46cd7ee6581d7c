"""One process of two, started by test_trl_adapter.py: a rollout with a group each and labels, then it by hand."""

import copy
import importlib
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from test_trl_adapter import LABELLED, K, Run, loss_of, measured, tiny
from torch.distributed.tensor import DTensor

from r2m import processes
from r2m.method.updater import R2MUpdater


def is_sharded(model):
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


class RunOfOneOfTwo(Run):
    @property
    def model_in_trainer(self):
        """The policy as it is, whole: it may be sharded."""
        model, own = tiny.policy(), super().model_in_trainer
        gathered = nullcontext()
        if any(hasattr(p, "ds_id") for p in own.parameters()):
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(list(own.parameters()))
        with gathered:
            model.load_state_dict({name: processes.full(value) for name, value in own.state_dict().items()})
        return model


def on_an_accelerator(start):
    """accelerate's state as on a machine whose processes have an accelerator each: on CPUs it does not shard."""

    def start_with(state, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState(cpu=True, backend="gloo")._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        start(state, *args, **kwargs)

    return start_with


folder, checkpoint, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
if deepspeed:
    deepspeed_comm = importlib.import_module("deepspeed.comm.torch")
    deepspeed_comm.build_shm_op = lambda: None  # faster by shared memory, but compiled at its first use
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    AcceleratorState.__init__ = on_an_accelerator(AcceleratorState.__init__)
args = {"gradient_accumulation_steps": 1, "num_iterations": 1, "max_steps": 1, "ddp_backend": "gloo"}
args["use_cpu"] = not deepspeed  # which chooses by itself
capture = "forward" if kind == "grpo" else "scoring"
run = RunOfOneOfTwo(folder / "run", checkpoint, kind, capture=capture, preferences=LABELLED, **args)
by_hand, rank = copy.deepcopy(run.reward_model), dist.get_rank()
with torch.no_grad():
    run.reward_model.attention.w_q.add_(rank)  # as if drawn from another seed
run.train()

calls = [None, None]
dist.all_gather_object(calls, run.calls[0])
processes.number = lambda: 1  # by hand each process has the sequences of both
updater = R2MUpdater(by_hand, run.settings, total_steps=1, num_generations=K)
updater.begin_round(torch.cat([by_hand.embed(call.prompts, call.texts) for call in calls]), 1)
hidden = [states for call in calls for states in run.hidden(call, tiny.policy())]  # the refresh is before the only step
for row, states in enumerate(hidden):
    updater.collect([row], states[None], torch.ones(1, len(states), dtype=torch.bool))
labels_loss = loss_of(run.labels, updater, [text for call in calls for text in call.texts])
updater.step(torch.tensor([reward for call in calls for reward in call.rewards]), labels_loss)
result = {
    "texts": calls[rank].texts,
    "weights": run.weights(),
    "by_hand": by_hand.state_dict(),
    "history": measured(run.callback.history),
    "is_sharded": is_sharded(run.trainer.model),
}
torch.save(result, folder / f"{rank}.pt")
dist.barrier()
os._exit(0)  # the group of a sharded policy is not torn down: it waits for work that nobody finishes
