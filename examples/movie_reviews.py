"""Data and judge of docs/training.md: movie reviews as files for `r2m`, and a classifier for evaluation.judge.

As a script, writes pairs.jsonl, held_out_pairs.jsonl, test_pairs.jsonl, prompts.jsonl and eval_prompts.jsonl. As a
judge it is a linear classifier, fitted once a process, on reviews that none of these files contains.
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from r2m import load_tokenizer
from r2m.demo.movie_reviews import Splits, fit_judge, load_splits
from r2m.models import smollm2
from r2m.progress import waiting


def splits() -> Splits:
    """The same in every process. Texts are cut after a number of SmolLM2's tokens, whatever the policy."""
    return load_splits(load_tokenizer(str(smollm2())), seed=0, num_pairs=64, prompt_tokens=8, new_tokens=24)


@cache
def classifier() -> Callable[[Sequence[str]], Sequence[float]]:
    return fit_judge(splits().judge_train)


def judge(prompts: list[str], responses: list[str]) -> Sequence[float]:
    """Logits, positive for a positive review."""
    return classifier()([prompt + response for prompt, response in zip(prompts, responses, strict=True)])


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(lines)} lines, the first: {lines[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the five files")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("r2m").setLevel(logging.INFO)  # what it says while it works
    print("reading the reviews", flush=True)  # loading r2m took seconds already
    with waiting("reading the reviews"):
        dealt = splits()
    write(folder / "pairs.jsonl", map(vars, dealt.pairs))
    write(folder / "held_out_pairs.jsonl", map(vars, dealt.validation_pairs[:24]))
    write(folder / "test_pairs.jsonl", map(vars, dealt.test_pairs))
    write(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in dealt.prompts))
    write(folder / "eval_prompts.jsonl", ({"prompt": prompt} for prompt in dealt.eval_prompts[:12]))


if __name__ == "__main__":
    main()
