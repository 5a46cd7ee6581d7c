"""Fresh labels: what they add to an update, how far kept pairs drift, and whether a second-order rule learns better.

    python benchmarks/labels.py cost      # seconds and bytes of an update without and with labels
    python benchmarks/labels.py drift     # margins of kept pairs beside exact ones, on states of SmolLM2-135M-Instruct
    python benchmarks/labels.py replay    # the reservoir beside arXiv 2502.07193's one-pass update, on synthetic pairs

docs/labels.md has what they print.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[1]))

from r2m import R2MRewardModel, R2MUpdater
from r2m.config import R2M, Preferences
from r2m.method.reward_model import RewardModelConfig
from r2m.models import smollm2
from r2m.preferences.store import FreshLabels

FRESH, RESERVOIR = 16, 256
Shape = dict[str, int]
SMALL: Shape = {"D_p": 512, "D_rm": 512, "d": 256, "n": 64, "K": 8}
QWEN_3B: Shape = {"D_p": 2048, "D_rm": 4096, "d": 2048, "n": 64, "K": 8}  # presets/paper-dialogue-qwen2.5-3b.yaml


def make_updater(shape: Shape, *, rounds: int, **settings: float) -> R2MUpdater:
    torch.manual_seed(0)
    config = RewardModelConfig(
        backbone="", backbone_revision=None, policy="", policy_revision=None, policy_width=shape["D_p"],
        inner_width=shape["d"], num_heads=1, floor=0.6, standardize=True, rte_token="last", suffix="", max_length=8,
    )  # fmt: skip
    size = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    backbone = LlamaForSequenceClassification(LlamaConfig(hidden_size=shape["D_rm"], num_labels=1, **size))
    model = R2MRewardModel(backbone, None, config)
    return R2MUpdater(model, R2M(**settings), total_steps=rounds, num_generations=shape["K"])


def longer(pairs):
    """The labeller of `drift`."""
    return [float(len(pair.first) > len(pair.second)) for pair in pairs]


def make_labels(updater: R2MUpdater, folder: str) -> FreshLabels:
    settings = Preferences(labeller=f"{__file__}:longer", per_round=12, reservoir=RESERVOIR)
    return FreshLabels(updater, settings, folder=folder, seed=0)


# ---- cost: of the process, whatever else the machine does ----


def cost(rounds: int = 15) -> None:
    shape, rows = SMALL, SMALL["n"] * SMALL["K"]
    updater = make_updater(shape, rounds=4 * rounds)
    rte, hidden = torch.randn(rows, shape["D_rm"]), torch.randn(rows, 8, shape["D_p"])
    labels = make_labels(updater, tempfile.mkdtemp())
    mask, rewards = torch.ones(rows, 8, dtype=torch.bool), torch.randn(rows)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for t in range(1, 2 * rounds + 1):
        labelled = t % 2 == 0
        start = time.process_time()
        updater.begin_round(rte, t)
        absorbed = time.process_time() - start
        updater.collect(slice(None), hidden, mask)
        if labels.kept is None:
            labels.kept = updater.keep([(i % rows, (i + 1) % rows) for i in range(FRESH + RESERVOIR)])
            labels.labels, labels.fresh = torch.rand(FRESH + RESERVOIR).round(), FRESH
        start = time.process_time()
        updater.step(rewards, labels.loss() if labelled else None)
        seconds[labelled].append(absorbed + time.process_time() - start)
    without, with_labels = (statistics.median(x) for x in seconds.values())
    assert labels.kept is not None
    a_pair = sum(x.nbytes for x in labels.kept) / len(labels.labels)
    print(
        f"{shape}, {FRESH} labels, a reservoir of {RESERVOIR}, {torch.get_num_threads()} thread's time, {rounds} rounds"
    )
    print(
        f"update, median: {1e3 * without:.1f} ms without, {1e3 * with_labels:.1f} with: {with_labels / without:.2f} x"
    )
    print(f"a pair keeps {a_pair:.0f} bytes, {a_pair / (4 * shape['D_p']):.3f} D float32")

    shape, tokens = QWEN_3B, 64 * 8 * (512 + 512)
    update = 6 * 2 * (FRESH + RESERVOIR) * shape["d"] * (shape["D_rm"] + shape["D_p"])
    # Forward passes of the policy: sampling, reference, 2 epochs of forward, recomputation and backward; the backbone.
    a_round = 2 * tokens * (3.09e9 * (1 + 1 + 2 * 4) + 7.5e9)
    print(
        f"paper-dialogue-qwen2.5-3b: {update:.1e} operations for labels, {a_round:.1e} a round, {update / a_round:.1e}"
    )


# ---- drift ----

TEXTS = [
    f"{opinion} {subject} {ending}"
    for opinion in ("I loved", "Nobody should miss", "I cannot recommend", "Few people will enjoy")
    for subject in ("the slow first act of this film,", "how the director ends her story,", "a cast that", "the music:")
    for ending in ("never tries.", "and I would see it again tomorrow.", "it says more than the words do.", "alas!")
]  # fmt: skip


@torch.no_grad()
def states() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [64, S, 576] of the texts, their mask, and the last token's as RTEs."""
    name = smollm2()
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    rows = [tokenizer(text).input_ids for text in TEXTS]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    hidden = model.float().model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return hidden, mask, hidden[torch.arange(len(rows)), mask.sum(1) - 1]


