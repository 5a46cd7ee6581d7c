"""How much memory a config's run takes on the policy's device, found by running a round on tensors without data."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import InfNanRemoveLogitsProcessor, TemperatureLogitsWarper

from r2m.config import Placement, R2MConfig, require_keys
from r2m.devices import compute_dtype, policy_device, resolve_precision
from r2m.method.reward_model import R2MRewardModel, RewardModelConfig, hidden_width, saved_config
from r2m.method.updater import R2MUpdater
from r2m.models import check_no_adapter, sequence_classifier
from r2m.policy.load import add_adapter
from r2m.method.hidden_states import causal_lm
from r2m.policy.generate import generate
from r2m.policy.rollout import Annotations, Rollout, collate, sample
from r2m.trainer import R2MTrainer

T = TypeVar("T")

_WORD = "a"  # the one token of the texts below


@dataclass
class MemoryEstimate:
    """Bytes on the policy's device in a round after the first, if every sequence has its greatest length."""

    parts: dict[str, int]  # what lies there throughout, then the most of what comes and goes
    phases: dict[str, int]  # the peak of each phase of R2MTrainer.train, everything included
    reward_model_device: int | None  # the peak on the device of the reward model's backbone, where that is another


class MemoryTracker(TorchDispatchMode):
    """Context manager that counts the bytes of the storages which operations inside it make, while they live.

    live: now; peak: the most since it was last set. Older storages count from `add` on. Scratch memory inside an
    operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.shift(self._sizes[key])
            weakref.finalize(storage, self._forget, key)

    def shift(self, size: int) -> None:
        """Count `size` bytes more, or fewer."""
        self.live += size
        self.peak = max(self.peak, self.live)

    def peak_of(self, function: Callable[[], T]) -> tuple[T, int]:
        """What `function` returns, and the most bytes alive meanwhile."""
        self.peak = self.live
        return function(), self.peak

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result


def estimate_memory(config: R2MConfig) -> MemoryEstimate:
    """Peaks by part and phase, from the models' configs alone: no weights are read, and none are made.

    The trainer's own phases run on fake tensors, with two micro-batches in a pass; what it keeps of the round's other
    sequences is added. Fake tensors are on the CPU whatever the device, so fused attention is counted as PyTorch's
    kernel there keeps it, for flash_attention_2 too. A quantised backbone is counted without the weights that
    bitsandbytes unpacks one layer at a time.

    Raises ValueError for a missing key, OSError for a model that cannot be found, RuntimeError for one whose operations
    do not run on fake tensors, such as experts in float32.
    """
    require_keys(config, "policy", "reward_model")
    config = resolve_precision(config)
    tracker, parts, elsewhere = MemoryTracker(), dict[str, int](), list[int]()
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies of fake tensors, and of statistics over few sequences
        stack.enter_context(_FakeTensors(trained_adapter=config.lora is not None and config.lora.adapter is not None))
        # Module.to cannot replace fake parameters. All are made where, and as wide as, they are needed.
        stack.enter_context(patch.object(nn.Module, "_apply", lambda self, function, recurse=True: self))
        stack.enter_context(patch.object(FakeTensor, "__deepcopy__", _copy_fake))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(tracker)
        trainer = _trainer(config, tracker, parts)
        _move(config, tracker, parts, trainer, stack, elsewhere)
        phases = _run_round(config, tracker, parts, trainer)
    return MemoryEstimate(parts, phases, max(elsewhere, default=None))


def _trainer(config: R2MConfig, tracker: MemoryTracker, parts: dict[str, int]) -> R2MTrainer:
    """A trainer for a short round as it is after a first one; enters what lies there throughout in `parts`."""

    def made(part: str, make: Callable[[], T]) -> T:
        before = tracker.live
        result = make()
        parts[part] = parts.get(part, 0) + tracker.live - before
        return result

    policy = made("policy weights", lambda: _policy(config))
    settings = _reward_config(config, hidden_width(policy))
    classifier = made("reward model backbone", lambda: _classifier(config, settings, tracker))
    tokenizer, short = _tokenizer(), _short_round(config)
    reward_model = made("R2M part", lambda: R2MRewardModel(classifier, tokenizer, settings))
    trainer = made(
        "reference",
        lambda: R2MTrainer(
            policy,
            reward_model,
            tokenizer,
            [f"{_WORD} " * config.generation.max_prompt_tokens],
            short,
        ),
    )
    parts["gradients"] = sum(p.nbytes for p in trainer.parameters)
    for part, optimizer, steps in (
        ("optimizer state", trainer.optimizer, True),
        ("R2M part", trainer.updater.optimizer, config.r2m.trains),
    ):
        if steps:
            made(part, partial(_first_step, optimizer))
    return trainer


def _move(
    config: R2MConfig,
    tracker: MemoryTracker,
    parts: dict[str, int],
    trainer: R2MTrainer,
    stack: ExitStack,
    elsewhere: list[int],
) -> None:
    """Count backbone and reference where `config.placement` has them; the backbone's peaks on a device of its own go to
    `elsewhere`."""
    place, device = config.placement, policy_device(config)

    def takes_away(part: str) -> int:
        size, parts[part] = parts[part], 0
        tracker.shift(-size)
        return size

    meanwhile: Any = None
    if place.reward_model is not None and not _same(torch.device(place.reward_model), device):
        meanwhile = _elsewhere(tracker, takes_away("reward model backbone"), elsewhere)
    elif place.offload_reward_model and device.type != "cpu":
        meanwhile = _brought(tracker, takes_away("reward model backbone"), nullcontext)
    if meanwhile is not None:
        embed = meanwhile(trainer.reward_model.embed_tokens)
        stack.enter_context(patch.object(trainer.reward_model, "embed_tokens", embed))
    if place.offload_reference and config.lora is None and device.type != "cpu":
        brought = partial(_brought, tracker, takes_away("reference"), trainer.reference)
        stack.enter_context(patch.object(trainer, "reference", brought))


def _run_round(config: R2MConfig, tracker: MemoryTracker, parts: dict[str, int], trainer: R2MTrainer) -> dict[str, int]:
    """The peak of each phase; enters what comes and goes in `parts`."""
    total = config.prompts_per_round * config.num_generations
    kept = _kept(config, tracker, trainer, total)
    parts["R2M part"] += kept
    rollout, row = _longest(trainer, trainer.config.num_generations), dict[str, float]()
    if config.algorithm == "remax":
        rollout.greedy = _longest(trainer, 1)
    embedded, lying, first_epoch = min(total, config.micro_batch_size), tracker.live, trainer.scores_in_first_epoch
    texts = rollout.prompts[:1] * embedded, rollout.completions[:1] * embedded
    _, embed = tracker.peak_of(lambda: trainer.reward_model.embed(*texts))
    batch, annotate = tracker.peak_of(lambda: trainer.annotate(rollout, 1, row, first_epoch=first_epoch))
    passes = [annotate] if first_epoch else []  # peaks before a step of the optimizer
    trainer.optimizer.register_step_pre_hook(lambda *_: passes.append(tracker.peak))
    _, optimize = tracker.peak_of(lambda: trainer.optimize_policy(rollout, batch, 1, row))
    _, align = tracker.peak_of(lambda: trainer.align_reward_model(batch, 1, row))
    vocabulary, width = trainer.policy.config.get_text_config().vocab_size, 2 if config.precision == "bf16" else 4
    sequences = min(config.micro_batch_size, len(rollout.prompts) // trainer.config.minibatches)
    parts["logits"] = sequences * (config.generation.max_new_tokens + 1) * vocabulary * width
    parts["activations and temporaries"] = passes[0] - lying - parts["gradients"] - parts["logits"]
    parts["generation cache"], sample = tracker.peak_of(lambda: _generate(config, trainer))
    others = kept - _kept(config, tracker, trainer, len(rollout.prompts))
    peaks = {"rollout": sample, "annotate": max(embed, annotate), "policy": optimize, "reward_model": align}
    return {phase: peak + others for phase, peak in peaks.items()}


def _longest(trainer: R2MTrainer, responses: int) -> Rollout:
    """So many responses of the greatest length to each of a round's prompts; nothing is generated."""
    settings = trainer.config.generation
    ids = [[0] * settings.max_new_tokens]
    return sample(
        trainer.policy,
        trainer.tokenizer,
        trainer.prompts_of_round(1),
        responses,
        settings,
        positions=trainer.config.r2m.positions,
        rollout_fn=lambda prompt_ids, each: ids * (len(prompt_ids) * each),
    )


