"""One process of several, started by test_processes.py: training runs on tiny models, one after another.

Arguments: a folder, the reward model's checkpoint, and {name: options of `train`} in JSON.
"""

import atexit
import json
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import tiny
import torch
from test_trainer import PAIRS, make_config, small_policy, with_adapter

from r2m import R2MTrainer, processes
from r2m.preferences import queue

PROMPTS = ["hello ", "what is it? ", "a b", "xyz", "to be", "q ", "one two", "end."]


def respond(prompt_ids, num_generations):
    """Responses that depend on their prompt and nothing else."""
    seeds = [random.Random(str((ids, j))) for ids in prompt_ids for j in range(num_generations)]
    return [[seed.randrange(50, 260) for _ in range(seed.randrange(2, 6))] for seed in seeds]


def judge(prompts, responses):
    return [float(len(prompt) + 3 * len(set(response))) for prompt, response in zip(prompts, responses, strict=True)]


def verifier(pairs):
    return [float(len(set(pair.first)) > len(set(pair.second))) for pair in pairs]


def answer_questions(folder):
    """A person who, at the end of a round, labels all that waits."""
    answered = queue.answers(folder)
    for id, row in queue.questions(folder).items():
        if id not in answered:
            (label,) = verifier([SimpleNamespace(**row)])
            queue.answer(folder, id, label, by="test", left="first")


def stochastic_gradient_descent(parameters, **_):
    return torch.optim.SGD(parameters, lr=0.02)


def train(
    folder,
    checkpoint,
    *,
    sgd=True,
    adapter=False,
    sampled=False,
    resume=None,
    killed_in=0,
    fails_in=None,
    terminated_in=0,
    **settings,
):
    """The metrics and weights of a run. killed_in: the round in which the second process dies; fails_in: round and
    process of an error; terminated_in: the round of a SIGTERM; the second process says, when it leaves, whether
    the checkpoint is there."""
    values = {
        "prompts_per_round": 4, "micro_batch_size": 4, "r2m": {"standardize": True},
        "evaluation": {"every": 1}, "checkpoints": {"every": 1, "keep": 9},
    }  # fmt: skip

    def measure(prompts, responses):
        answer_questions(folder)
        return {"judged": sum(judge(prompts, responses))}

    policy = with_adapter() if adapter else small_policy()
    steps = stochastic_gradient_descent if sgd else torch.optim.AdamW  # Adam divides rounding by itself
    with patch.object(torch.optim, "AdamW", steps):
        trainer = R2MTrainer(
            policy,
            tiny.reward_model(checkpoint, policy, standardize=True),
            tiny.tokenizer(),
            PROMPTS,
            make_config(folder, **values | settings),
            generator=None if sampled else respond,
            eval_prompts=PROMPTS[:5],
            judge=judge,
            held_out_pairs=PAIRS,
            sample_metrics=measure,
        )
    annotate = trainer.annotate

    def annotate_or_die(rollout, t, row):
        if t == killed_in and processes.index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if t == terminated_in:
            os.kill(os.getpid(), signal.SIGTERM)
            if processes.index() == 1:
                atexit.register(lambda: (folder / "left").write_text(str((folder / f"checkpoint-{t}").exists())))
        if fails_in is not None and [t, processes.index()] == fails_in:
            raise FloatingPointError("a reward is not finite")
        return annotate(rollout, t, row)

    trainer.annotate = annotate_or_die
    history = trainer.train(resume)
    trainer.save_pretrained(folder)
    weights = {name: processes.full(p) for name, p in policy.state_dict().items()}
    rollout = trainer.sample(1)
    minibatches = trainer.learner.minibatches(rollout)
    return {
        "history": history,
        "policy": weights,
        "reward_model": trainer.reward_model.state_dict(),
        "texts": rollout.completions,
        "passes": {
            "number": [[len(micro_batch) for micro_batch in minibatch] for minibatch in minibatches],
            "lengths": rollout.lengths,
        },
    }


if __name__ == "__main__":
    place, checkpoint, cases = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    for name, options in cases.items():
        result = train(place / name, checkpoint, **options)
        torch.save(result, place / f"{name}-{processes.index()}.pt")
    processes.stop()
