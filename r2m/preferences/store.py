"""What a run has asked and been told: in its folder as text, in memory as what the reward model learns from."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2m import processes
from r2m.config import Preferences
from r2m.data.sources import Prompt
from r2m.method.updater import Kept, R2MUpdater
from r2m.preferences.choosing import choose_pairs
from r2m.preferences.labellers import Label, Pair, checked, load_labeller, probability
from r2m.progress import waiting

logger = logging.getLogger(__name__)

LABELS = "labels.jsonl"  # in the run's folder: a pair and its label a line; only ever appended to


class FreshLabels:
    """Asks for labels of a round's pairs, keeps them, and says what the reward model loses on them.

        row |= labels.ask(prompts, completions, rewards, t)       # of the round; once all its pools are collected
        metrics |= updater.step(rewards, labels.loss(), grebt=...)

    A pair is learned from in the round that asked, and then again in every round in which it is among the last
    `preferences.reservoir` labelled ones. What is kept of it is `updater.keep`'s: O(D), no hidden states.

    folder: the run's. seed: of the random choices among a round's pairs.

    Of several processes the first asks, and all keep the pairs of all. Raises ValueError or ImportError for a labeller
    that is not there.
    """

    def __init__(self, updater: R2MUpdater, settings: Preferences, *, folder: Path | str, seed: int):
        assert settings.labeller is not None
        self.updater, self.settings, self.seed = updater, settings, seed
        self.file = Path(folder) / LABELS
        self.labeller = load_labeller(settings.labeller, settings.wait)
        self.answered: dict[tuple[Any, ...], Label] | None = None  # what the file says, once it has been read
        self.failing = False  # whether the last call went wrong, which is said once
        self.kept: Kept | None = None  # rows 2 i and 2 i + 1: first and second of pair i; the oldest come first
        self.labels = torch.empty(0)  # [m] of these pairs
        self.fresh = 0  # how many of them, the last ones, are of this round
        self.seen, self.agreed = 0, 0.0  # all labels of the run, and how many the fused rewards agreed with

    def ask(self, prompts: Sequence[Prompt], completions: Sequence[str], rewards: Tensor, t: int) -> dict[str, float]:
        """Have pairs of round t labelled and keep them. Returns the round's `labels/*`; the agreement of rewards is
        that of the weights before they learn from these labels.

        prompts, completions, rewards [b]: of this process's sequences. A labeller that fails is counted and warned
        about, and the round goes on. Raises OSError if the labels cannot be written.
        """
        group, updater = self.updater.num_generations, self.updater
        everything = [processes.gather(x, group) for x in updater.keep(slice(None))]
        vanilla = updater.reward_model.vanilla_score(everything[0]).tolist()
        prompts = processes.gather_items(list(prompts), group)
        texts = processes.gather_items(list(completions), group)
        rows = choose_pairs(
            self.settings.choose,
            (processes.gather(rewards, group) / updater.scale).tolist(),
            vanilla,
            texts,
            group=group,
            count=self.settings.per_round,
            seed=self.seed,
            t=t,
        )
        pairs = [Pair(prompts[i], texts[i], texts[j], t) for i, j in rows]
        start = time.perf_counter()
        labels, failed = processes.from_first(self._answers(pairs) if pairs and processes.index() == 0 else ([], False))
        seconds = time.perf_counter() - start

        given = [(ij, label) for ij, label in zip(rows, labels, strict=True) if label is not None]
        index = [i for ij, _ in given for i in ij]
        self._add(Kept(*(x[index] for x in everything)), [label for _, label in given])
        row = {"labels/asked": len(pairs), "labels/given": len(given), "labels/skipped": len(pairs) - len(given)}
        return row | {"labels/failed": float(failed), "seconds/labeller": seconds} | self._agreement()

    def loss(self) -> Tensor | None:
        """`weight` times the Bradley-Terry loss of this round's labels, a mean, plus that of the older ones, another;
        None without any.

        `noise` is the share of labels that are the wrong way round: a label p counts as p + noise (1 - 2 p).
        """
        if self.kept is None or not len(self.labels):
            return None
        targets = self.labels + self.settings.noise * (1 - 2 * self.labels)
        margins = margins_of_pairs(self.updater.rewards(self.kept))
        losses = F.binary_cross_entropy_with_logits(margins, targets, reduction="none")
        parts = losses.split([len(losses) - self.fresh, self.fresh])
        return self.settings.weight * torch.stack([part.mean() for part in parts if len(part)]).sum()

    def state_dict(self) -> dict[str, Any]:
        """As of the end of a round."""
        self._age()
        kept = [] if self.kept is None else list(self.kept)
        return {"kept": kept, "labels": self.labels, "seen": self.seen, "agreed": self.agreed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.updater.reward_model.head.weight.device
        kept = [x.to(device, copy=True) for x in state["kept"]]  # nothing keeps a file mapped
        self.kept, self.labels = Kept(*kept) if kept else None, state["labels"].to(device, copy=True)
        self.seen, self.agreed = state["seen"], state["agreed"]

    def _add(self, kept: Kept, labels: list[float]) -> None:
        self._age()
        self.labels = torch.cat([self.labels.to(kept.rte), kept.rte.new_tensor(labels)])
        self.kept = kept if self.kept is None else Kept(*map(torch.cat, zip(self.kept, kept, strict=True)))
        self.fresh = len(labels)

    def _age(self) -> None:
        """No pair is fresh any more, and the last ones are left."""
        over = max(0, len(self.labels) - self.settings.reservoir)
        self.labels, self.fresh = self.labels[over:], 0
        if self.kept is not None:
            self.kept = Kept(*(x[2 * over :] for x in self.kept))

    @torch.no_grad()
    def _agreement(self) -> dict[str, float]:
        """The probability, by this round's labels, of what the sign of the margins says; with and without feedback."""
        if self.kept is None or not self.fresh:
            return {}
        kept, labels = Kept(*(x[-2 * self.fresh :] for x in self.kept)), self.labels[-self.fresh :]
        rewards = self.updater.rewards(kept), self.updater.reward_model.vanilla_score(kept.rte)
        signs = torch.stack([margins_of_pairs(r) for r in rewards]).sign()
        fused, vanilla = (0.5 + signs * (labels - 0.5)).mean(-1).tolist()
        self.seen += self.fresh
        self.agreed += self.fresh * fused
        return {
            "labels/agreement": fused,
            "labels/agreement_vanilla": vanilla,
            "labels/agreement_so_far": self.agreed / self.seen,
        }

    def _answers(self, pairs: list[Pair]) -> tuple[list[Label], bool]:
        """A label for each pair, and whether the labeller failed as a whole: then nothing is written, and a resumed run
        asks again.

        It is asked about the pairs that the run's folder has no answer to. Answers are on the disk before they are
        used.
        """
        if self.answered is None:
            self.answered = read_labels(self.file)
        unknown, problem = [pair for pair in pairs if _key(pair) not in self.answered], ""
        labels: list[Label] = []
        if unknown:
            try:
                with waiting("labeller"):
                    labels, problem = checked(self.labeller(unknown), unknown)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        if labels:
            append_labels(self.file, unknown, labels)
            self.answered |= dict(zip(map(_key, unknown), labels, strict=True))
        if problem and not self.failing:
            logger.warning(
                "round %d: labeller %s: %s. The run goes on without; labels/skipped and labels/failed count on",
                pairs[0].round,
                self.settings.labeller,
                problem,
            )
        self.failing = bool(problem)
        return [self.answered.get(_key(pair)) for pair in pairs], bool(unknown) and not labels


