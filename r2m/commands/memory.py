"""How much memory a config's run takes on the policy's device: sums of terms that follow from the models' configs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from r2m.batching import Tokens
from r2m.commands.sizes import Sizes, backbone_sizes, policy_sizes
from r2m.config import R2MConfig, require_keys
from r2m.devices import policy_device, resolve_precision
from r2m.integrations.vllm import cache_bytes
from r2m.preferences.store import WAITING

Terms = dict[str, int]  # name -> bytes


@dataclass
class MemoryEstimate:
    """Bytes on the policy's device in a round after the first, if every sequence has its greatest length.

    Beside short prompts more of a budget of tokens are responses, up to all of it: logits then take more.
    """

    parts: Terms  # what lies there throughout, then the most of what comes and goes
    terms: dict[str, Terms]  # of each phase: what lies there at its peak
    reward_model_device: int | None  # the peak on the device of the reward model's backbone, where that is another

    @property
    def phases(self) -> Terms:
        return {phase: _sum(terms) for phase, terms in self.terms.items()}


def estimate_memory(config: R2MConfig, number: int = 1) -> MemoryEstimate:
    """Peaks by part and phase in one of `number` processes, each with a device of its own.

    Phases are those of a run and, for one process, "r2m evaluate": the command. Held-out prompts are taken to be as
    many as are generated at once. The models are made on the meta device: no weights are read, and none are made.
    Not counted: scratch memory inside an operation, and what bitsandbytes unpacks of a quantised layer.

    Raises ValueError for a missing key or a round that cannot be dealt to so many processes, OSError for a model that
    cannot be found, RuntimeError for one that cannot be made on the meta device.
    """
    require_keys(config, "policy", "reward_model")
    config.check_processes(number)
    config = share_of(resolve_precision(config), number)
    place, device, full = config.placement, policy_device(config), config.lora is None
    with torch.device("meta"):
        p, (rm, inner, heads) = policy_sizes(config, number if place.shard_policy else 1), backbone_sizes(config)
    weights = p.nbytes if p.shards == 1 else 4 * p.weights // p.shards
    small, trained, kept = _small_part(config, p, rm, inner, heads)
    started: Terms = {
        "policy weights": weights,
        "reward model backbone": rm.nbytes,
        "R2M part": small,
        # A copy of all weights, or of a saved adapter; a new adapter is switched off instead.
        "reference": weights if full else 4 * p.trained * bool(config.lora and config.lora.adapter),
    }
    copied = number > 1 and p.shards == 1
    if copied:
        started["gradients, averaged"] = 4 * p.trained  # DDP's, which stay
    if config.generation.engine == "vllm" and config.generation.server is None:  # which keeps its own throughout
        started["vLLM weights"] = p.weights * narrow_of(config)
        started["vLLM cache"] = cache_bytes(p.config, config)
    training, scoring = _training(config, p, copied), _scoring(config, p)
    reference = scoring | {"bfloat16 weights": 0}  # autocast keeps no copy of what is frozen
    embedding: Terms = {"one layer": _tokens(config) * _passing(rm, rm.wide)}
    apart = None
    if place.reward_model is not None and not _same(torch.device(place.reward_model), device):
        apart = started["reward model backbone"] + embedding["one layer"]
        started["reward model backbone"], embedding = 0, {}
    elif place.offload_reward_model and device.type != "cpu":
        embedding["backbone, loaded"], started["reward model backbone"] = started["reward model backbone"], 0
    start = dict(started)  # with the reference, wherever that waits
    if place.offload_reference and full and device.type != "cpu":
        reference["reference, loaded"], started["reference"] = started["reference"], 0
    begin: list[Terms] = [embedding if config.evaluation.pairs else {}]
    if p.shards > 1:
        # Blocks come to the device one at a time, before there is a reference; a CPU maps them from their file.
        begin.append({"reference": 0, "block": 4 * max(p.block, p.outside) * (device.type != "cpu")})
        # What lies in no block stays as a pass without gradient has gathered it.
        rest = narrow_of(config) * p.outside
        started["gathered of the reference"] = rest
        embedding = embedding | {"gathered weights": rest * (config.generation.engine != "vllm")}
    throughout = started | {
        "R2M part": small + trained + kept,
        "optimizer state": 8 * p.trained // p.shards,  # AdamW's two moments in float32
    }
    held_out = [*_generation(config, p, 1), embedding, reference, scoring]
    phases: dict[str, tuple[Terms, list[Terms]]] = {
        "start": (start, begin),
        "rollout": (throughout, _generation(config, p, config.num_generations)),
        "annotate": (throughout, [embedding, reference, *(training if config.first_epoch == 1 else [scoring])]),
        "policy": (throughout, training if config.epochs > config.first_epoch else [{}]),
        "reward_model": (throughout, [{}]),  # gradients and moments of the small part lie there throughout
        "evaluation": (throughout, held_out),
        "checkpoint": (throughout, [{"one weight": 8 * p.largest}]),  # checked and, where it is sharded, gathered
    }
    if number == 1:  # the command runs in one
        phases["r2m evaluate"] = started, held_out  # no gradients, no optimizer state
    terms = {name: max((there | moment for moment in moments), key=_sum) for name, (there, moments) in phases.items()}
    most = max(training, key=_sum)
    step = training[-1]
    parts = throughout | step | {"logits": _logits(config, p), "generation cache": held_out[0].get("cache", 0)}
    parts["activations and temporaries"] = _sum(most) - most["gradients"] - parts["logits"]
    return MemoryEstimate(parts, terms, apart)


def share_of(config: R2MConfig, number: int) -> R2MConfig:
    """The config of what one of `number` processes does: its share of the prompts."""
    return dataclasses.replace(config, prompts_per_round=config.prompts_per_round // number)


# ---- the terms ----


def _small_part(config: R2MConfig, p: Sizes, rm: Sizes, inner: int, heads: int) -> tuple[int, int, int]:
    """R2M's trainable part, in float32: its weights, what training it takes, what a round keeps of its sequences."""
    weights = 2 * inner * (rm.width + p.width) + rm.width  # W_q [d, D_rm], W_k, W_v [d, D_p], W_o [D_rm, d], phi [D_rm]
    trained = {"trained": weights, "head": rm.width}.get(config.r2m.feedback, 0)  # with gradient and two moments
    # RTE, W_q RTE, u, its pool and the pool's gradient; ids, positions and masks; three log-probabilities a token.
    vectors = rm.width + (inner + 3 * heads * p.width) * config.r2m.attends
    sequence = 4 * vectors + 20 * _length(config) + 12 * config.generation.max_new_tokens
    asked = config.preferences
    # Of pairs about as much is kept, and made again, as of two sequences.
    labelled = 0 if asked.labeller is None else 2 * (asked.reservoir + asked.per_round + WAITING)
    sequences = config.prompts_per_round * config.num_generations
    return 4 * weights, 12 * trained, sequences * sequence + 4 * labelled * vectors


