"""What a run has asked and been told: in its folder as text, in memory as what the reward model learns from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from r2m import processes
from r2m.config import Preferences
from r2m.data.sources import Prompt
from r2m.method.updater import Kept, R2MUpdater
from r2m.preferences import queue
from r2m.preferences.choosing import choose_pairs
from r2m.preferences.labellers import Key, Label, Pair, Told, load_labeller, probability
from r2m.progress import waiting

logger = logging.getLogger(__name__)

LABELS = queue.LABELS  # in the run's folder: a pair and its label a line; only ever appended to
WAITING = 256  # pairs without an answer that are kept, the last ones


class Taken(NamedTuple):
    """A line of the file."""

    label: Label
    round: int  # that has learned from it, the one that asked or a later one


class FreshLabels:
    """Asks for labels of a round's pairs, keeps them, and says what the reward model loses on them.

        row |= labels.ask(prompts, completions, rewards, t)       # of the round; once all its pools are collected
        metrics |= updater.step(rewards, labels.loss(), grebt=...)

    A pair is learned from in the round in which its label is there, the one that asked or a later one, and then again
    in every round in which it is among the last `preferences.reservoir` labelled ones. What is kept of it is
    `updater.keep`'s: O(D), no hidden states.

    folder: the run's. seed: of the random choices among a round's pairs.

    Of several processes the first asks, and all keep the pairs of all. Raises ValueError or ImportError for a labeller
    that is not there.
    """

    def __init__(self, updater: R2MUpdater, settings: Preferences, *, folder: Path | str, seed: int):
        assert settings.labeller is not None
        self.updater, self.settings, self.seed = updater, settings, seed
        self.file = Path(folder) / LABELS
        self.labeller = load_labeller(settings.labeller, Path(folder))
        self.taken: dict[Key, Taken] | None = None  # what the file says, once it has been read
        self.failing = False  # whether something went wrong in the round before, which is said once
        self.waiting: list[Pair] = []  # asked about and not answered, the oldest come first
        self.kept_waiting: Kept | None = None  # of these pairs
        self.kept: Kept | None = None  # of labelled pairs, the oldest come first
        self.labels = torch.empty(0)  # [m] of these pairs
        self.fresh = 0  # how many of them, the last ones, are new in this round
        self.seen, self.agreed = 0, [0.0, 0.0]  # labels of the run; with how many fused and vanilla rewards agreed

    def ask(self, prompts: Sequence[Prompt], completions: Sequence[str], rewards: Tensor, t: int) -> dict[str, float]:
        """Have pairs of round t labelled, take the labels that are there, of earlier rounds' pairs too, and keep them.
        Returns the round's `labels/*`; the agreement of rewards is that of the weights before they learn from these.

        prompts, completions, rewards [b]: of this process's sequences. A labeller that fails is counted and warned
        about, and the round goes on. Raises OSError if labels or questions cannot be written.
        """
        rows, pairs, chances = self._choose(prompts, completions, rewards, t)
        start = time.perf_counter()
        told = self._consult(pairs, chances, t) if processes.index() == 0 else (False, dict[int, Label](), False)
        accepted, labels, failed = processes.from_first(told)
        seconds = time.perf_counter() - start
        if accepted:
            self.waiting = self.waiting + pairs
            self.kept_waiting = _joined(self.kept_waiting, self.updater.keep(rows))
        row = self._sort(labels, t)
        row |= {"labels/asked": len(pairs) if accepted else 0, "labels/failed": float(failed)}
        return row | {"seconds/labeller": seconds} | self._agreement()

    def loss(self) -> Tensor | None:
        """`weight` times the Bradley-Terry loss of the labels new in this round, a mean, plus that of the older ones,
        another; None without any.

        `noise` is the share of labels that are the wrong way round: a label p counts as p + noise (1 - 2 p).
        """
        if self.kept is None or not len(self.labels):
            return None
        targets = self.labels + self.settings.noise * (1 - 2 * self.labels)
        losses = F.binary_cross_entropy_with_logits(self.updater.margins(self.kept), targets, reduction="none")
        parts = losses.split([len(losses) - self.fresh, self.fresh])
        return self.settings.weight * torch.stack([part.mean() for part in parts if len(part)]).sum()

    def state_dict(self) -> dict[str, Any]:
        """As of the end of a round."""
        self._age()
        return {
            "kept": list(self.kept or ()),
            "labels": self.labels,
            "waiting": [asdict(pair) for pair in self.waiting],
            "kept_waiting": list(self.kept_waiting or ()),
            "seen": self.seen,
            "agreed": self.agreed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.updater.reward_model.head.weight.device

        def own(kept: list[Tensor]) -> Kept | None:  # nothing keeps a file mapped
            return Kept(*(x.to(device, copy=True) for x in kept)) if kept else None

        self.kept, self.labels = own(state["kept"]), state["labels"].to(device, copy=True)
        self.kept_waiting, self.waiting = own(state["kept_waiting"]), [Pair(**pair) for pair in state["waiting"]]
        self.seen, self.agreed = state["seen"], list(state["agreed"])

    def _choose(
        self, prompts: Sequence[Prompt], completions: Sequence[str], rewards: Tensor, t: int
    ) -> tuple[list[tuple[int, int]], list[Pair], dict[Key, float]]:
        """Rows of the pairs of round t, the pairs, and the probability of each, by the rewards, that the first is
        better. Scalars and texts of all processes are gathered, no vectors."""
        group, updater = self.updater.num_generations, self.updater
        with torch.no_grad():
            scores = torch.stack([rewards / updater.scale, updater.vanilla()])
        fused, vanilla = processes.gather(scores.T, group).T.tolist()
        prompts = processes.gather_items(list(prompts), group)
        texts = processes.gather_items(list(completions), group)
        settings = self.settings
        rows = choose_pairs(
            settings.choose, fused, vanilla, texts, group=group, count=settings.per_round, seed=self.seed, t=t
        )
        pairs = [Pair(prompts[i], texts[i], texts[j], t) for i, j in rows]
        chances = [1 / (1 + math.exp(min(fused[j] - fused[i], 700))) for i, j in rows]
        return rows, pairs, {pair.key: chance for pair, chance in zip(pairs, chances, strict=True)}

    def _consult(self, pairs: list[Pair], chances: Mapping[Key, float], t: int) -> tuple[bool, dict[int, Label], bool]:
        """Ask about a round's pairs and take what has come, of earlier ones, too. Returns whether the labeller takes
        the pairs, which it does not while it is busy with earlier ones; the labels {place: label} of those of
        `waiting`, with these pairs behind, that wait no longer; and whether it failed.

        It is asked about the pairs that the run's folder has no answer to. Labels are on the disk before they are used.
        """
        if self.taken is None:
            self.taken = read_labels(self.file)
        labeller, everything = self.labeller, self.waiting + pairs
        told = [self._take(self.waiting, 0, t)]
        accepted = not labeller.busy
        if accepted:
            settled = self.taken.keys() | {pair.key for pair, _ in told[0].answers}
            unasked = {p.key: p for p in everything if p.key not in settled and not labeller.knows(p)}
            if unasked:
                labeller.ask(list(unasked.values()), chances)
            with waiting("labeller"):
                told.append(self._take(pairs, self.settings.wait, t))
        self._complain([x.problem for x in told if x.problem], t)
        skipped = {pair.key for x in told if x.failed for pair, _ in x.answers}
        labels = dict[int, Label]()
        for place, pair in enumerate(everything if accepted else self.waiting):
            taken = self.taken.get(pair.key)
            if taken is not None and taken.round <= t:  # a resumed run learns from each in the round that did before
                labels[place] = taken.label
            elif taken is None and pair.key in skipped:
                labels[place] = None
        return accepted, labels, any(x.failed for x in told)

    def _take(self, pairs: list[Pair], wait: float, t: int) -> Told:
        """What the labeller says, at most `wait` seconds later, of `pairs` that the file does not know; written."""
        assert self.taken is not None
        told = self.labeller.answers([pair for pair in pairs if pair.key not in self.taken], wait)
        if told.answers and not told.failed:
            append_labels(self.file, told.answers, t, self.labeller.ids)
            self.taken |= {pair.key: Taken(label, t) for pair, label in told.answers}
        return told

    def _complain(self, problems: list[str], t: int) -> None:
        """Of problems in a row the first is said."""
        if self.labeller.busy and self.settings.wait:
            problems.append(
                f"it takes longer than preferences.wait = {self.settings.wait:g} seconds; until it has "
                "answered, it is not asked again"
            )
        if problems and not self.failing:
            name = self.settings.labeller
            logger.warning(
                "round %d: labeller %s: %s. The run goes on; labels/skipped, waiting and failed count on",
                t,
                name,
                problems[-1],
            )
        self.failing = bool(problems)

    def _sort(self, labels: Mapping[int, Label], t: int) -> dict[str, float]:
        """Of the pairs that wait: labelled ones, {place: label}, are learned from, skipped ones and the oldest of too
        many forgotten."""
        given = [i for i, label in labels.items() if label is not None]
        late = sum(self.waiting[i].round < t for i in given)
        self._age()
        self.fresh = len(given)
        if given:
            fresh = _picked(self.kept_waiting, given)
            self.kept = _joined(self.kept, fresh)
            self.labels = torch.cat([self.labels.to(fresh.rte), fresh.rte.new_tensor([labels[i] for i in given])])
        left = [i for i in range(len(self.waiting)) if i not in labels]
        kept = left[-WAITING:]
        if len(kept) < len(self.waiting):
            self.waiting, self.kept_waiting = [self.waiting[i] for i in kept], _picked(self.kept_waiting, kept)
        return {
            "labels/given": len(given) - late,
            "labels/late": late,
            "labels/skipped": len(labels) - len(given),
            "labels/waiting": len(kept),
            "labels/dropped": len(left) - len(kept),
        }

    def _age(self) -> None:
        """No pair is fresh any more, and the last ones are left."""
        over = max(0, len(self.labels) - self.settings.reservoir)
        self.labels, self.fresh = self.labels[over:], 0
        if self.kept is not None and over:
            self.kept = _picked(self.kept, slice(over, None))

    @torch.no_grad()
    def _agreement(self) -> dict[str, float]:
        """The probability, by the new labels, of what the sign of the margins says; with and without feedback."""
        if not self.fresh:
            return {}
        kept, labels = _picked(self.kept, slice(-self.fresh, None)), self.labels[-self.fresh :]
        signs = torch.stack([self.updater.margins(kept), self.updater.vanilla_margins(kept)]).sign()
        shares = (0.5 + signs * (labels - 0.5)).mean(-1).tolist()
        self.seen += self.fresh
        self.agreed = [so_far + self.fresh * share for so_far, share in zip(self.agreed, shares, strict=True)]
        fused, vanilla = (so_far / self.seen for so_far in self.agreed)
        low, high = wilson(fused, self.seen)
        return {
            "labels/agreement": shares[0],
            "labels/agreement_vanilla": shares[1],
            "labels/agreement_so_far": fused,
            "labels/agreement_low": low,
            "labels/agreement_high": high,
            "labels/agreement_vanilla_so_far": vanilla,
        }


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of `count` independent draws: 95 % by the default z."""
    center, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (center - spread) / (1 + z * z / count), (center + spread) / (1 + z * z / count)


