"""One process of several, started by test_processes.py: loads checkpoints sharded, and says what is not as whole.

Argument: their folders, in JSON; the first is run in mixed precision, too. Prints a line for each that is wrong.
"""

import json
import sys

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from r2m import R2MConfig, load_policy, processes
from r2m.config import Placement
from r2m.policy.reference import freeze_reference


def tensors(model):
    values = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: processes.full(value.detach()) for name, value in values}


def differences(model, whole):
    """Names of what is not there, or has another dtype or other bits."""
    own, expected = tensors(model), tensors(whole)
    return [
        name
        for name in own.keys() | expected.keys()
        if name not in own
        or name not in expected
        or own[name].dtype != expected[name].dtype
        or not torch.equal(own[name], expected[name])
    ]


def check(folder):
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = load_policy(R2MConfig(policy=folder, precision="float32", placement=Placement(shard_policy=True)))
    ids = torch.arange(2, 10)[None]
    with torch.no_grad(), freeze_reference(policy)() as reference:
        found = differences(policy, whole) + differences(reference, whole)
        found += [f"{name} is no part" for name, p in policy.named_parameters() if not isinstance(p, DTensor)]
        expected = whole(ids, use_cache=False).logits
        for model in (policy, reference):  # kernels round by where a weight lies
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    return found


def mixed_precision(folder):
    """What is wrong where passes gather bfloat16: masters, gradients and the reference's masters stay float32."""
    ids, seen = torch.arange(2, 10)[None], []
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    policy = load_policy(R2MConfig(policy=folder, precision="bf16", placement=Placement(shard_policy=True)))
    policy.get_output_embeddings().register_forward_pre_hook(lambda head, _: seen.append(head.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy(ids, use_cache=False).logits.float()
    logits.square().mean().backward()
    parameters = [p for _, p in processes.named_parameters(policy)]
    kept = {p.dtype for p in parameters} | {p.grad.dtype for p in parameters if p.grad is not None}
    error = ((logits - expected).norm() / expected.norm()).item()
    wrong = {"gathered": set(seen) != {torch.bfloat16}, "kept": kept != {torch.float32}, "logits": error > 0.05}
    return [f"mixed precision: {name} ({seen}, {kept}, {error:.3f})" for name, is_so in wrong.items() if is_so]


if __name__ == "__main__":
    logging.disable_progress_bar()
    folders = json.loads(sys.argv[1])
    for name in folders:
        try:
            wrong = check(name)
            if name == folders[0]:
                wrong += mixed_precision(name)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            print(f"{name}: {', '.join(wrong)}")
    processes.stop()
