"""What the demo's arms share, on a tiny model."""

import functools
import random

import numpy as np
import torch

from r2m.demo import arms, gold, start
from r2m.demo.movie_reviews import Splits
from tests.r2m import tiny

TEXTS = ["the film was good", "the film was bad , the film was long", "a good film"]
CHANGED = [
    "rounds=2", "prompts_per_round=3", "micro_batch_size=24", "generation.max_new_tokens=6",
    "generation.max_prompt_tokens=40", "lora.top_layers=2", "r2m.inner_width=8",
]  # fmt: skip


def small_world(folder, monkeypatch):
    """Twelve training prompts, four of whose samples are short random texts; the backbone "half" has two layers of
    four."""
    monkeypatch.setenv("R2M_CACHE", str(folder / "cache"))
    for name, value in {"HELD_OUT": (3, 4), "INNER_WIDTH": 8}.items():
        monkeypatch.setattr(start, name, value)
    for name, value in {"ROUNDS": 2, "LABELS": 6}.items():  # of labels-before: there are 24 pairs of start samples
        monkeypatch.setattr(arms, name, value)
    backbones = {"same": folder / "model", "half": folder / "half"}
    for path, layers in zip(backbones.values(), (4, 2), strict=True):
        tiny.policy(num_hidden_layers=layers).save_pretrained(path)
        tiny.tokenizer(pad="</s>").save_pretrained(path)
    prompts = [f"Movie review: {word}" for word in ["a", "bad", "good", "fine", "dull", "long", "odd", "new"] * 2]
    splits = Splits([], [], [], prompts[:12], prompts[12:], [], [])
    judges = gold.Judges(lambda texts: np.array([float(len(text.split())) for text in texts]), gold.Trigrams(TEXTS))
    draw = random.Random(0)

    def samples(prompts, count):
        of_each = [prompt for prompt in prompts for _ in range(count)]
        texts = ["".join(draw.choices(" abc", k=6)) for _ in of_each]
        (place := folder / f"samples{count}x{len(prompts)}").mkdir()
        start._features(place, backbones["same"], backbones, of_each, texts, torch.float32)
        return start.Samples(of_each, texts, judges.parts(of_each, texts), **torch.load(place / start.FEATURES))

    train, held_out = samples(splits.prompts, start.SAMPLES), samples(splits.eval_prompts[:3], 4)
    standard = gold.Standard(held_out.parts.mean(0), np.ones(3))  # of so few samples some deviation may be 0
    means = start.start_means(standard, train.parts)
    return start.Start(backbones["same"], backbones, "float32", splits, judges, standard, means, train, held_out)


def loads(world):
    """In place of `start.load`."""
    return functools.partial(lambda *_, **__: world)