def _same(a: torch.device, b: torch.device) -> bool:
    return (a.type, a.index or 0) == (b.type, b.index or 0)


# ---- models and a round of the config's sizes ----


class _FakeTensors(FakeTensorMode):
    """Fake tensors that answer what the trainer asks of its numbers as a run without trouble would: every check passes,
    a count of what is missing is 0.

    trained_adapter: the answer to whether any weight is not 0, which `freeze_reference` asks of an adapter.
    """

    def __init__(self, *, trained_adapter: bool):
        super().__init__()
        self._any = trained_adapter

    def __deepcopy__(self, memo: Any) -> _FakeTensors:
        return self  # tensors of two modes do not mix

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.any.default:
            with self:
                return torch.tensor(self._any)
        if func is torch.ops.aten.equal.default:
            return True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 0


def _copy_fake(tensor: FakeTensor, memo: Any) -> Any:
    tensor.constant = None  # PyTorch would take a fake tensor whose value is known for a real one
    return Tensor.__deepcopy__(tensor, memo)


def _policy(config: R2MConfig) -> PreTrainedModel | PeftModel:
    """As r2m.load_policy, without weights."""
    check_no_adapter("policy", config.policy, config.policy_revision)
    where: Any = {"revision": config.policy_revision, "trust_remote_code": config.trust_remote_code}
    narrow = config.lora is not None and config.precision == "bf16"
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(config.policy, **where),
        dtype=torch.bfloat16 if narrow else torch.float32,
        attn_implementation=_attention(config),
        trust_remote_code=config.trust_remote_code,
    )
    if config.lora is None:
        return model
    if config.lora.adapter is None:
        return add_adapter(model, config.lora)
    return get_peft_model(model, PeftConfig.from_pretrained(config.lora.adapter, inference_mode=False))


