"""One process of several, started by test_processes.py: loads every architecture sharded, and says what is not as whole.

Argument: {model type: folder} in JSON. Prints a line for each difference.
"""

import json
import sys

import torch
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
    config = R2MConfig(policy=folder, precision="float32", placement=Placement(shard_policy=True))
    policy = load_policy(config)
    ids = torch.arange(2, 10)[None]
    with torch.no_grad(), freeze_reference(policy)() as reference:
        found = differences(policy, whole) + differences(reference, whole)
        found += [f"is no part: {name}" for name, p in policy.named_parameters() if p.to_local() is p]
        expected = whole(ids, use_cache=False).logits
        for model in (policy, reference):
            if not torch.equal(model(ids, use_cache=False).logits, expected):
                found.append("logits")
    return found


if __name__ == "__main__":
    logging.disable_progress_bar()
    for name, folder in json.loads(sys.argv[1]).items():
        try:
            found = check(folder)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        if found and processes.index() == 0:
            print(f"{name}: {', '.join(found)}")
    processes.stop()
