"""Tokens of a CPU second: transformers' generate beside vLLM, with the demo's model, in turns in one run.

    make vllm && OMP_NUM_THREADS=1 .venv/vllm/bin/python benchmarks/generation.py

Responses have their full length, or end at a frequent token: transformers computes such a one to the end of the
longest, vLLM does not. A CPU second is one of the process, all its threads counted. Figures are medians. The first call
of each, in which vLLM compiles, is left out; handing the weights over is timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from r2m.config import Generation, R2MConfig
from r2m.devices import resolve_precision
from r2m.integrations.vllm import VLLM
from r2m.models import smollm2
from r2m.policy.learner import Learner
from r2m.policy.load import load_policy, load_tokenizer

TEXT = "The film opens on a quiet street, and then lets the story of three brothers unfold while the camera lingers. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"prompts": 2, "responses": 8, "prompt-tokens": 64, "new-tokens": 128, "repeats": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "float32"])
    args = parser.parse_args()
    config = resolve_precision(
        R2MConfig(
            policy=str(smollm2()),
            precision=args.precision,
            prompts_per_round=args.prompts,
            num_generations=args.responses,
            generation=Generation(max_prompt_tokens=args.prompt_tokens, max_new_tokens=args.new_tokens),
        )
    )
    policy, tokenizer = load_policy(config), load_tokenizer(config.policy)
    ids = tokenizer(TEXT * args.prompt_tokens)["input_ids"]
    prompt_ids = [ids[7 * i : 7 * i + args.prompt_tokens] for i in range(args.prompts)]
    vllm = VLLM(policy, tokenizer, config)
    learners = {"transformers": Learner(policy, tokenizer, config), "vLLM": Learner(policy, tokenizer, config, vllm)}

    def rate(name: str, ends: list[int]) -> float:
        """Response tokens of a CPU second; `ends` end a response."""
        learner = learners[name]
        learner.config.generation.eos_token_ids = ends
        start, cpu = time.perf_counter(), time.process_time()
        rollout = learner.sample([""] * args.prompts, args.responses, prompt_ids)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        tokens = int(rollout.completion_mask.sum())
        print(f"{name:12} {tokens} tokens, {tokens / cpu:5.1f} a CPU second, {tokens / wall:5.1f} a second", flush=True)
        return tokens / cpu

    frequent = tokenizer.convert_tokens_to_ids("\u0120of")  # one token in forty or so
    for name in learners:
        rate(name, [frequent])
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(args.repeats):
        for lengths, ends in {"full length": [], "ragged": [frequent]}.items():
            for name in learners:
                found.setdefault(lengths, {}).setdefault(name, []).append(rate(name, ends))
    start = time.perf_counter()
    vllm.update(policy)
    print(f"weights handed over in {time.perf_counter() - start:.2f} s")
    for lengths, rates in found.items():
        theirs, ours = (statistics.median(rates[name]) for name in learners)
        print(f"{config.precision}, {lengths}: transformers {theirs:.1f}, vLLM {ours:.1f}: {ours / theirs:.2f} times")


if __name__ == "__main__":
    main()
