"""`r2m fit-reward`: from preference pairs to a folder with the fitted reward model."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r2m import processes
from r2m.commands.build import load_key
from r2m.data.sources import Preference, load_pairs
from r2m.data.spool import picked
from r2m.devices import compute_dtype
from r2m.fitting.recipe import TOLERANCE, fit_reward
from r2m.method.reward_model import R2MRewardModel, saved_config
from r2m.models import check_no_adapter
from r2m.names import check_model, named
from r2m.policy.load import load_tokenizer
from r2m.progress import waiting
from r2m.runs.checkpoint import new_folder

FIT_REPORT = "fit.json"


@processes.ends_all()
def fit_reward_from_files(
    pairs: str | Path,
    reward_model: str | Path,
    output: str | Path,
    *,
    policy: str | Path | None = None,
    held_out: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    skip_invalid: bool = False,
    reward_model_revision: str | None = None,
    policy_revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    lora_rank: int = 0,
    learning_rate: float = 1e-4,
    batch_size: int = 16,
    keep_head: bool = False,
    max_epochs: int | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """What `r2m fit-reward` does: a folder with the fitted reward model, `fit.json` and `calibration.png`.

    pairs, held_out: sources of `r2m.load_pairs`, which takes `columns` and `skip_invalid`; without `held_out`, a
        random tenth of the pairs, all pairs of a prompt together, is held out. Pairs of more tokens than the reward
        model's `max_length` are dropped.
    reward_model, policy: folders or hub ids; without `policy` there is no cross-attention and no R2M reward model.
    dtype: of both models' frozen weights; None: bfloat16 where the device multiplies it natively, else float32.
    lora_rank, learning_rate, batch_size, keep_head, max_epochs, tolerance: see `fit_reward`.
    settings: those of a new reward model that differ from the defaults (`R2MRewardModel.from_pretrained`).

    Of several processes (`processes.start`) each reads all pairs and computes its share; the first writes the folder.

    The folder is a sequence-classification checkpoint and, given the policy, an R2M reward model. Returns what it
    writes to `fit.json`. Raises what `fit_reward` and the loaders raise; ValueError for fewer than ten pairs without
    `held_out`, for settings that a saved R2M reward model contradicts, for `keep_head` of a model without a head, and
    for an output folder that is not empty; OSError for one that cannot be written. After an error, or if it is
    interrupted, nothing is left in the folder.
    """
    output = Path(output)
    named("reward_model", check_model, str(reward_model))
    named("policy", check_model, str(policy or ""))
    how: Any = {"columns": columns, "skip_invalid": skip_invalid}
    training = load_pairs(pairs, **how)
    validation = None if held_out is None else load_pairs(held_out, **how)
    writes = processes.index() == 0
    with new_folder(output) if writes else nullcontext():
        torch.manual_seed(seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = compute_dtype(device) if dtype is None else dtype
        saved = saved_config(reward_model, reward_model_revision)
        for name, value in settings.items():
            if saved is not None and getattr(saved, name) not in (None, value):
                raise ValueError(
                    f"{name} is {value!r}; the R2M reward model {reward_model} has {getattr(saved, name)!r}"
                )
        needs_policy = sorted({"inner_width", "num_heads", "floor", "standardize", "positions"} & settings.keys())
        if policy is None and needs_policy:
            raise ValueError(f"{needs_policy[0]} is given without a policy; expected the model that is attended to")
        if policy is not None:
            check_no_adapter("policy", policy, policy_revision)
        if keep_head and saved is None and not _is_classifier(reward_model, reward_model_revision, trust_remote_code):
            raise ValueError(
                f"keep_head is True, and reward_model {reward_model} is a language model without a head; "
                "expected a sequence-classification checkpoint, or a fit without keep_head"
            )
        model = load_key(
            "reward_model",
            R2MRewardModel.from_pretrained,
            str(reward_model),
            # A new one needs some policy; without one nothing of the cross-attention is trained or written.
            policy=reward_model if saved is None and policy is None else policy,
            revision=reward_model_revision,
            policy_revision=policy_revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            device=device,
            **settings,
        )
        model.config.positions = settings.get("positions", model.config.positions)  # a saved model may not name them
        loaded_policy: Any = None
        tokenizer = None
        if policy is not None:
            where: dict[str, Any] = {"revision": policy_revision, "trust_remote_code": trust_remote_code}
            loaded_policy = load_key("policy", AutoModelForCausalLM.from_pretrained, str(policy), dtype=dtype, **where)
            loaded_policy.to(device)
            tokenizer = load_tokenizer(str(policy), **where)

        loaded = len(training) + len(validation or [])
        with waiting("reading the pairs"):
            training = model.usable_pairs(training, tokenizer, loaded_policy)
        if validation is None:
            if len(training) < 10:
                raise ValueError(
                    f"pairs: {pairs} has {len(training)} that can be used, of which a tenth is held out; "
                    "expected at least 10, or a file of held-out pairs"
                )
            training, validation = split_pairs(training, seed, len(training) // 10)
        else:
            with waiting("reading the held-out pairs"):
                validation = model.usable_pairs(validation, tokenizer, loaded_policy)
        report = {
            "pairs": str(pairs),
            "held_out": None if held_out is None else str(held_out),
            "reward_model": str(reward_model),
            "policy": None if policy is None else str(policy),
            "positions": None if policy is None else model.config.positions or "all",
            "lora_rank": lora_rank,
            "keep_head": keep_head,
            "seed": seed,
            "training_pairs": len(training),
            "held_out_pairs": len(validation),
            "dropped_pairs": loaded - len(training) - len(validation),
        } | fit_reward(
            model,
            training,
            validation,
            policy=loaded_policy,
            tokenizer=tokenizer,
            lora_rank=lora_rank,
            learning_rate=learning_rate,
            batch_size=batch_size,
            keep_head=keep_head,
            max_epochs=max_epochs,
            tolerance=tolerance,
            cache=True,
            calibration_plot=output / "calibration.png",
        )
        if writes:
            with waiting(f"writing {output}"):
                if policy is not None:
                    model.save_pretrained(output, include_backbone=True)
                else:
                    model.save_classifier(output)
            (output / FIT_REPORT).write_text(json.dumps(report, indent=2) + "\n")
        return report


def _is_classifier(name: str | Path, revision: str | None, trust_remote_code: bool) -> bool:
    config = AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=trust_remote_code)
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])


def split_pairs(
    pairs: Sequence[Preference], seed: int, count: int
) -> tuple[Sequence[Preference], Sequence[Preference]]:
    """All but a random `count`, and these; the pairs of one prompt stay together where prompts are many."""
    by_prompt: dict[bytes, list[int]] = {}  # by a hash, which is shorter than the prompt
    for i, pair in enumerate(pairs):
        by_prompt.setdefault(hashlib.sha256(json.dumps(pair.prompt).encode()).digest(), []).append(i)
    groups = list(by_prompt.values())
    if min(map(len, groups)) > count:  # few prompts for all pairs: they say nothing
        groups = [[i] for i in range(len(pairs))]
    random.Random(seed).shuffle(groups)
    training, held_out = list[int](), list[int]()
    for group in groups:
        (held_out if len(held_out) + len(group) <= count else training).extend(group)
    return picked(pairs, training), picked(pairs, held_out)