def margins_of_pairs(rewards: Tensor) -> Tensor:
    """[m], of rewards [2 m]: the first less the second of every pair."""
    first, second = rewards.view(-1, 2).unbind(-1)
    return first - second


# ---- the file ----


def read_labels(file: Path) -> dict[tuple[Any, ...], Label]:
    """The answers in a run's folder. A last line that a kill cut short is taken out of the file.

    Raises ValueError for a line that is no answer.
    """
    if not file.is_file():
        return {}
    content = file.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(file, complete)
    answers = {}
    for number, line in enumerate(content[:complete].splitlines(), 1):
        try:
            row = json.loads(line)
            label = row.pop("label")
            answers[_key(Pair(**row))] = probability(label)
            if label is not None and probability(label) is None:
                raise ValueError(label)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}, line {number} is no label ({error!r}); expected an object with prompt, first, second, round "
                "and label: remove the line"
            ) from None
    return answers


def append_labels(file: Path, pairs: list[Pair], labels: list[Label]) -> None:
    """Raises OSError if the disk is full or cannot be written."""
    lines = [asdict(pair) | {"label": label} for pair, label in zip(pairs, labels, strict=True)]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(f"{len(labels)} labels cannot be written to {file}: {error}") from error


def _key(pair: Pair) -> tuple[Any, ...]:
    return pair.round, json.dumps(pair.prompt), pair.first, pair.second
