"""One training round with R2M beside one of plain RLOO by the same trainer: seconds and memory.

    python benchmarks/round.py --shape demo
    python benchmarks/round.py --shape 0.5b --rounds 3
    python benchmarks/round.py --shape reviews

Models have random weights: speed does not depend on their values. Every response runs to its full length. With
`--shape reviews` padding is compared instead: responses are given, with lengths of reviews. Rounds whose passes take 8
sequences in the order of the samples, each as wide as the round, stand beside rounds of the trainer as it is.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from r2m import R2MConfig, R2MRewardModel, R2MTrainer
from r2m.commands.doctor import free_memory
from r2m.config import config_from_dict
from r2m.devices import compute_dtype, resolve_precision
from r2m.method.reward_model import RewardModelConfig
from r2m.policy.generate import GenerateFn
from r2m.policy.load import add_adapter
from r2m.policy.rollout import MicroBatch, Part, Rollout
from r2m_kernels.bench.measure import MemoryTracker, release, summarize
from r2m_kernels.bench.results import OWN, Row, device_name, format_shape

# Policy and reward model, and the keys of the run: a toy, the demo, the shapes of Qwen2.5-0.5B and Qwen2.5-3B, of
# which all weights are trained, and a small model for long samples.
SHAPES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "tiny": (
        {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        {
            "prompts_per_round": 2, "num_generations": 4, "micro_batch_size": 4,
            "generation": {"max_prompt_tokens": 16, "max_new_tokens": 8},
            "r2m": {"inner_width": 64},
        },
    ),
    "demo": (
        {
            "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3,
        },
        {
            "prompts_per_round": 3, "num_generations": 8, "micro_batch_size": 24,
            "generation": {"max_prompt_tokens": 16, "max_new_tokens": 24},
            "lora": {"rank": 8, "alpha": 16, "top_layers": 8},
            "r2m": {"inner_width": 256},
        },
    ),
    "0.5b": (
        {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2,
        },
        {
            "prompts_per_round": 2, "num_generations": 4, "micro_batch_size": 4,
            "generation": {"max_prompt_tokens": 64, "max_new_tokens": 32},
        },
    ),
    "3b": (
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2,
        },
        {
            "prompts_per_round": 4, "num_generations": 8, "micro_batch_size": 8, "gradient_checkpointing": True,
            "generation": {"max_prompt_tokens": 256, "max_new_tokens": 256},
        },
    ),
    "reviews": (
        {
            "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 4,
        },
        {
            "prompts_per_round": 4, "num_generations": 8,
            "generation": {"max_prompt_tokens": 512, "max_new_tokens": 512},
            "r2m": {"inner_width": 128},
        },
    ),
}  # fmt: skip

# What a CPU would take hours for.
ON_A_GPU: dict[str, dict[str, Any]] = {
    "0.5b": {
        "prompts_per_round": 8, "num_generations": 8, "micro_batch_size": 16,
        "generation": {"max_prompt_tokens": 256, "max_new_tokens": 256},
    },
}  # fmt: skip

PROVIDERS = {"none": "RLOO", "trained": "RLOO + R2M"}  # by r2m.feedback
DTYPES = {"bf16": "bfloat16", "float32": "float32"}  # as a row names them
PHASES = ("rollout", "annotate", "policy", "reward_model")

# Method of the trainer or of what it has -> what its time is spent on. Time inside another of them is that one's.
PARTS = {
    "learner.sample": "generation",
    "scorer.embed": "reward model's forward pass",
    "scorer.prepare": "reference's forward pass",
    "run_epoch": "policy's forward passes",
    "learner.backward": "loss and backward pass",
    "learner.step": "clipping and optimizer",
    "annotate": "advantages and statistics",
    "updater.begin_round": OWN + "absorbing the weights",
    "updater.score": OWN + "rewards of a micro-batch",
    "updater.collect": OWN + "pools and gradients of a micro-batch",
    "updater.alignment": OWN + "correlation with the initial rewards",
    "updater.step": OWN + "GREBT and optimizer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--rounds", type=int, default=5, help="timed ones; those to warm up come before")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.shape == "reviews":
        print(f"reviews on {device_name(device)}")
        print(padding_table(measure_padding(device, arguments.rounds)))
        return
    plain, ours = (
        measure_round(arguments.shape, feedback, device=device, rounds=arguments.rounds) for feedback in PROVIDERS
    )
    print(f"{arguments.shape} on {device_name(device)}: {format_shape(plain.shape)}")
    print(side_by_side(plain, ours))


def measure_round(shape: str, feedback: str, *, device: torch.device, rounds: int) -> Row:
    """Seconds of a round of `shape`, from `rounds` of them (in Row.parts medians by PHASES and by PARTS), and its peak
    memory, everything included: weights, gradients, optimizer states, activations.

    feedback: "none", plain RLOO, or "trained", RLOO with R2M.

    Peak memory is that of a round after the first, when optimizer states exist: on a GPU the allocator's, in the timed
    rounds; on a CPU the bytes of all live tensors, in a round of its own before them. What lies there throughout a
    round is compared with the free memory first: if it does not fit, the row says so and nothing is built. Models are
    freed. Raises ValueError for rounds < 1, KeyError for a shape or feedback that is not listed above.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    config = run_config(shape, feedback, device, rounds=rounds + 2)  # before them, one or two to warm up
    policy = make_policy(shape, config, torch.device("meta"))
    trained = [p for p in policy.parameters() if p.requires_grad]
    sizes = {
        "n": config.prompts_per_round,
        "K": config.num_generations,
        "S_prompt": config.generation.max_prompt_tokens,
        "S_response": config.generation.max_new_tokens,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "trained": sum(p.numel() for p in trained),
    }
    row = Row("round", "training_round", "round", shape, PROVIDERS[feedback], DTYPES[config.precision], sizes)
    # Policy and reference, which an adapter does without; gradients and AdamW's two moments; the reward model in
    # the same precision. Activations come on top.
    needed = (1 if config.lora else 2) * sum(p.nbytes for p in policy.parameters())
    needed += 3 * sum(p.nbytes for p in trained) + compute_dtype(device).itemsize * sizes["parameters"]
    free = free_memory(device)
    if needed > free:
        row.status = f"cannot run: needs {needed / 1e9:.1f} GB, this device has {free / 1e9:.1f} GB free"
        return row
    try:
        _fill_in(row, config, device, rounds)
    except torch.OutOfMemoryError:
        row.status = "out of memory"
    finally:
        release(device)
    return row


