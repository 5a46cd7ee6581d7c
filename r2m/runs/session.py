"""A run from its first round to its last: its folder, what is written after each round, how it stops and goes on."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from r2m import processes
from r2m.config import config_to_yaml
from r2m.data.sources import Prompt
from r2m.policy.generate import GeneratorFailed
from r2m.policy.rollout import Annotations, Rollout
from r2m.policy.self_check import check_policy
from r2m.runs.checkpoint import (
    RunState,
    append_row,
    checkpoint_to_resume,
    claim,
    cut_back,
    how_to_go_on,
    load_checkpoint,
    save_checkpoint,
)
from r2m.runs.evaluator import Evaluator
from r2m.runs.folder import METRICS, SAMPLES, WARNINGS, best_round, check_unused, checkpoints
from r2m.runs.monitor import (
    best_and_worst,
    on_warning,
    report_start,
    sample_table,
    start_trackers,
    warn_about_clipping,
    warn_about_degenerate_groups,
    warn_about_drift,
    warn_about_exploitation,
    warn_about_labels,
)
from r2m.runs.sigterm import Sigterm, Terminated, on_sigterm

logger = logging.getLogger(__name__)

# (prompts, completions) of a round -> extra columns of its metrics row
SampleMetrics = Callable[[list[Prompt], list[str]], dict[str, float]]

_SIGTERM_STATUS = 128 + signal.SIGTERM  # as a shell reports it


class Session:
    def __init__(self, run: RunState, evaluator: Evaluator, sample_metrics: SampleMetrics | None = None):
        self.run, self.evaluator, self.sample_metrics = run, evaluator, sample_metrics
        self.accelerator = Accelerator(log_with=run.config.trackers or None, project_dir=run.folder)
        self.sigterm = Sigterm()
        self.t = 0  # the round that runs

    @contextmanager
    def open(self, resume_from: str | Path | None) -> Iterator[tqdm]:
        """The rounds that are left to run, as a progress bar. What it raises: see `R2MTrainer.train`."""
        run = self.run
        with processes.ends_all(), claim(run.folder), on_sigterm(self.sigterm), logging_redirect_tqdm():
            first_round = self._restore(resume_from)
            self.bar = tqdm(
                range(first_round, run.config.rounds + 1),
                initial=first_round - 1,
                total=run.config.rounds,
                unit="round",
                disable=processes.index() > 0,
            )
            with on_warning(self._keep_warning) if processes.index() == 0 else nullcontext():
                yield self.bar
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _keep_warning(self, message: str) -> None:
        append_row(self.run.folder / WARNINGS, {"round": self.t, "message": message})

    def _restore(self, resume_from: str | Path | None) -> int:
        """Restore the checkpoint, if any, and cut the folder back to the rounds before; returns the first to run."""
        run, checkpoint, first_round = self.run, None, 1
        if resume_from is None:
            check_unused(run.folder)
        else:
            checkpoint = checkpoint_to_resume(run.config, resume_from)
        if checkpoint is not None:
            first_round += load_checkpoint(run, checkpoint)
        # Not before: a sharded policy would keep the weights that its passes have gathered.
        check_policy(run.scorer.learner, run.prompt_ids, run.scorer.reward_model.config.policy_width)
        processes.wait()  # all have read what the first now changes
        if processes.index() == 0:
            run.history = cut_back(run.folder, first_round)
            (run.folder / "config.yaml").write_text(config_to_yaml(run.config))
            start_trackers(self.accelerator, run.config, first_round)
        run.history = processes.from_first(run.history)
        if checkpoint is not None:
            logger.info("resumed from %s: %d rounds to go", checkpoint, run.config.rounds - first_round + 1)
        return first_round

    @contextmanager
    def saved_if_stopped(self, t: int) -> Iterator[None]:
        """Round t - 1 is what counts if round t is interrupted or fails."""
        self.t = t
        try:
            yield
        except Terminated:
            if t - 1 not in {0, *checkpoints(self.run.folder)}:
                save_checkpoint(self.run, t - 1)
            raise SystemExit(_SIGTERM_STATUS) from None
        except GeneratorFailed as error:
            raise GeneratorFailed(f"round {t}: {error}; {how_to_go_on(self.run.folder)}") from error
        except FloatingPointError as error:
            last = max(checkpoints(self.run.folder).items(), default=(0, "none"))[1]
            raise FloatingPointError(f"{error}; last good checkpoint: {last}") from error

    def finish(self, t: int, row: dict[str, float], rollout: Rollout, batch: Annotations) -> bool:
        """Measure, write and say what is due after round t; whether training ends with it."""
        config, history = self.run.config, self.run.history
        for schedule in self.run.schedules:
            schedule.step()
        if self.sample_metrics:
            texts = [processes.gather_items(x, config.num_generations) for x in (rollout.prompts, rollout.completions)]
            row |= self.sample_metrics(*texts) if processes.index() == 0 else {}
        if t % config.evaluation.every == 0 or t in (1, config.rounds):
            row |= self.evaluator.held_out()
        row |= processes.from_first(row)
        history.append(row)
        samples = best_and_worst(rollout, batch)
        if processes.index() == 0:
            append_row(self.run.folder / SAMPLES, {"round": t} | samples)
            append_row(self.run.folder / METRICS, row)
        self.accelerator.log(row, step=t)
        shown = {"reward": "reward/mean", "kl": "policy/kl", "entropy": "policy/entropy"}
        self.bar.set_postfix({name: f"{row[key]:.3f}" for name, key in shown.items()})
        if t == 1:
            report_start(row, config)
        if config.evaluation.samples_every and t % config.evaluation.samples_every == 0:
            logger.info("samples of round %d:\n%s", t, sample_table(rollout, batch))
        warn_about_drift(history)
        warn_about_degenerate_groups(history)
        warn_about_exploitation(history)
        warn_about_clipping(history)
        warn_about_labels(history)
        return self._is_last(t, row)

    def _is_last(self, t: int, row: dict[str, float]) -> bool:
        config, limit = self.run.config, self.run.config.evaluation.stop_at_kl
        stopped = limit is not None and row["policy/kl"] > limit
        if stopped:
            logger.warning(
                "round %d: KL %.3f is above evaluation.stop_at_kl %g; training ends", t, row["policy/kl"], limit
            )
        every = config.checkpoints.every
        is_best = best_round(self.run.history) == t
        terminated = processes.anywhere(self.sigterm.received)
        if terminated or (every and (t % every == 0 or t == config.rounds or stopped or is_best)):
            save_checkpoint(self.run, t)
        if terminated:
            processes.wait()  # a launcher ends all where one has left, and the first may still be writing
            raise SystemExit(_SIGTERM_STATUS)
        return stopped
