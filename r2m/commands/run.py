"""From files to files: what the command line does with a config, the folder of a run, or preference pairs."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from r2m import processes
from r2m.config import R2MConfig, check_names, config_to_yaml, require_keys
from r2m.data.sources import Preference, load_pairs, load_prompts
from r2m.devices import compute_dtype, policy_device, resolve_precision
from r2m.fitting.recipe import TOLERANCE, fit_reward
from r2m.method.reward_model import R2MRewardModel, saved_config
from r2m.models import check_no_adapter
from r2m.names import check_model, named
from r2m.plots import plot_run
from r2m.policy.load import load_policy, load_tokenizer
from r2m.progress import waiting
from r2m.runs.checkpoint import checkpoint_to_resume, claim, how_to_go_on, load_checkpoint, new_folder
from r2m.runs.folder import best_round, check_unused, judge_is_undecided, run_to_evaluate
from r2m.runs.judge import judge_scores, load_judge
from r2m.runs.monitor import check_trackers, sample_table
from r2m.trainer import R2MTrainer

logger = logging.getLogger(__name__)

FIT_REPORT = "fit.json"


def load_data(config: R2MConfig) -> dict[str, Any]:
    """What `R2MTrainer` takes beside models: prompts, held-out prompts and pairs, judge; once all that can be checked
    without a model has been.

    Raises ValueError, OSError or ImportError, naming the key of the config, for what cannot be found, read or run.
    """
    require_keys(config, "policy", "reward_model", "prompts")
    check_names(config)
    check_trackers(config.trackers)
    _check_device("placement.device", config.placement.device)
    _check_device("placement.reward_model", config.placement.reward_model)
    measured = config.evaluation
    how: dict[str, Any] = {"columns": config.columns, "skip_invalid": config.skip_invalid}
    how_measured = how if measured.columns is None else how | {"columns": measured.columns}
    return {
        "judge": _load("evaluation.judge", load_judge, measured.judge),
        "prompts": _load("prompts", load_prompts, config.prompts, **how),
        "eval_prompts": _load("evaluation.prompts", load_prompts, measured.prompts, **how_measured),
        "held_out_pairs": _load("evaluation.pairs", load_pairs, measured.pairs, **how_measured),
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
    _load("policy", partial(check_no_adapter, "policy"), config.policy, revision=config.policy_revision)
    tokenizer = _load(
        "policy",
        load_tokenizer,
        config.policy,
        revision=config.policy_revision,
        trust_remote_code=config.trust_remote_code,
    )
    reward_model = _load(
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
    saved = _load("reward_model", saved_config, config.reward_model, revision=config.reward_model_revision)
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


def run(config: R2MConfig, resume_from: str | Path | None = None) -> str:
    """Train, save policy and reward model in output_dir, and draw the curves; returns a sentence for the user."""
    processes.start(config.placement.timeout)
    with processes.ends_all():
        return _run(config, resume_from)


def _run(config: R2MConfig, resume_from: str | Path | None) -> str:
    # Mistakes end here, before a folder is made or a model is loaded; what may ask the hub comes last.
    if resume_from is None:
        check_unused(config.output_dir)
    data = load_data(config)
    config = resolve_precision(with_saved_part(config))
    if resume_from is not None:
        checkpoint_to_resume(config, resume_from)
    folder = Path(config.output_dir)
    with claim(folder):
        trainer = build_trainer(config, data)
        try:
            history = trainer.train(resume_from)
        except (KeyboardInterrupt, SystemExit) as stop:
            how = "interrupted" if isinstance(stop, KeyboardInterrupt) else "stopped by SIGTERM"
            logger.warning(
                "%s after %d of %d rounds; %s", how, len(trainer.history), config.rounds, how_to_go_on(folder)
            )
            raise
        with waiting(f"writing {folder}"):
            trainer.save_pretrained(folder)
    if processes.index() == 0:
        plot_run(folder / "metrics.jsonl", folder / "metrics.png")
    return f"policy, reward model, metrics.jsonl and metrics.png are in {folder}{_liked(history, folder)}"


def _liked(history: list[dict[str, Any]], folder: Path) -> str:
    """What the judge says of a run, to be put behind a sentence."""
    if judge_is_undecided(history):
        return "; the judge cannot tell which round is best: its scores of all of them are equal"
    best = best_round(history)
    if best is None:
        return ""
    return f"; the judge likes round {best} best (r2m export {folder} --checkpoint best --output FOLDER)"


def dry_run(config: R2MConfig) -> str:
    """Build everything and run one tiny round, with evaluation and a checkpoint, in a folder that is thrown away.

    Two prompts, at most 16 new tokens, and 16 held-out prompts and pairs; the rest as configured. Returns the resolved
    config and what was measured.
    """
    if processes.start(config.placement.timeout).num_processes > 1:
        raise ValueError("dry_run is of one process; expected it without `accelerate launch`")
    generation = dataclasses.replace(
        config.generation, max_new_tokens=min(16, config.generation.max_new_tokens), batch_size=None
    )
    data = load_data(config)
    for name in ("eval_prompts", "held_out_pairs"):
        data[name] = data[name] and data[name][:16]
    place = Path(config.output_dir).absolute()
    while not place.is_dir():  # the checkpoint goes to the disk that those of the run will go to
        place = place.parent
    with tempfile.TemporaryDirectory(dir=place) as folder:
        tiny = dataclasses.replace(
            config,
            rounds=1,
            prompts_per_round=2,
            minibatches=1,
            generation=generation,
            trackers=[],
            output_dir=folder,
            checkpoints=dataclasses.replace(config.checkpoints, every=1),
        )
        trainer = build_trainer(tiny, data)
        (row,) = trainer.train()
    measured = "\n".join(f"  {name}: {value:.4g}" for name, value in row.items() if name != "round")
    resolved = config_to_yaml(dataclasses.replace(config, precision=trainer.config.precision, r2m=trainer.config.r2m))
    return f"{resolved}\none round of 2 prompts x {config.num_generations} responses:\n{measured}"


def evaluate_run(folder: str | Path, which: str = "last", **measured: Any) -> str:
    """Measure a checkpoint of a run on held-out prompts and pairs, by default those of its config; returns a report.

    which: "last", "best" (by the judge) or a round. measured: keys of `evaluation` in place of the run's.
    """
    config, checkpoint = run_to_evaluate(folder, which, **measured)
    trainer = build_trainer(config)
    with waiting("loading the checkpoint"):
        round_ = load_checkpoint(trainer.run, checkpoint, to_train=False, key="checkpoint")
    measures, rollout, batch = trainer.evaluate(trainer.evaluator.prompts)
    judge = trainer.evaluator.judge
    with waiting("judge"):
        judged = None if judge is None else judge_scores(judge, rollout.prompts, rollout.completions)
    names = {
        "reward/mean": "reward (w = Omega)",
        "reward/initial": "initial reward model's score",
        "policy/kl": "KL to the reference (nats / response)",
        "policy/reference_log_prob": "reference log-likelihood (nats / token)",
        "policy/entropy": "entropy (nats / token)",
        "length/mean": "length (tokens)",
        "length/eos_share": "share of responses that end",
    }
    report = {label: measures[key] for key, label in names.items()}
    if judged is not None:
        report["judge"] = sum(judged) / len(judged)
    if trainer.evaluator.pairs is not None:
        report["reward model's pair accuracy, w = 1"] = trainer.held_out_accuracy(1.0)
        report["reward model's pair accuracy, w = Omega"] = trainer.held_out_accuracy()
    text = "\n".join(f"  {label}: {value:.4g}" for label, value in report.items())
    title = f"{checkpoint.name} (round {round_} of {config.rounds}) on {len(rollout.prompts)} held-out prompts"
    return f"{title}\n{text}\n\n{sample_table(rollout, batch, 8, judged)}"


def _load(key: str, load: Callable[..., Any], name: str, **options: Any) -> Any:
    """What a key of the config names, None for "". Errors name the key, and progress says what is being loaded."""
    with waiting(f"loading {key}"):
        return named(key, load, name, **options)


def _check_device(key: str, name: str | None) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{key} is {name!r}, which cannot be used: {str(error).splitlines()[0]}") from None


# ---- fitting a reward model ----


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
    with new_folder(output):
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
        model = _load(
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
            loaded_policy = _load("policy", AutoModelForCausalLM.from_pretrained, str(policy), dtype=dtype, **where)
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


def split_pairs(pairs: list[Preference], seed: int, count: int) -> tuple[list[Preference], list[Preference]]:
    """All but a random `count`, and these; the pairs of one prompt stay together where prompts are many."""
    by_prompt: dict[str, list[Preference]] = {}
    for pair in pairs:
        by_prompt.setdefault(json.dumps(pair.prompt), []).append(pair)
    groups = list(by_prompt.values())
    if min(map(len, groups)) > count:  # few prompts for all pairs: they say nothing
        groups = [[pair] for pair in pairs]
    random.Random(seed).shuffle(groups)
    training: list[Preference] = []
    held_out: list[Preference] = []
    for group in groups:
        (held_out if len(held_out) + len(group) <= count else training).extend(group)
    return training, held_out
