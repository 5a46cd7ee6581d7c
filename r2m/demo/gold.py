"""Gold: what a continued review is worth, by judges that nothing trained sees. Labels are drawn from it.

sentiment   logit of a linear classifier over words, fitted on reviews (`r2m.demo.movie_reviews.fit_judge`)
fluency     log-probability a word of the response has in a trigram model of people's reviews, nats, mean
variety     share of different ones among the response's word pairs

Each is standardised by its mean over samples of the start policy and its deviation inside a prompt; gold is the sum of
the three over sqrt(3), a deviation of about 1 where they are independent.
"""

from __future__ import annotations

import itertools
import math
import pickle
import random
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn

from r2m.demo.movie_reviews import PROMPT, Review, Scorer, fit_judge
from r2m.models import cached

PARTS = ("sentiment", "fluency", "variety")
REVIEWS = 14_000  # that the trigram model reads: enough for every word of a sample to be known, and 200 MB
FILE = "judges.pickle"
# Deviations beyond which a part counts no more. Labels see further than the measure that is reported, so that a
# labeller still tells a bad text from a worse one after the policy has collapsed.
CLIP, CLIP_OF_LABELS = 4.0, 12.0

_WORD = re.compile(r"[a-z']+|[0-9]+|[^\sa-z0-9]")


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


class Trigrams:
    """Interpolated word trigrams with Witten-Bell's weights."""

    def __init__(self, texts: Sequence[str]):
        read = [words(text) for text in texts]
        self.vocabulary = {word: i for i, word in enumerate(sorted({word for text in read for word in text}), 1)}
        columns = np.concatenate([self._columns(text) for text in read])  # [N, 3]
        self.orders = []  # n-grams and their numbers; contexts, how many words and how many different ones followed
        for order in range(3):
            grams, numbers = np.unique(self._key(columns[:, 2 - order :]), return_counts=True)
            contexts, first, different = np.unique(grams // self._base, return_index=True, return_counts=True)
            self.orders.append((grams, numbers, contexts, np.add.reduceat(numbers, first), different))

    @property
    def _base(self) -> int:
        return len(self.vocabulary) + 2  # 0: the start of a text; the last one: a word that no review has

    def _columns(self, text: Sequence[str]) -> np.ndarray:
        """Every word with the two before it: [len(text), 3]."""
        ids = np.array([0, 0, *(self.vocabulary.get(word, self._base - 1) for word in text)], np.int64)
        return np.stack([ids[:-2], ids[1:-1], ids[2:]], -1)

    def _key(self, columns: np.ndarray) -> np.ndarray:
        """The words [N, n] as one number [N]; without the last it is `key // base`."""
        return columns @ self._base ** np.arange(columns.shape[1])[::-1]

    def mean_log_probability(self, text: str, skipped: int) -> float:
        """Of the words of `text` behind the first `skipped`, in nats; of no words that of an unknown one."""
        columns = self._columns(words(text))[skipped:]
        if not len(columns):
            return -math.log(self._base)
        probability = np.full(len(columns), 1 / self._base)
        for order, (grams, numbers, contexts, followers, different) in enumerate(self.orders):
            keys = self._key(columns[:, 2 - order :])
            number, kinds = _at(grams, numbers, keys), _at(contexts, different, keys // self._base)
            seen = _at(contexts, followers, keys // self._base)
            interpolated = (number + kinds * probability) / np.maximum(seen + kinds, 1)
            probability = np.where(kinds > 0, interpolated, probability)
        return float(np.log(probability).mean())


def _at(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of the wanted keys, 0 where a key is not there. keys: sorted."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


class Standard(NamedTuple):
    """Of each part, over samples of the start policy: its mean, and its deviation inside a prompt."""

    mean: np.ndarray  # [3]
    deviation: np.ndarray  # [3]

    def __call__(self, parts: np.ndarray, clip: float = CLIP) -> np.ndarray:
        """Parts [..., 3] in these deviations."""
        return np.clip((parts - self.mean) / self.deviation, -clip, clip)


class Judges(NamedTuple):
    sentiment: Scorer
    trigrams: Trigrams

    def parts(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """[N, 3], in the order of `PARTS`. Line breaks are spaces."""
        texts = [" ".join(f"{prompt}{response}".split()) for prompt, response in zip(prompts, responses, strict=True)]
        skipped = [len(words(prompt.removeprefix(PROMPT))) for prompt in prompts]
        fluency = [
            self.trigrams.mean_log_probability(text.removeprefix(PROMPT), number)
            for text, number in zip(texts, skipped, strict=True)
        ]
        return np.stack([self.sentiment(texts), fluency, [variety(response) for response in responses]], -1)


def load_judges(reviews: Sequence[Review]) -> Judges:
    """Fitted on these reviews at the first call, which takes a minute and a gigabyte; kept in the cache."""
    key = sha256(
        repr([__name__, sklearn.__version__, REVIEWS, [review.text for review in reviews]]).encode()
    ).hexdigest()[:16]
    folder = cached(
        f"gold-{key}", lambda folder: _fit(folder, reviews), megabytes=400, action="fitting the gold judges"
    )
    return pickle.loads((folder / FILE).read_bytes())


def _fit(folder: Path, reviews: Sequence[Review]) -> None:
    texts = [review.text for review in reviews]
    random.Random(0).shuffle(texts)
    judges = Judges(fit_judge(reviews), Trigrams(texts[:REVIEWS]))
    (folder / FILE).write_bytes(pickle.dumps(judges))


def gold(standardised: np.ndarray) -> np.ndarray:
    """[...] of parts [..., 3] in deviations of the start."""
    return standardised.sum(-1) / math.sqrt(len(PARTS))


def variety(response: str) -> float:
    pairs = list(itertools.pairwise(response.casefold().split()))
    return len(set(pairs)) / max(len(pairs), 1)


def standard(parts: np.ndarray) -> Standard:
    """Of the parts [prompts, samples, 3] of the start policy's samples."""
    return Standard(parts.mean((0, 1)), np.sqrt(parts.var(1, ddof=1).mean(0)))
