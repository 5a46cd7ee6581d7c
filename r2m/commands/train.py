"""`r2m train`: a run from its config to its folder, or one tiny round of it."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

from r2m import processes
from r2m.commands.build import build_trainer, load_data, with_saved_part
from r2m.config import R2MConfig, config_to_yaml
from r2m.devices import resolve_precision
from r2m.plots import plot_run
from r2m.progress import waiting
from r2m.runs.checkpoint import checkpoint_to_resume, claim, how_to_go_on
from r2m.runs.folder import best_round, check_unused, judge_is_undecided

logger = logging.getLogger(__name__)


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
