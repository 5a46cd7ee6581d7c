"""One process of several, started by test_fit_in_processes.py: fits on tiny models, one after another.

Arguments: a folder, and the reward model's checkpoint.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for tiny

import tiny
import torch

from r2m import Preference, fit_reward, processes

WORDS = ["film", "story", "plot", "cast", "music", "ending", "scene"]
CASES = {"kept": {}, "streamed": {"hidden_budget": 0, "batch_size": 4}, "adapter": {"lora_rank": 2, "batch_size": 4}}


def pairs(count, owner):
    """Of each fourth the wrong text is chosen: a fit ends soon."""
    texts = [("good!", "so bad") if i % 4 else ("so bad", "good!") for i in range(count)]
    return [Preference(f"{owner} {WORDS[i % 7]} {i // 7} is ", *texts[i]) for i in range(count)]


def fit(checkpoint, **options):
    """Report, and the trained weights. 13 and 5 pairs: of two processes one has a pair more."""
    policy, tokenizer = tiny.policy(), tiny.tokenizer(pad="</s>")
    model = tiny.reward_model(checkpoint, policy, standardize=True)
    torch.manual_seed(0)  # of minibatches
    report = fit_reward(
        model, pairs(13, "the"), pairs(5, "my"), policy=policy, tokenizer=tokenizer, max_epochs=4, **options
    )
    return report, dict(model.state_dict())


if __name__ == "__main__":
    folder, checkpoint = map(Path, sys.argv[1:])
    processes.start(1)
    with processes.ends_all():
        for name, options in CASES.items():
            torch.save(fit(checkpoint, **options), folder / f"{name}-{processes.index()}.pt")
    processes.stop()