def _reward_config(config: R2MConfig, policy_width: int) -> RewardModelConfig:
    """The saved one, or that of the new one which R2MRewardModel.from_pretrained makes; either has its statistics."""
    saved = saved_config(config.reward_model, config.reward_model_revision)
    if saved is not None:
        return dataclasses.replace(saved, standardize=False)
    return RewardModelConfig(
        backbone=config.reward_model,
        backbone_revision=config.reward_model_revision,
        policy=config.policy,
        policy_revision=config.policy_revision,
        policy_width=policy_width,
        inner_width=config.r2m.inner_width,
        num_heads=config.r2m.num_heads,
        floor=config.r2m.floor,
        standardize=False,
        rte_token="checkpoint",
        suffix="",
        max_length=2048,
    )


def _classifier(config: R2MConfig, settings: RewardModelConfig, tracker: MemoryTracker) -> PreTrainedModel:
    where: Any = {"revision": settings.backbone_revision, "trust_remote_code": config.trust_remote_code}
    model_config = AutoConfig.from_pretrained(settings.backbone, num_labels=1, **where)
    dtype = compute_dtype(config.placement.reward_model or policy_device(config))
    loader, how = (
        sequence_classifier(model_config),
        {"dtype": dtype, "attn_implementation": _attention(config)},
    )
    if loader is AutoModelForSequenceClassification:
        model = loader.from_config(model_config, trust_remote_code=config.trust_remote_code, **how)
    else:
        model = loader._from_config(model_config, **how)
    if config.placement.quantize_reward_model is not None:
        # Of 16 bits a weight; bitsandbytes' 4 bits share a float32 scale among 64.
        saved = {"8bit": 8, "4bit": 11.5}[config.placement.quantize_reward_model]
        layers = (module for module in model.base_model.modules() if isinstance(module, nn.Linear))
        tracker.shift(-sum(int(layer.weight.nbytes * saved / 16) for layer in layers))
    return model


def _attention(config: R2MConfig) -> str | None:
    # It asks for a GPU and its package; both kernels keep inputs, output and one number a row.
    return "sdpa" if config.placement.attention == "flash_attention_2" else config.placement.attention