def _training(config: R2MConfig, p: Sizes, copied: bool) -> list[Terms]:
    """Of a forward and backward pass and of an optimizer's step, the moments that may be the greatest; copied: the step
    takes averaged gradients, which are there already."""
    narrow, tokens, logits = narrow_of(config), _tokens(config), _logits(config, p)
    layer, again = tokens * _kept(config, p), 0
    kept, copies = p.kept * layer, _copies(config, p)
    if config.gradient_checkpointing:  # the inputs of all layers, and one layer at a time with its own copies
        kept, again = p.kept * tokens * p.width * p.wide, layer
    several = config.prompts_per_round * config.num_generations // config.minibatches > sequences_at_once(config)
    # The gradients are of the passes before: those of this one come as its activations go.
    held: Terms = {"gradients": 4 * p.trained * several // p.shards, "activations": kept}
    loss, backward = held | {"logits": 2 * logits}, held | ({} if again and p.shards == 1 else copies)
    rows = 3 * 4 * p.vocabulary * min(128, _rows(config))  # policy_loss makes float32 of 128 rows at a time
    head = p.head * (4 if narrow == 4 else 6)  # its gradient in float32, beside that in bfloat16
    # Sharded, those of a block, and at last those of the rest, are there whole, and in float32 as they are summed.
    whole = (narrow + 4) * (p.shards > 1)
    summed: Terms = {"gradients": 0 if copied else 4 * p.trained // p.shards}
    return [
        loss | copies,  # the logits of the pass before are there, too
        backward | {"logits": 3 * logits, "rows of logits": rows},  # with their gradient, in parts and in one piece
        backward
        | {"logits": logits, "gradient of the head": head, "one layer": again + tokens * p.up * narrow}
        | {"gradients of a block": whole * p.block},
        summed | {"gradients of embedding and head": whole * p.outside},
        summed,
    ]


def _kept(config: R2MConfig, p: Sizes) -> int:
    """Bytes that one layer keeps of one token for the backward pass."""
    narrow = narrow_of(config)
    # What linear layers read: autocast copies it for each of them; in float32 attention and MLP have one each.
    inputs = p.readers if narrow == 2 else min(2, p.readers)
    # A row of the mask, in numbers; eager attention has each head's probabilities, in float32 and as they multiply.
    eager = p.heads * (4 if narrow == 4 else 6)
    attention = config.placement.attention or p.attention
    row = 0 if "flash" in attention else {"eager": eager}.get(attention, narrow)
    return (
        4 * p.norms  # their inputs in float32; these normalised, too, where an RMS norm's weight trains
        + narrow * p.width * inputs
        + narrow * 4 * p.queries  # queries; keys and values, repeated for every head; the result
        + row * _length(config)
        + narrow * 2 * p.up  # gate and up as they are, activation and product
        + 3 * 4 * p.elementary  # of gelu_new: tanh, 1 + tanh and x / 2
    )


def _scoring(config: R2MConfig, p: Sizes) -> Terms:
    """A pass without gradient, beside the logits of the one before."""
    one_layer = _tokens(config) * _passing(p, narrow_of(config))
    return _copies(config, p) | {"one layer": one_layer, "logits": 2 * _logits(config, p)}


def _generation(config: R2MConfig, p: Sizes, responses: int) -> list[Terms]:
    """Of generation, so many responses to a prompt, the moments that may be the greatest."""
    if config.generation.engine == "vllm":
        return [{}]
    narrow, total = narrow_of(config), config.prompts_per_round * config.num_generations
    batch = min(config.sequences_at_once, total)
    prompts = max(1, batch // responses) * config.generation.max_prompt_tokens
    tokens = batch * (_length(config) - 1)  # the last one is never read
    stored = 2 * p.keys * p.wide  # keys and values of a token: rotation makes float32 of both where weights are
    # In the last step one layer's, repeated for every head of the queries, and narrowed.
    repeated = 2 * p.queries * (p.wide * (p.queries > p.keys) + narrow * (p.wide > narrow))
    copies, cache = _copies(config, p), tokens * stored * p.layers
    return [
        copies | {"cache": cache, "one layer": tokens * repeated},
        copies | {"cache": cache, "logits": batch * p.vocabulary * (narrow + 16)},  # and four times in float32
        copies | {"cache": prompts * stored * p.layers, "one layer": prompts * _passing(p, narrow)},  # each prompt once
    ]


def _passing(p: Sizes, narrow: int) -> int:
    """Bytes of one token in a layer without gradient: hidden states, and what the MLP makes of them."""
    return 3 * p.width * p.wide + 2 * p.up * narrow


def _copies(config: R2MConfig, p: Sizes) -> Terms:
    """What a pass multiplies by: autocast makes a bfloat16 copy of every trained weight that multiplies, and keeps it
    to the end of its region. Of a sharded model two blocks are gathered at a time, and the rest from the start on."""
    if p.shards > 1:
        return {"gathered weights": narrow_of(config) * (2 * p.block + p.outside)}
    return {"bfloat16 weights": 2 * p.multiplying if config.precision == "bf16" else 0}


def _logits(config: R2MConfig, p: Sizes) -> int:
    return _rows(config) * p.vocabulary * narrow_of(config)


def _rows(config: R2MConfig) -> int:
    """Rows of logits in a pass: response tokens and the one before them."""
    return sequences_at_once(config) * (config.generation.max_new_tokens + 1)


def _tokens(config: R2MConfig) -> int:
    """Tokens in a micro-batch."""
    return sequences_at_once(config) * _length(config)


def sequences_at_once(config: R2MConfig) -> int:
    """Sequences in a micro-batch, each of the greatest length."""
    size, length = config.batch_size, _length(config)
    if isinstance(size, Tokens):
        count = max(1, size.number // length)
        size = count - count % config.kept_together
    return min(size, config.prompts_per_round * config.num_generations // config.minibatches)


def _length(config: R2MConfig) -> int:
    return config.generation.max_tokens


def narrow_of(config: R2MConfig) -> int:
    """Bytes of a number in a product."""
    return 2 if config.precision == "bf16" else 4


def _sum(terms: Terms) -> int:
    return sum(terms.values())


def _same(a: torch.device, b: torch.device) -> bool:
    return (a.type, a.index or 0) == (b.type, b.index or 0)