def _joined(kept: Kept | None, more: Kept) -> Kept:
    return more if kept is None else Kept(*map(torch.cat, zip(kept, more, strict=True)))


def _picked(kept: Kept | None, pairs: list[int] | slice) -> Kept:
    assert kept is not None
    return Kept(*(x[pairs] for x in kept))


# ---- the file ----


def read_labels(file: Path) -> dict[Key, Taken]:
    """The answers in a run's folder. A last line that a kill cut short is left out, and gone with the next answer.

    Raises ValueError for a line that is no answer.
    """
    rows, _ = queue.read(file, is_right=_is_label)
    pairs = [Pair(row["prompt"], row["first"], row["second"], row["round"]) for row in rows]
    return {pair.key: Taken(row["label"], row.get("taken", pair.round)) for pair, row in zip(pairs, rows, strict=True)}


def append_labels(file: Path, answers: list[tuple[Pair, Label]], t: int, ids: Mapping[Key, str]) -> None:
    """Add answers that round t learns from; on the disk once it returns. ids: of the questions that have one. Raises
    OSError if the disk is full or cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = [{"id": ids[pair.key]} if pair.key in ids else {} for pair, _ in answers]
    rows = [
        name | asdict(pair) | {"label": label, "taken": t} for name, (pair, label) in zip(names, answers, strict=True)
    ]
    queue.append(file, rows)


def _is_label(row: queue.Row) -> bool:
    texts = all(isinstance(row.get(key), str) for key in ("first", "second")) and isinstance(row.get("round"), int)
    return (
        texts and "prompt" in row and "label" in row and (row["label"] is None or probability(row["label"]) is not None)
    )
