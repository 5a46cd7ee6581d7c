"""Model cards: the README.md beside saved weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from r2m.config import R2MConfig, config_items
from r2m.models import is_local, shown
from r2m_kernels import __version__


def write_policy_card(folder: str | Path, config: R2MConfig, history: list[dict[str, Any]]) -> None:
    """Write README.md, the hub's model card, beside a saved policy (or adapter).

    history: the rows of metrics.jsonl up to this policy. Of names of local files only the last part is shown.
    """
    folder = Path(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    front: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "r2m", config.algorithm, *(["lora"] if is_adapter else [])],
    }
    if not is_local(config.policy):  # the hub takes ids only
        front = {"base_model": config.policy, "base_model_relation": "adapter" if is_adapter else "finetune"} | front
    rounds = int(history[-1]["round"]) if history else 0
    measured = config.evaluation
    data = {"prompts": config.prompts, "held-out prompts": measured.prompts, "held-out pairs": measured.pairs}
    text = _POLICY_CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        kind="An adapter of" if is_adapter else "Fine-tuned from",
        policy=shown(config.policy),
        algorithm=config.algorithm.upper(),
        method=_METHOD[config.r2m.feedback].format(hidden=_HIDDEN[config.r2m.source]),
        reward_model=shown(config.reward_model),
        reward_model_folder=_REWARD_MODEL if (folder / "reward_model").is_dir() else "",
        loader="peft" if is_adapter else "transformers",
        auto_class="AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM",
        temperature=config.generation.temperature,
        data=_table([[name, f"`{shown(value)}`"] for name, value in data.items() if value]),
        rounds=rounds,
        all_rounds=config.rounds,
        n=config.prompts_per_round,
        k=config.num_generations,
        trajectories=rounds * config.prompts_per_round * config.num_generations,
        metrics=_table(_measured(history), ["measure", "first (round)", "last (round)"]),
        settings=_table(
            [[f"`{name}`", f"`{shown(value)}`" if value != "" else ""] for name, value in config_items(config).items()]
        ),
        versions=", ".join(
            [f"r2m-kernels {__version__}", *(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))]
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _measured(history: list[dict[str, Any]]) -> list[list[str]]:
    """First and last value of what tells how the run went."""
    found: dict[str, list[tuple[float, int]]] = {}
    for row in history:
        for name, value in row.items():
            if name.startswith(("eval/", "reward/", "rm/")) or name == "policy/kl":
                found.setdefault(name, []).append((value, int(row["round"])))
    return [
        [f"`{name}`", *(f"{value:.4g} ({t})" for value, t in (values[0], values[-1]))]
        for name, values in sorted(found.items())
    ]


def _table(rows: list[list[str]], head: list[str] | None = None) -> str:
    columns = head or ["", ""]
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def reward_model_card(settings: Mapping[str, Any]) -> str:
    """Of the trained part of a reward model, whose `RewardModelConfig` these are."""
    return _REWARD_MODEL_CARD.format(**_named(settings))


def classifier_card(settings: Mapping[str, Any]) -> str:
    """Of backbone and head as a sequence-classification checkpoint."""
    return _CLASSIFIER_CARD.format(**_named(settings))


def classifier_usage(**facts: Any) -> str:
    """What plain loaders of such a checkpoint do not know."""
    return _USAGE.format(**facts)


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The hub takes ids only: of a local folder the last part of its name is shown."""
    backbone = settings["backbone"]
    base_model = "" if is_local(backbone) else f"base_model: {backbone}\n"
    return {"base_model": base_model} | {name: shown(value) for name, value in settings.items()}


_METHOD = {
    "none": "The reward model is fixed.",
    "frozen": "The reward model reads {hidden} (R2M); its small trainable part is not trained.",
    "trained": (
        "The reward model reads {hidden}, and its small trainable part is trained in step with the policy (R2M)."
    ),
    "head": "The linear head of the reward model is trained on the policy's samples; it reads no hidden states.",
}

_HIDDEN = {
    "policy": "the policy's own hidden states",
    "reference": "the hidden states of the policy as it was at the start",
    "noise": "noise in place of the policy's hidden states",
}

_REWARD_MODEL = (
    " The reward model is in `reward_model` (`r2m.R2MRewardModel.from_pretrained`), and needs this policy's hidden "
    "states to score."
)

_POLICY_CARD = """---
{front}---
# Policy trained with R2M

{kind} `{policy}`, by {algorithm} against a reward model on `{reward_model}`. {method}{reward_model_folder}

Method: "Real-Time Aligned Reward Model beyond Semantics" ([arXiv:2601.22664](https://arxiv.org/abs/2601.22664)).

```python
from {loader} import {auto_class}
from transformers import AutoTokenizer

policy, tokenizer = {auto_class}.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```

It was trained on samples of temperature {temperature}, without top-k or top-p.

## Data

{data}

{rounds} of {all_rounds} rounds of {n} prompts x {k} responses: {trajectories} trajectories.

## Measured in training

{metrics}

## Settings

{settings}

{versions}
"""

_REWARD_MODEL_CARD = """---
library_name: r2m
{base_model}tags: [reward-model, rlhf, r2m]
---
# R2M reward model

The trainable part (sequence-to-token cross-attention and linear head, float32) of a reward model with policy feedback,
after "Real-Time Aligned Reward Model beyond Semantics" (arXiv 2601.22664).

| | |
| --- | --- |
| frozen backbone | `{backbone}` (revision {backbone_revision}) |
| policy whose hidden states it attends to | `{policy}` (revision {policy_revision}) |
| widths | policy {policy_width}, cross-attention {inner_width}, heads {num_heads} |
| fusion weight outside training (Omega) | {floor} |

It cannot score without that policy's hidden states: `r2m.R2MRewardModel.from_pretrained(folder)`.
"""

_CLASSIFIER_CARD = """---
library_name: transformers
pipeline_tag: text-classification
{base_model}tags: [reward-model, rlhf]
---
# Reward model

A scalar reward, fitted on preference pairs by r2m, on `{backbone}` (revision {backbone_revision}).
"""

_USAGE = """
## As a sequence-classification checkpoint

`{loader}` gives the R2M loader's score
at w = 1{shift}; in {dtype} unless told otherwise. That holds if it is given what the R2M loader makes of a text:

- chat messages through this folder's chat template; prompt and response as they are, with the special tokens that the
  tokenizer adds by default
- suffix: {suffix}
- token read: {read}
- length: texts beyond {max_length} tokens lose their beginning in the R2M loader; a plain one does not cut them
"""