def _fill_in(row: Row, config: R2MConfig, device: torch.device, rounds: int) -> None:
    if device.type == "cpu":
        with MemoryTracker() as tracker:
            trainer = build(row.case, config, device)
            trainer.round(1)
            _, row.peak_bytes = tracker.peak_of(lambda: trainer.round(2))
    else:
        trainer = build(row.case, config, device)
        trainer.round(1)
    spent = clock(trainer)
    measured = [trainer.round(t)[0] | spent() for t in range(3, rounds + 3)]
    if device.type != "cpu":
        row.peak_bytes = int(max(m[f"memory/{name}"] for m in measured for name in PHASES) * 2**20)
    totals = [sum(m[f"seconds/{name}"] for name in PHASES) for m in measured]
    half = rounds // 2
    summarize(row, *([totals[:half], totals[half:]] if half else [totals]))
    keys = {name: f"seconds/{name}" for name in PHASES} | {part: part for part in PARTS.values()}
    row.parts = {name: statistics.median(m[key] for m in measured) for name, key in keys.items()}


def clock(trainer: R2MTrainer) -> Callable[[], dict[str, float]]:
    """Charge time to PARTS from now on; what is returned gives, after each round, the seconds of every part in it.

    On a GPU the borders of parts are events in its stream. Nothing waits for them, so a round takes as long as without
    a clock; a part gets the time in which the GPU worked for it or had nothing else to do.
    """
    on_gpu = trainer.learner.device.type == "cuda"
    borders: list[tuple[Any, str]] = []  # when, and what begins
    inside = [""]

    def border() -> None:
        if on_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(trainer.learner.device))
        else:
            now = time.perf_counter()
        borders.append((now, inside[-1]))

    def clocked(method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            inside.append(part)
            border()
            try:
                return method(*args, **keywords)
            finally:
                inside.pop()
                border()

        return timed

    def spent() -> dict[str, float]:
        seconds = dict.fromkeys(["", *PARTS.values()], 0.0)
        for (start, part), (end, _) in pairwise(borders):
            seconds[part] += start.elapsed_time(end) / 1e3 if on_gpu else end - start
        borders.clear()
        del seconds[""]  # between the parts
        return seconds

    for name, part in PARTS.items():
        *owners, method = name.split(".")
        owner = functools.reduce(getattr, owners, trainer)
        setattr(owner, method, clocked(getattr(owner, method), part))
    return spent


def run_config(shape: str, feedback: str, device: torch.device, *, rounds: int) -> R2MConfig:
    settings = SHAPES[shape][1] | (ON_A_GPU.get(shape, {}) if device.type == "cuda" else {})
    # Plain RLOO has no cross-attention: here, next to none.
    width = {"inner_width": 1} if feedback == "none" else {}
    config = config_from_dict(
        settings
        | {
            "rounds": rounds,
            "generation": settings["generation"] | {"eos_token_ids": []},
            "r2m": settings.get("r2m", {}) | {"feedback": feedback} | width,
        }
    )
    return resolve_precision(config, device)


# ---- padding ----


def measure_padding(device: torch.device, rounds: int, shape: str = "reviews") -> dict[str, list[dict[str, float]]]:
    """Rows of metrics of `rounds` rounds on the same samples, padded and trimmed: in turn, after one to warm up."""
    config = run_config(shape, "trained", device, rounds=rounds + 1)
    limits = config.generation
    prompts = ["w0 " * review_length(random.Random(i), limits.max_prompt_tokens) for i in range(64)]

    def respond(prompt_ids: list[list[int]], count: int) -> list[list[int]]:
        rng = random.Random(sum(map(len, prompt_ids)))
        lengths = [review_length(rng, limits.max_new_tokens) for _ in range(len(prompt_ids) * count)]
        return [[rng.randrange(2, 512) for _ in range(length)] for length in lengths]

    trainers = {name: build(shape, config, device, prompts, respond) for name in ("padded", "trimmed")}
    _pad(trainers["padded"])
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for t in range(1, rounds + 2):
        for name, trainer in trainers.items():
            rows[name].append(trainer.round(t)[0])
    return {name: measured[1:] for name, measured in rows.items()}


def review_length(rng: random.Random, most: int) -> int:
    """Tokens of a review: log-normal, cut."""
    return min(most, max(2, int(rng.lognormvariate(-1.41, 0.75) * most)))


def _pad(trainer: R2MTrainer) -> None:
    """Passes of 8 sequences in the order of the samples, as wide as the round; the backbone's, as the longest of 8."""

    def minibatches(rollout: Rollout) -> list[list[MicroBatch]]:
        return [[[_padded(rollout, slice(i, i + 8))] for i in range(0, len(rollout.prompts), 8)]]

    def embed_tokens(rows: list[list[int]], **_: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([trainer.reward_model.run_backbone(rows[i : i + 8]) for i in range(0, len(rows), 8)])

    trainer.learner.minibatches, trainer.reward_model.embed_tokens = minibatches, embed_tokens  # type: ignore


def _padded(rollout: Rollout, rows: slice) -> Part:
    mask = rollout.completion_mask[rows]
    width = mask.shape[1]
    return Part(
        rows=torch.arange(len(rollout.prompts), device=mask.device)[rows],
        input_ids=rollout.input_ids[rows],
        attention_mask=rollout.attention_mask[rows],
        position_ids=rollout.position_ids[rows],
        feedback_mask=rollout.feedback_mask[rows],
        response=width,
        completion_mask=mask,
        o_token=torch.arange(width, device=mask.device).expand(len(mask), -1),
    )


def padding_table(rows: dict[str, list[dict[str, float]]]) -> str:
    def median(name: str, key: str) -> float:
        return statistics.median(row[key] for row in rows[name])

    def total(row: dict[str, float]) -> float:
        return sum(row[f"seconds/{phase}"] for phase in PHASES)

    seconds = {name: statistics.median(map(total, measured)) for name, measured in rows.items()}
    ratios = [total(a) / total(b) for a, b in zip(rows["padded"], rows["trimmed"], strict=True)]
    lines = [
        ("", "padded", "trimmed"),
        ("a round", *(f"{seconds[name]:.3f} s" for name in rows)),
        *((f"  {phase}", *(f"{median(name, f'seconds/{phase}'):.3f} s" for name in rows)) for phase in PHASES),
        ("tokens of the samples", *(f"{median(name, 'tokens/real'):.0f}" for name in rows)),
        ("tokens of a pass over them", *(f"{median(name, 'tokens/computed'):.0f}" for name in rows)),
        ("computed / real", *(f"{median(name, 'tokens/computed') / median(name, 'tokens/real'):.3f}" for name in rows)),
    ]
    return "\n".join(
        [f"{name:<30}{first:>12}{second:>12}".rstrip() for name, first, second in lines]
        + [f"padded / trimmed, round by round: {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"]
    )


def build(
    shape: str,
    config: R2MConfig,
    device: torch.device,
    prompts: list[str] | None = None,
    generator: GenerateFn | None = None,
) -> R2MTrainer:
    """A trainer on models of random weights. prompts: by default each of the greatest length."""
    torch.manual_seed(0)
    architecture = _architecture(shape)
    # A word for every id: what is sampled is as long for the reward model as for the policy.
    vocabulary = {f"w{i}": i for i in range(architecture.vocab_size) if i != 1} | {"</s>": 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    with device:
        classifier = AutoModelForSequenceClassification.from_config(architecture, dtype=compute_dtype(device))
    reward_model = R2MRewardModel(
        classifier,
        tokenizer,
        RewardModelConfig(
            backbone=shape,
            backbone_revision=None,
            policy=shape,
            policy_revision=None,
            policy_width=architecture.hidden_size,
            inner_width=config.r2m.inner_width,
            num_heads=config.r2m.num_heads,
            floor=config.r2m.floor,
            standardize=config.r2m.standardize,
            rte_token="last",
            suffix="",
            max_length=architecture.max_position_embeddings,
        ),
    )
    prompts = prompts or ["w0 " * config.generation.max_prompt_tokens] * config.prompts_per_round
    policy = make_policy(shape, config, device)
    return R2MTrainer(policy, reward_model, tokenizer, list(prompts), config, generator=generator)


def make_policy(shape: str, config: R2MConfig, device: torch.device) -> nn.Module:
    """As `r2m.load_policy`, without a checkpoint."""
    with device:
        dtype = torch.bfloat16 if config.lora and config.precision == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_config(_architecture(shape), dtype=dtype)
        return add_adapter(model, config.lora) if config.lora else model


def _architecture(shape: str) -> LlamaConfig:
    return LlamaConfig(**SHAPES[shape][0], tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, num_labels=1)


def side_by_side(plain: Row, ours: Row) -> str:
    """Both arms' seconds by phase and part and peak memory, and R2M's share of either, as a table in plain text."""
    rows = (plain, ours)
    for row in rows:
        if row.status != "ok":
            return f"{row.provider}: {row.status}"

    def seconds(names: Iterable[str]) -> list[tuple[str, ...]]:
        return [(f"  {name}", *(f"{row.parts[name]:.3f} s" for row in rows)) for name in names]

    lines = [
        ("", *(row.provider for row in rows)),
        ("the round", *(f"{row.median:.3f} s" for row in rows)),
        ("by phase", "", ""),
        *seconds(PHASES),
        ("by what it is spent on", "", ""),
        *seconds(PARTS.values()),
        ("peak memory", *(f"{row.peak_bytes / 1e9:.3f} GB" for row in rows)),
    ]
    time_share = ours.own_seconds / ours.median
    memory_share = ours.peak_bytes / plain.peak_bytes - 1
    return "\n".join(
        [f"{name:<46}{first:>12}{second:>14}".rstrip() for name, first, second in lines]
        + [
            f"R2M's own parts: {time_share:.2%} of its round (aim: under 1 %; the paper: 2.3 %)",
            f"R2M's memory: {memory_share:+.2%} (aim: under 2 %; the paper: 1.8 %)",
        ]
    )


if __name__ == "__main__":
    main()
