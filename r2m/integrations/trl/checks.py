"""What of TRL's releases, arguments and models gives the right rewards; errors for the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from r2m import processes
from r2m.config import Preferences
from r2m.data.sources import Prompt
from r2m.integrations.trl.passes import passes_a_rollout
from r2m.method.reward_model import R2MRewardModel
from r2m.policy.passes import dropout_rates
from r2m.runs.checkpoint import fingerprint

logger = logging.getLogger(__name__)

SUPPORTED = ">=1.0,!=1.15.0"  # 1.15.0 has its log-probabilities from Triton kernels alone: no CPU

_PADDING = 8  # tokens


def check_version() -> None:
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError("r2m.integrations.trl needs TRL: pip install 'r2m-kernels[trl]'") from None
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        raise ImportError(f"trl is {found}; expected {SUPPORTED}: pip install 'r2m-kernels[trl]'")


def check_positions(model: Any, backbone: Any, args: Any) -> None:
    """Raises ValueError for a policy whose hidden states depend on the padding before a sequence."""
    if _is_sharded():
        return
    ids, was_training = _some_ids(backbone), model.training
    padded = torch.cat([ids[:, :1].expand(1, _PADDING), ids], 1)
    mask = (torch.arange(padded.shape[1], device=ids.device) >= _PADDING).long()[None]
    model.eval()
    with torch.no_grad():
        alone = hidden_states(backbone, ids, torch.ones_like(ids), args)
        behind_padding = hidden_states(backbone, padded, mask, args)[:, _PADDING:]
    model.train(was_training)
    difference = _difference(behind_padding, alone)
    if difference > _tolerance(backbone, args):
        raise ValueError(
            f"model is a {type(model).__name__}, whose hidden states differ by {difference:.2g} standard deviations "
            "behind padding: TRL pads prompts and gives no position ids; expected a model with relative positions, "
            "such as rotary ones, or r2m.R2MTrainer, which gives position ids"
        )


def check_noise(model: Any, backbone: Any, args: Any) -> None:
    """Raises ValueError for a policy whose hidden states in training mode, in which TRL scores, are not those in eval
    mode. A fresh adapter's dropout does not show yet, so rates are looked at too."""
    rates = {f"{type(module).__name__}.{name} = {getattr(module, name):g}" for module, name in dropout_rates(model)}
    if not rates and differs_in_training(model, backbone, args):
        rates = {"noise in training mode, such as a router's jitter"}
    if rates:
        raise ValueError(
            f"model is a {type(model).__name__} with {', '.join(sorted(rates))}, and disable_dropout is "
            f"{args.disable_dropout}: TRL scores in training mode, so rewards would be of noise; expected "
            "disable_dropout=True in the trainer's args, and 0 in the model's config for what that does not reach"
        )


def differs_in_training(model: Any, backbone: Any, args: Any) -> bool:
    if _is_sharded():
        return False
    ids, was_training = _some_ids(backbone), model.training
    with torch.no_grad(), torch.random.fork_rng([ids.device] if ids.is_cuda else []):
        # Without a mask a pass is not taken for one of TRL's.
        model.train()
        in_training = hidden_states(backbone, ids, None, args)
        model.eval()
        exact = hidden_states(backbone, ids, None, args)
    model.train(was_training)
    return _difference(in_training, exact) > _tolerance(backbone, args)


def hidden_states(backbone: nn.Module, ids: Tensor, mask: Tensor | None, args: Any) -> Tensor:
    """As TRL calls the policy: under its autocast, without position ids."""
    precision = torch.float16 if args.fp16 else torch.bfloat16
    with torch.autocast(args.device.type, precision, enabled=args.bf16 or args.fp16):
        return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def _some_ids(backbone: Any) -> Tensor:
    weight = backbone.get_input_embeddings().weight
    return torch.arange(3, 15, device=weight.device)[None] % weight.shape[0]


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Root mean square over that of `expected` less its mean over the tokens: a few features may dwarf all others."""
    actual, expected = actual.float(), expected.float()
    return ((actual - expected).norm() / (expected - expected.mean(1, keepdim=True)).norm()).item()


def _tolerance(backbone: Any, args: Any) -> float:
    return 1e-3 if backbone.dtype == torch.float32 and not (args.bf16 or args.fp16) else 0.1


def _is_sharded() -> bool:
    """Whether a pass takes more than calling the policy."""
    return AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_arguments(args: Any, num_generations: int) -> None:
    for name in ("num_generations", "steps_per_generation", "num_iterations"):
        if not hasattr(args, name):
            raise TypeError(f"args is a {type(args).__name__} without {name}; expected RLOOConfig or GRPOConfig")
    if args.num_generations != num_generations:
        raise ValueError(
            f"num_generations is {num_generations} in r2m_reward and {args.num_generations} in the "
            "trainer's args; expected the same"
        )
    share = args.per_device_train_batch_size * args.steps_per_generation
    if share % num_generations:
        raise ValueError(
            f"per_device_train_batch_size * steps_per_generation is {args.per_device_train_batch_size} * "
            f"{args.steps_per_generation} = {share} samples of a rollout in each process; expected a multiple of "
            f"num_generations = {num_generations}, so that no group is split between processes"
        )
    if args.mask_truncated_completions:
        raise ValueError(
            "mask_truncated_completions is True: TRL hides truncated completions from the policy's attention, "
            "so they have no feedback; expected False"
        )
    if (args.generation_kwargs or {}).get("use_cache") is False:
        raise ValueError(
            "generation_kwargs has use_cache=False, which makes generation look like scoring; expected True"
        )


def check_backbone(reward_model: R2MRewardModel) -> None:
    own = fingerprint(reward_model.backbone.named_parameters())
    if len(set(processes.gather_items([own]))) > 1:
        raise ValueError(
            "reward_model's backbone has other weights in some processes; FSDP's cpu_ram_efficient_loading leaves them "
            "out in all but the first: expected fsdp_cpu_ram_efficient_loading: false, or a reward model that is "
            "loaded before the trainer's arguments are made"
        )


def check_wait(args: Any, preferences: Preferences) -> None:
    if args.world_size > 1 and preferences.labeller is not None and preferences.wait >= args.ddp_timeout:
        raise ValueError(
            f"preferences.wait is {preferences.wait:g} seconds on {args.world_size} processes, which wait for one "
            f"another ddp_timeout = {args.ddp_timeout:g} seconds; expected less than that"
        )


def warn_about_arguments(args: Any) -> None:
    if passes_a_rollout(args) <= args.gradient_accumulation_steps:
        logger.warning(
            "steps_per_generation * num_iterations = %d, gradient_accumulation_steps = %d: the policy takes one step a "
            "rollout, so the refreshed hidden states equal the scored ones",
            passes_a_rollout(args),
            args.gradient_accumulation_steps,
        )
    if args.num_generations == 2:
        logger.warning("num_generations = 2: group reward entropy is constant, so GREBT is Bradley-Terry alone")


def check_text(completion: Any) -> None:
    """Raises TypeError unless a completion is what TRL makes of one response: text, or one message of the assistant."""
    if isinstance(completion, str):
        return
    if len(completion) != 1 or not isinstance(completion[0].get("content"), str):
        raise TypeError(
            f"completion has {len(completion)} messages, {completion!r:.80}; expected text, or one message "
            "with text (tools and images are not supported)"
        )


def known_prompts(dataset: Any) -> Iterable[Prompt]:
    """Those that are known before training; a stream's come one by one."""
    known = has_length(dataset) and "prompt" in (getattr(dataset, "column_names", None) or [])
    return dataset["prompt"] if known else []
