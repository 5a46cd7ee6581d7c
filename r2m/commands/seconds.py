"""How long a round takes on a GPU of known peaks: a config's FLOPs and bytes over them. Computed, not measured."""

from __future__ import annotations

from typing import NamedTuple

import torch

from r2m.commands.memory import narrow_of, sequences_at_once, share_of
from r2m.commands.sizes import Sizes, backbone_sizes, policy_sizes
from r2m.config import R2MConfig, require_keys
from r2m.devices import resolve_precision


class Gpu(NamedTuple):
    """Peaks of a GPU, per second, by its vendor's data sheet; and its memory, as nvidia-smi reports it."""

    memory: float  # bytes
    flops: float  # of bfloat16 products, dense
    float32: float  # FLOPs, without tensor cores
    reads: float  # bytes of its memory
    link: float  # bytes to other GPUs, in one direction
    host: float  # bytes from host memory


GPUS = {  # the SXM forms, linked by NVLink
    "a100": Gpu(81920 * 2**20, 312e12, 19.5e12, 2.04e12, 300e9, 32e9),
    "h100": Gpu(81559 * 2**20, 989e12, 67e12, 3.35e12, 450e9, 64e9),
    "h200": Gpu(143771 * 2**20, 989e12, 67e12, 4.8e12, 450e9, 64e9),
}

# Assumptions: the share of a peak that is reached, of FLOPs and of bytes, and the seconds of a layer and a token that
# the host takes to launch what transformers' `generate` runs. PyTorch reports 25.5 tokens a second, bound by launches,
# for a plain Llama-7B (32 layers) on an A100 (pytorch.org/blog/accelerating-generative-ai-2). vLLM replays CUDA graphs.
FLOPS_USED, BYTES_USED, LAUNCHES = 0.4, 0.7, 1.2e-3


class Work(NamedTuple):
    """What a part of a phase does. It takes as long as the slowest of these."""

    flops: float = 0  # of bfloat16 products
    float32: float = 0  # FLOPs outside of them
    reads: float = 0  # bytes of the GPU's memory, read or written
    sent: float = 0  # bytes to other GPUs
    host: float = 0  # bytes from host memory
    launches: float = 0  # seconds

    def seconds(self, gpu: Gpu) -> float:
        return max(
            self.flops / gpu.flops / FLOPS_USED,
            self.float32 / gpu.float32 / FLOPS_USED,
            self.reads / gpu.reads / BYTES_USED,
            self.sent / gpu.link / BYTES_USED,
            self.host / gpu.host / BYTES_USED,
            self.launches,
        )


class TimeEstimate(NamedTuple):
    """Seconds of a round."""

    phases: dict[str, float]  # as in metrics.jsonl
    r2m: float  # of them, what takes hidden states and what updates the reward model

    @property
    def round(self) -> float:
        return sum(self.phases.values())


def estimate_seconds(config: R2MConfig, gpu: Gpu, number: int = 1) -> TimeEstimate:
    """Of `number` processes, a GPU each, all linked, if every sequence has its greatest length. A vLLM server is taken
    to have as many of its own.

    Computation and communication are taken to overlap. Not counted: what the host does in between, labels, evaluation
    and checkpoints. Raises what `estimate_memory` does.
    """
    require_keys(config, "policy", "reward_model")
    config.check_processes(number)
    config = share_of(resolve_precision(config), number)
    with torch.device("meta"):
        p, (rm, inner, _) = policy_sizes(config, number if config.placement.shard_policy else 1), backbone_sizes(config)
    place, new, total = config.placement, config.generation.max_new_tokens, config.generation.max_tokens
    sequences = config.prompts_per_round * config.num_generations
    tokens, passes, others = sequences * total, -(-sequences // sequences_at_once(config)), (number - 1) / number
    gathered = narrow_of(config) * p.weights * others * (p.shards > 1)  # by a process for a pass
    forward = _forward(p, tokens, total, sequences * (new + 1))

    embedding = Work(_forward(rm, tokens, total), host=rm.nbytes * place.offload_reward_model)
    scoring = Work(forward, sent=passes * gathered)
    reference = scoring._replace(host=4 * p.weights * place.offload_reference)
    # Backward passes take gradients of activations and, where weights train, of those; and with checkpointing another
    # forward pass. Sharded, they gather the weights again, and sum gradients in float32.
    factor = (3 if config.lora is None else 2) + config.gradient_checkpointing
    averaged = 4 * p.trained * others * (passes if p.shards > 1 else 2 * config.minibatches)
    epoch = [
        Work(factor * forward, sent=2 * passes * gathered + averaged),
        Work(reads=config.minibatches * _ADAMW * p.trained / p.shards),
    ]
    scores, refreshes, updates = _r2m(config, p, rm, inner)
    training = (config.epochs - config.first_epoch) * epoch
    first = [scoring] if config.first_epoch == 0 else epoch
    phases = {
        "rollout": _rollout(config, p, gathered),
        "annotate": [embedding, reference, *first, *scores],
        "policy": [*training, *refreshes],
        "reward_model": updates,
    }
    seconds = {name: sum(work.seconds(gpu) for work in works) for name, works in phases.items()}
    return TimeEstimate(seconds, sum(work.seconds(gpu) for work in [*scores, *refreshes, *updates]))


_ADAMW = 28  # bytes: weight, gradient and two moments are read in float32, all but the gradient written


def _forward(p: Sizes, tokens: int, length: int, rows: int = 0) -> float:
    """FLOPs of a forward pass: products with weights, causal attention, and so many rows of logits."""
    return 2 * (p.used * tokens + p.layers * p.queries * tokens * length + p.vocabulary * p.width * rows)


def _rollout(config: R2MConfig, p: Sizes, gathered: float) -> list[Work]:
    settings, sequences = config.generation, config.prompts_per_round * config.num_generations
    batch, narrow, vllm = min(config.sequences_at_once, sequences), narrow_of(config), settings.engine == "vllm"
    steps = -(-sequences // batch) * settings.max_new_tokens
    cache = batch * (settings.max_prompt_tokens + settings.max_new_tokens / 2) * 2 * p.keys * p.layers  # half grown
    prompts = config.prompts_per_round * settings.max_prompt_tokens
    return [
        Work(_forward(p, prompts, settings.max_prompt_tokens)),
        Work(
            steps * _forward(p, batch, settings.max_tokens, batch),
            # transformers copies the cache for every token: it reads all twice and writes it once.
            reads=steps * (narrow * p.weights + cache * (narrow if vllm else 3 * p.wide)),
            sent=gathered if vllm else steps * gathered,  # vLLM has weights of its own, once a round
            launches=0 if vllm else steps * p.layers * LAUNCHES,
        ),
    ]


def _r2m(config: R2MConfig, p: Sizes, rm: Sizes, inner: int) -> tuple[list[Work], list[Work], list[Work]]:
    """What R2M adds: to the pass that scores, to the last epoch, and the update of the reward model, whose backbone
    runs without it, too."""
    if not config.r2m.attends:
        return [], [], []
    sequences = config.prompts_per_round * config.num_generations
    hidden, widths = sequences * config.generation.max_tokens * p.width, inner * (rm.width + p.width)
    absorbed = Work(float32=2 * sequences * widths, reads=4 * 2 * widths)  # u of every sequence, and g
    read = Work(float32=8 * hidden, reads=p.wide * hidden)  # by a kernel of the pool, once
    updates = [Work(float32=6 * sequences * widths, reads=3 * 4 * 2 * widths), Work(reads=_ADAMW * 2 * widths)]
    return [absorbed, read], [read], updates if config.r2m.trains else []