def drift(rounds: int = 100) -> None:
    hidden, mask, rte = states()
    shape = {"D_p": 576, "D_rm": 576, "d": 288, "n": 16, "K": 4}
    print(f"{len(TEXTS)} texts, {shape}, {rounds} rounds with 12 labels each; pairs kept in round 1")
    print("| `r2m.learning_rate` | round | error of kept margins | without the slope | signs that differ |")
    print("| --- | --- | --- | --- | --- |")
    for learning_rate in (1e-6, 1e-5, 1e-4, 1e-3):
        updater = make_updater(shape, rounds=rounds, learning_rate=learning_rate)
        model = updater.reward_model
        every = hidden[mask]
        model.set_statistics(rte, every.mean(0), every.std(0))
        labels, generator = make_labels(updater, tempfile.mkdtemp()), torch.Generator().manual_seed(0)
        pairs = [(i, i + 1) for i in range(0, len(TEXTS), 2)]
        for t in range(1, rounds + 1):
            order = torch.arange(len(TEXTS)) if t == 1 else torch.randperm(len(TEXTS), generator=generator)
            updater.begin_round(rte[order], t)
            updater.score(slice(None), hidden[order], mask[order])
            updater.collect(slice(None), hidden[order], mask[order])
            if t == 1:
                first = updater.keep(pairs)
            rewards = model.score(rte[order], hidden[order], mask=mask[order], weight=updater.weight).detach()
            labels.ask([""] * len(order), [TEXTS[i] for i in order], rewards, t)
            updater.step(rewards, labels.loss())
            if t in (10, RESERVOIR // 12, rounds):  # the second is when it leaves the reservoir
                with torch.no_grad():
                    exact = model.score(rte, hidden, mask=mask, weight=updater.weight).view(-1, 2)
                    exact = exact[:, 0] - exact[:, 1]
                    kept = updater.margins(first)
                    flat = updater.margins(first._replace(slope=first.slope * 0, level=first.level * 0))
                errors = [((x - exact).norm() / exact.norm()).item() for x in (kept, flat)]
                signs = int((kept.sign() != exact.sign()).sum())
                cells = [f"{learning_rate:g}", str(t), *(f"{x:.1e}" for x in errors), f"{signs} of {len(pairs)}"]
                print("| " + " | ".join(cells) + " |", flush=True)


# ---- replay ----


def replay(seeds: int = 20, rounds: int = 100, m: int = 12, width: int = 64) -> None:
    """A linear reward learns from m pairs a round, whose features drift with the policy; a quarter of the labels are
    flipped. Accuracy on the next round's pairs, before learning from them, over the last half of the rounds."""
    results: dict[str, list[float]] = {}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        truth, start, end = torch.randn(3, width, generator=generator)
        data = []
        for t in range(rounds):
            spread = 0.3 + (1 - t / rounds) * start.abs() + t / rounds * end.abs()  # which features vary
            x = torch.randn(m, width, generator=generator) * spread
            right = (x @ truth > 0).float()
            data.append((x, right, (right - (torch.rand(m, generator=generator) < 0.25).float()).abs()))
        rules = {f"reservoir, AdamW, lr {lr:g}": reservoir(data, lr) for lr in (0.003, 0.01, 0.03)}
        rules |= {f"one pass, eta {eta:g}": one_pass(data, eta) for eta in (0.3, 1.0, 3.0)}
        for name, accuracy in rules.items():
            results.setdefault(name, []).append(accuracy)
    print(f"{seeds} seeds, {rounds} rounds of {m} pairs, {width} features; accuracy on the next pairs, mean +- s.e.")
    for name, values in results.items():
        print(f"{name}: {statistics.mean(values):.3f} +- {statistics.stdev(values) / seeds**0.5:.3f}")


Rounds = list[tuple[Tensor, Tensor, Tensor]]  # features [m, width] of the pairs' difference, right labels, given ones


def accuracy_after(data: Rounds, t: int, weight: Tensor) -> float:
    x, right, _ = data[t]
    return ((x @ weight > 0).float() == right).float().mean().item()


def reservoir(data: Rounds, lr: float) -> float:
    """One AdamW step a round on the mean of the fresh labels' loss plus that of the last RESERVOIR labels."""
    weight = torch.zeros(data[0][0].shape[1], requires_grad=True)
    optimizer, found = torch.optim.AdamW([weight], lr=lr, weight_decay=0), []
    for t, (x, _, y) in enumerate(data):
        found.append(accuracy_after(data, t, weight))
        loss = F.binary_cross_entropy_with_logits(x @ weight, y)
        if t:
            old_x, old_y = (torch.cat([row[i] for row in data[:t]])[-RESERVOIR:] for i in (0, 2))
            loss = loss + F.binary_cross_entropy_with_logits(old_x @ weight, old_y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return statistics.mean(found[len(found) // 2 :])


def one_pass(data: Rounds, eta: float) -> float:
    """Online mirror descent with the Hessians summed so far for its metric: each label is used once."""
    width = data[0][0].shape[1]
    weight, metric, found = torch.zeros(width), torch.eye(width), []
    for t, (x, _, y) in enumerate(data):
        found.append(accuracy_after(data, t, weight))
        p = torch.sigmoid(x @ weight)
        hessian = (x.T * (p * (1 - p))) @ x
        weight = weight - eta * torch.linalg.solve(metric + eta * hessian, x.T @ (p - y))
        p = torch.sigmoid(x @ weight)
        metric = metric + (x.T * (p * (1 - p))) @ x
    return statistics.mean(found[len(found) // 2 :])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = {"cost": cost, "drift": drift, "replay": replay}
    parser.add_argument("suite", choices=suites)
    suites[parser.parse_args().suite]()