def _tokenizer() -> PreTrainedTokenizerFast:
    """A text of n words is n tokens."""
    words = Tokenizer(models.WordLevel({_WORD: 0, "</s>": 1}, unk_token=_WORD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")


def _short_round(config: R2MConfig) -> R2MConfig:
    """The config with at most two micro-batches a minibatch, two minibatches and two epochs: the fewest that meet all
    that can be in memory at once. Groups still are, or are not, whole in a micro-batch."""
    each = config.prompts_per_round * config.num_generations // config.minibatches
    minibatches, micro = min(2, config.minibatches), config.micro_batch_size
    rows, prompts, responses = min(each, 2 * micro), config.prompts_per_round, config.num_generations
    if rows * minibatches < prompts * responses:
        whole = micro % responses == 0
        responses = next(k for k in count(min(3, responses)) if (micro % k == 0) == whole)
        prompts = -(-rows // responses) * minibatches
    return dataclasses.replace(
        config,
        prompts_per_round=prompts,
        num_generations=responses,
        minibatches=minibatches,
        epochs=min(2, config.epochs),
        trackers=[],
        r2m=dataclasses.replace(config.r2m, standardize=False),
        placement=Placement(),
    )


# ---- what is counted by hand ----


def _first_step(optimizer: torch.optim.Optimizer) -> None:
    """Afterwards the optimizer has its state."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _kept(config: R2MConfig, tracker: MemoryTracker, trainer: R2MTrainer, rows: int) -> int:
    """Bytes that a round keeps of so many sequences: token ids, masks, annotations and the reward model's vectors."""
    before, lengths = tracker.live, config.generation
    prompts, responses = [[0] * lengths.max_prompt_tokens] * rows, [[0] * lengths.max_new_tokens] * rows
    rollout = collate([""] * rows, [""] * rows, prompts, responses, pad_id=0)
    rte = torch.zeros(rows, trainer.reward_model.head.weight.shape[0])
    updater = R2MUpdater(trainer.reward_model, config.r2m, total_steps=config.rounds, num_generations=rows)
    if config.r2m.attends:
        updater.begin_round(rte, 1)
    batch = Annotations.blank(rollout, rte[:, 0])
    size = tracker.live - before
    del batch  # until here
    return size


@contextmanager
def _brought(tracker: MemoryTracker, size: int, context: Callable[[], Any]) -> Iterator[Any]:
    """`context()`, with `size` bytes from host memory on the device meanwhile."""
    tracker.shift(size)
    try:
        with context() as value:
            yield value
    finally:
        tracker.shift(-size)


@contextmanager
def _elsewhere(tracker: MemoryTracker, size: int, peaks: list[int]) -> Iterator[None]:
    """What is made meanwhile lies on another device, beside `size` bytes; its peak there is appended to `peaks`."""
    before, tracker.peak = tracker.peak, tracker.live
    live = tracker.live
    yield
    peaks.append(size + tracker.peak - live)
    tracker.peak = before


# ---- generation ----


def _generate(config: R2MConfig, trainer: R2MTrainer) -> int:
    """One batch of rollout.generate, with `_last_steps` for transformers' loop; returns the cache's bytes."""
    settings, total = config.generation, config.prompts_per_round * config.num_generations
    size = min(settings.batch_size or total, total)
    prompts, responses = max(1, size // config.num_generations), min(size, config.num_generations)
    model, caches = causal_lm(trainer.policy), list[int]()
    together = dataclasses.replace(settings, batch_size=None)
    with patch.object(model, "generate", partial(_last_steps, model, caches)), trainer.autocast():
        generate(model, trainer.tokenizer, trainer.prompt_ids * prompts, responses, together, [1])
    return caches[0]


def _last_steps(
    model: Any,
    caches: list[int],
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    past_key_values: Any,
    generation_config: GenerationConfig,
    **_: Any,
) -> np.ndarray:
    """The last two steps of transformers' generate, with the cache as full as it is then; returns as many ids."""
    rows, width = input_ids.shape
    cache, new = past_key_values, generation_config.max_new_tokens
    if cache is None:  # generate reads every sequence from its start
        cache = model(input_ids, attention_mask=attention_mask, use_cache=True, logits_to_keep=1).past_key_values
    missing = max(0, width + new - 3 - cache.get_seq_length())
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer):
            both: Any = layer.keys, layer.values
            grown = (x.new_empty(*x.shape[:2], missing, x.shape[-1]) for x in both)
            cache.update(*grown, i)
    processors = InfNanRemoveLogitsProcessor(), TemperatureLogitsWarper(generation_config.temperature)
    for length in (width + new - 2, width + new - 1):  # in the second step, what the first made is still there
        outputs = model(
            input_ids=input_ids[:, -1:],
            attention_mask=attention_mask.new_ones(rows, length),
            past_key_values=cache,
            use_cache=True,
        )
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        scores = logits
        for process in processors:
            scores = process(input_ids, scores)
        probabilities = nn.functional.softmax(scores, -1)
        torch.multinomial(probabilities, 1)
    caches.append(sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor)))
    return np.zeros((rows, width + new), int)
