"""Seconds of a training round, by phase and by what they are spent on.

    python benchmarks/round.py --shape demo
    python benchmarks/round.py --shape 0.5b --rounds 3

Models have random weights: speed does not depend on their values. Every response runs to its full length.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from r2m import R2MRewardModel, R2MTrainer, load_policy
from r2m.config import config_from_dict

# The demo's model, batch and lengths; and Qwen2.5-0.5B's shape, all weights trained.
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "demo": (
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
        ),
        {
            "prompts_per_round": 3, "num_generations": 8, "micro_batch_size": 24,
            "generation": {"max_prompt_tokens": 16, "max_new_tokens": 24},
            "lora": {"rank": 8, "alpha": 16, "top_layers": 8},
            "r2m": {"inner_width": 256},
        },
    ),
    "0.5b": (
        LlamaConfig(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
        ),
        {
            "prompts_per_round": 2, "num_generations": 4, "micro_batch_size": 4,
            "generation": {"max_prompt_tokens": 64, "max_new_tokens": 32},
        },
    ),
}  # fmt: skip

# Method of the trainer or its updater -> what its time is spent on. Time inside another of them is that one's.
PARTS = {
    "_sample": "generation",
    "_embed": "reward model's forward pass",
    "_blank_annotations": "reference's forward pass",
    "_score": "policy's forward pass, scoring",
    "_logits": "policy's forward pass, later epochs",
    "_accumulate": "loss and backward pass",
    "_step_policy": "clipping and optimizer",
    "begin_round": "R2M: absorbing the weights",
    "score": "R2M: rewards of a micro-batch",
    "collect": "R2M: pools and gradients of a micro-batch",
    "step": "R2M: GREBT and optimizer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--rounds", type=int, default=5, help="beside one to warm up")
    parser.add_argument("--feedback", choices=["none", "frozen", "trained"], default="trained")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(arguments.shape, arguments.rounds + 1, arguments.feedback, Path(folder))
        for name, part in PARTS.items():
            clock(trainer, name, part)
        print(f"{arguments.shape}: {describe(trainer)}")
        seconds: list[dict[str, float]] = []
        trainer.sample_metrics = lambda *_: seconds.append(dict(SPENT)) or SPENT.clear() or {}
        rows = trainer.train()
    phases = ["rollout", "annotate", "policy", "reward_model"]
    total = statistics.median(sum(row[f"seconds/{phase}"] for phase in phases) for row in rows[1:])
    print(f"median of {arguments.rounds} rounds: {total:.2f} s")
    for phase in phases:
        print(f"  {statistics.median(row[f'seconds/{phase}'] for row in rows[1:]):8.3f} s  {phase}")
    print("of which")
    for part in PARTS.values():
        spent = statistics.median(row.get(part, 0.0) for row in seconds[1:])
        print(f"  {spent:8.3f} s  {100 * spent / total:5.1f} %  {part}")


def build(shape: str, rounds: int, feedback: str, folder: Path) -> R2MTrainer:
    """A trainer on models of random weights, saved and loaded like any other."""
    architecture, settings = SHAPES[shape]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    # A word for every id: what is sampled is as long for the reward model as for the policy.
    vocabulary = {f"w{i}": i for i in range(architecture.vocab_size) if i != 1} | {"</s>": 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    for name, kind in (("policy", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        architecture.num_labels = 1
        kind.from_config(architecture, dtype=torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    config = config_from_dict(
        settings
        | {
            "policy": str(folder / "policy"),
            "output_dir": str(folder / "run"),
            "rounds": rounds,
            "generation": settings["generation"] | {"eos_token_ids": []},
            "r2m": settings.get("r2m", {}) | {"feedback": feedback},
            "checkpoints": {"every": 0},
        }
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(config, device)
    reward_model = R2MRewardModel.from_pretrained(
        folder / "reward", policy=policy, device=device, inner_width=config.r2m.inner_width
    )
    prompts = ["w0 " * config.generation.max_prompt_tokens] * config.prompts_per_round
    return R2MTrainer(policy, reward_model, tokenizer, list(prompts), config)


def describe(trainer: R2MTrainer) -> str:
    config = trainer.config
    trained = sum(p.numel() for p in trainer.parameters)
    total = sum(p.numel() for p in trainer.policy.parameters())
    return (
        f"{total / 1e6:.0f}M weights, {trained / 1e6:.1f}M trained; {config.prompts_per_round} prompts of "
        f"{config.generation.max_prompt_tokens} tokens x {config.num_generations} responses of "
        f"{config.generation.max_new_tokens}; {config.epochs} epochs; {trainer.device}, "
        f"{torch.get_num_threads()} threads"
    )


SPENT: dict[str, float] = {}
_inside: list[str] = []
_since = [0.0]


def clock(trainer: R2MTrainer, name: str, part: str) -> None:
    """Charge the time of a method to `part`, less that of the clocked methods it calls."""
    owner = trainer if hasattr(trainer, name) else trainer.updater
    method: Callable[..., Any] = getattr(owner, name)

    def charge() -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if _inside:
            SPENT[_inside[-1]] = SPENT.get(_inside[-1], 0.0) + now - _since[0]
        _since[0] = now

    def timed(*args: Any, **keywords: Any) -> Any:
        charge()
        # One function makes every forward pass: what asked for it is what it is spent on.
        _inside.append(_inside[-1] if name == "_logits" and _inside else part)
        try:
            return method(*args, **keywords)
        finally:
            charge()
            _inside.pop()

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
