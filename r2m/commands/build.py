"""From a config to what it names: data, models, the trainer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r2m.config import R2MConfig, check_names, require_keys
from r2m.data.sources import load_pairs, load_prompts
from r2m.devices import policy_device, resolve_precision
from r2m.integrations.vllm import check_installed
from r2m.integrations.vllm_server import check_answers
from r2m.method.reward_model import R2MRewardModel, saved_config
from r2m.models import check_no_adapter
from r2m.names import load_function, named
from r2m.policy.load import load_policy, load_tokenizer
from r2m.progress import waiting
from r2m.runs.monitor import check_trackers
from r2m.trainer import R2MTrainer

logger = logging.getLogger(__name__)


def load_data(config: R2MConfig) -> dict[str, Any]:
    """What `R2MTrainer` takes beside models: prompts, held-out prompts and pairs, judge; once all that can be checked
    without a model has been.

    Raises ValueError, OSError or ImportError, naming the key of the config, for what cannot be found, read or run.
    """
    require_keys(config, "policy", "reward_model", "prompts")
    check_names(config)
    check_trackers(config.trackers)
    if config.generation.server is not None:
        check_answers(config.generation.server)
    elif config.generation.engine == "vllm":
        check_installed()
    _check_device("placement.device", config.placement.device)
    _check_device("placement.reward_model", config.placement.reward_model)
    measured = config.evaluation
    how: dict[str, Any] = {"columns": config.columns, "skip_invalid": config.skip_invalid}
    how_measured = how if measured.columns is None else how | {"columns": measured.columns}
    return {
        "judge": load_key("evaluation.judge", partial(load_function, "judge"), measured.judge),
        "prompts": load_key("prompts", load_prompts, config.prompts, **how),
        "eval_prompts": load_key("evaluation.prompts", load_prompts, measured.prompts, **how_measured),
        "held_out_pairs": load_key("evaluation.pairs", load_pairs, measured.pairs, **how_measured),
    }


def build_trainer(config: R2MConfig, data: dict[str, Any] | None = None) -> R2MTrainer:
    """The trainer that a config describes. data: what `load_data` returns, where it was called before.

    Raises the errors of `load_data`, and the same for models.
    """
    data = load_data(config) if data is None else data
    config = resolve_precision(with_saved_part(config))
    policy, reward_model, tokenizer = load_models(config)
    pairs = data["held_out_pairs"]
    with waiting("preparing data, reference and optimizers"):
        if pairs is not None:
            data = data | {"held_out_pairs": reward_model.usable_pairs(pairs, tokenizer, policy)}
        return R2MTrainer(policy, reward_model, tokenizer, config=config, **data)


def load_models(config: R2MConfig) -> tuple[PreTrainedModel | PeftModel, R2MRewardModel, PreTrainedTokenizerBase]:
    """What a run of this config starts with: policy, reward model, the policy's tokenizer. Errors name the key."""
    place = config.placement
    torch.manual_seed(config.seed)  # of an adapter's and a cross-attention's fresh weights
    device = policy_device(config)
    load_key("policy", partial(check_no_adapter, "policy"), config.policy, revision=config.policy_revision)
    tokenizer = load_key(
        "policy",
        load_tokenizer,
        config.policy,
        revision=config.policy_revision,
        trust_remote_code=config.trust_remote_code,
    )
    reward_model = load_key(
        "reward_model",
        R2MRewardModel.from_pretrained,
        config.reward_model,
        policy=config.policy,
        revision=config.reward_model_revision,
        policy_revision=config.policy_revision,
        device=device,
        backbone_device=place.reward_model,
        offload=place.offload_reward_model,
        quantization=place.quantize_reward_model,
        attention=place.attention,
        trust_remote_code=config.trust_remote_code,
        inner_width=config.r2m.inner_width,
        num_heads=config.r2m.num_heads,
        floor=config.r2m.floor,
        standardize=config.r2m.standardize,
        zero_output=config.r2m.zero_output,
    )
    reward_model.check_head()
    with waiting("loading policy"):
        policy = load_policy(config, device)
    return policy, reward_model, tokenizer


def with_saved_part(config: R2MConfig) -> R2MConfig:
    """The config with what the reward model has decided already, where it is a saved R2M reward model."""
    saved = load_key("reward_model", saved_config, config.reward_model, revision=config.reward_model_revision)
    if saved is None:
        return config
    if config.r2m.zero_output:
        raise ValueError(
            f"r2m.zero_output is true, and reward_model {config.reward_model} brings its cross-attention; "
            "expected false, or a reward model without one"
        )
    if config.r2m.attends:
        saved.check_positions(config.r2m.positions)
    decided = {name: getattr(saved, name) for name in ("inner_width", "num_heads", "standardize")}
    other = {name: value for name, value in decided.items() if getattr(config.r2m, name) != value}
    if other:
        logger.info("%s brings its own %s", config.reward_model, ", ".join(f"{k} = {v}" for k, v in other.items()))
    return dataclasses.replace(config, r2m=dataclasses.replace(config.r2m, **decided))


def load_key(key: str, load: Callable[..., Any], name: str, **options: Any) -> Any:
    """What a key of the config names, None for "". Errors name the key, and progress says what is being loaded."""
    with waiting(f"loading {key}"):
        return named(key, load, name, **options)


def _check_device(key: str, name: str | None) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{key} is {name!r}, which cannot be used: {str(error).splitlines()[0]}") from None
