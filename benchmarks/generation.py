"""Tokens of a CPU second: transformers' generate beside vLLM, with the demo's model, in turns in one run.

    make vllm && OMP_NUM_THREADS=1 .venv/vllm/bin/python benchmarks/generation.py

Every response has its full length. A CPU second is one of the process, all its threads counted; handing the weights
over is timed apart. The first call of each, in which vLLM compiles, is left out.
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
    for name, value in {"prompts": 2, "responses": 8, "prompt-tokens": 64, "new-tokens": 128, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "float32"])
    args = parser.parse_args()
    config = resolve_precision(
        R2MConfig(
            policy=str(smollm2()),
            precision=args.precision,
            prompts_per_round=args.prompts,
            num_generations=args.responses,
            generation=Generation(
                max_prompt_tokens=args.prompt_tokens, max_new_tokens=args.new_tokens, eos_token_ids=[]
            ),
        )
    )
    policy, tokenizer = load_policy(config), load_tokenizer(config.policy)
    ids = tokenizer(TEXT * args.prompt_tokens)["input_ids"]
    prompt_ids = [ids[7 * i : 7 * i + args.prompt_tokens] for i in range(args.prompts)]
    vllm = VLLM(policy, tokenizer, config)
    learners = {"transformers": Learner(policy, tokenizer, config), "vllm": Learner(policy, tokenizer, config, vllm)}
    figures: dict[str, list[float]] = {name: [] for name in learners}
    for repeat in range(args.repeats + 1):
        for name, learner in learners.items():
            start, cpu = time.perf_counter(), time.process_time()
            rollout = learner.sample([""] * args.prompts, args.responses, prompt_ids)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            tokens = int(rollout.completion_mask.sum())
            print(f"{name:12} {tokens / cpu:5.1f} tokens a CPU second, {tokens / wall:5.1f} a second", flush=True)
            if repeat:
                figures[name].append(tokens / cpu)
    start = time.perf_counter()
    vllm.update(policy)
    print(f"weights handed over in {time.perf_counter() - start:.2f} s")
    medians = {name: statistics.median(values) for name, values in figures.items()}
    ratio = medians["vllm"] / medians["transformers"]
    found = " and ".join(f"{value:.1f} by {name}" for name, value in medians.items())
    print(f"{config.precision}, medians of {args.repeats}: {found} a CPU second: {ratio:.2f} times as many")


if __name__ == "__main__":
    main()
