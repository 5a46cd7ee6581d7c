"""RLOO, GRPO, ReMax and REINFORCE++ with R2M: the training round of the paper's Algorithm 1.

for t in 1..T:
    sample               step 1: K responses to each of n prompts from the current policy
    scorer.prepare       the reward model's queries (equations 1-3 absorbed), the reference's log-probabilities
    run_epoch            steps 2 to 4: rewards with policy feedback and advantages; k epochs, the last of which
                         refreshes the feedback
    labels.ask           fresh labels of a few pairs, where there is a labeller (not in the paper)
    align_reward_model   step 5: pairs, GREBT, one step on the reward model's small part (equations 4-6)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r2m import processes, progress
from r2m.algorithms import ALGORITHMS
from r2m.cards import write_policy_card
from r2m.config import R2MConfig
from r2m.data.order import prompts_of_round, round_seed
from r2m.data.sources import Preference, Prompt, check_list
from r2m.data.tokenization import usable_prompts
from r2m.devices import resolve_precision
from r2m.integrations.vllm import VLLM
from r2m.integrations.vllm_server import VLLMServer
from r2m.method.backbone import hidden_width
from r2m.method.reward_model import R2MRewardModel
from r2m.method.updater import R2MUpdater
from r2m.policy.generate import GenerateFn, Generator
from r2m.policy.learner import Learner
from r2m.policy.load import check_tokens
from r2m.policy.rollout import Annotations, Rollout
from r2m.preferences.store import FreshLabels
from r2m.progress import track
from r2m.runs.checkpoint import RunState
from r2m.runs.evaluator import Evaluator
from r2m.runs.judge import Judge
from r2m.runs.monitor import check_trackers, describe_samples, padding, phase, timed, warn_about_settings
from r2m.runs.session import SampleMetrics, Session
from r2m.scoring import Scorer


class R2MTrainer:
    """Trains `policy` on `prompts` against `reward_model`, and the reward model's small part on the policy's own
    samples.

    policy: a transformers causal LM or a PEFT model; its trainable weights are float32. A frozen copy of it (for an
        adapter: of the adapter) is the KL reference.
    reward_model: its trainable part on the device of the policy.
    prompts: text or chat messages; those above `generation.max_prompt_tokens` are dropped and counted.
    generator: what samples in place of `generation.engine`: a `Generator` (r2m.policy.generate), or a function
        (prompt_ids, K) -> ids of the responses; ReMax takes no function, since it only samples.
    eval_prompts: held-out prompts, sampled once each, every `evaluation.every` rounds.
    judge: (prompts, responses) -> scores, asked on the held-out prompts; the checkpoint it likes best is kept.
    held_out_pairs: human preferences on which the reward model's accuracy is measured as often.
    sample_metrics: extra metrics from the samples of every round.

    Raises TypeError for text where a list is expected, and for a judge or generator that is none; ValueError for no
    prompts, a reward model whose head is random (`R2MRewardModel.head_is_new`), a judge without eval_prompts, ReMax
    with a function as generator, a reward model of another width, on another device or whose chat template refuses the
    prompts, or trainable weights that are not float32; ImportError for a tracker that is not installed;
    FloatingPointError, naming phase and round, as soon as a loss is not finite; GeneratorFailed for what a generator
    raises.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        reward_model: R2MRewardModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Prompt],
        config: R2MConfig,
        *,
        generator: Generator | GenerateFn | None = None,
        eval_prompts: list[Prompt] | None = None,
        judge: Judge | None = None,
        held_out_pairs: Sequence[Preference] | None = None,
        sample_metrics: SampleMetrics | None = None,
    ):
        # A copy, checked as a whole: keys may have been assigned one by one.
        config = resolve_precision(dataclasses.replace(config), next(policy.parameters()).device)
        self.config, self.policy, self.reward_model, self.tokenizer = config, policy, reward_model, tokenizer
        check_list("prompts", prompts, "load_prompts")
        check_list("eval_prompts", eval_prompts, "load_prompts")
        check_list("held_out_pairs", held_out_pairs, "load_pairs")
        if judge is not None and not callable(judge):
            raise TypeError(f"judge is {judge!r}; expected a function: r2m.names.load_function makes one of a name")
        if judge is not None and not eval_prompts:
            raise ValueError("judge is given without eval_prompts; expected the held-out prompts it is asked about")
        self.algorithm = ALGORITHMS[config.algorithm]
        is_function = generator is not None and not isinstance(generator, Generator)
        if is_function and not callable(generator):
            raise TypeError(
                f"generator is {generator!r}; expected `update` and `generate`, or a function (prompt_ids, K)"
            )
        if generator is not None and config.generation.engine != "transformers":
            raise ValueError(
                f"generation.engine is {config.generation.engine!r}, and a generator is given; expected one of them"
            )
        if is_function and self.algorithm.needs_greedy:
            raise ValueError(
                f"algorithm is {config.algorithm!r}, and generator is a function, which only samples; expected none, "
                "or an object with `update` and `generate`, which is told to be greedy"
            )
        check_trackers(config.trackers)
        processes.start(config.placement.timeout)
        config.check_processes(processes.number())
        limit = config.generation.max_prompt_tokens
        self.prompts, self.prompt_ids = usable_prompts(tokenizer, prompts, limit)
        eval_prompts, eval_ids = usable_prompts(tokenizer, eval_prompts, limit) if eval_prompts else ([], [])
        check_tokens(policy, tokenizer, [*self.prompt_ids, *eval_ids], config.generation.max_new_tokens)
        reward_model.check_policy_width(hidden_width(policy))
        reward_model.check_prompts([*self.prompts, *eval_prompts])

        if config.generation.server is not None:
            generator = VLLMServer(policy, config)
        elif config.generation.engine == "vllm":
            generator = VLLM(policy, tokenizer, config)
        self.learner = Learner(policy, tokenizer, config, generator)
        self._check_devices()
        self.updater = R2MUpdater(
            reward_model, config.r2m, total_steps=config.rounds, num_generations=config.num_generations
        )
        self.labels: FreshLabels | None = None
        if config.preferences.labeller is not None:
            self.labels = FreshLabels(self.updater, config.preferences, folder=config.output_dir, seed=config.seed)
        processes.keep_equal(reward_model)
        self.scorer = Scorer(self.learner, reward_model, self.updater, config)
        stepping = [self.learner.optimizer, self.updater.optimizer][: 2 if config.r2m.trains else 1]
        factor = partial(lr_factor, config.lr_schedule, config.warmup_rounds, config.rounds)
        schedules = [LambdaLR(optimizer, factor) for optimizer in stepping]
        self.run = RunState(config, self.scorer, schedules, self.prompts, self.prompt_ids, self.labels)
        self.evaluator = Evaluator(self.scorer, config, prompts=eval_prompts, pairs=held_out_pairs, judge=judge)
        self.session = Session(self.run, self.evaluator, sample_metrics)
        self.first_epoch = config.first_epoch
        warn_about_settings(config, has_adapter=isinstance(policy, PeftModel))

    # ---- Algorithm 1 ----

    def train(self, resume_from: str | Path | None = None) -> list[dict[str, float]]:
        """Run rounds 1..T; returns metrics.jsonl's rows, one a round.

        resume_from: a checkpoint folder, or "last": the newest one in output_dir, or the start where there is none. The
        rounds after it are taken out of the folder and run again.

        On SIGTERM the run saves a checkpoint and raises SystemExit, at once while it samples and scores, else at the
        end of the round. Raises OSError if output_dir cannot be written, is another run's, or holds rounds already.
        """
        with self.session.open(resume_from) as rounds:
            for t in rounds:
                with self.session.saved_if_stopped(t), progress.phase(f"round {t} of {self.config.rounds}"):
                    row, rollout, batch = self.round(t)
                    if self.session.finish(t, row, rollout, batch):
                        break
        return self.history

    def round(self, t: int) -> tuple[dict[str, float], Rollout, Annotations]:
        """Round t of 1..T; returns its measures, its samples and what is known of them. Nothing is written
        but labels."""
        row: dict[str, float] = {"round": t}
        device = self.learner.device
        processes.seed(round_seed(self.config.seed, t))
        with self.session.sigterm.interrupts():  # until weights move
            with phase("rollout", row, device):
                rollout = self.sample(t)
            with phase("annotate", row, device):
                batch = self.annotate(rollout, t, row)
        with phase("policy", row, device):
            self.optimize_policy(rollout, batch, t, row)
        if self.labels is not None:
            row |= self.labels.ask(rollout.prompts, rollout.completions, batch.rewards, t)
        with phase("reward_model", row, device):
            self.align_reward_model(batch, t, row)
        return row, rollout, batch

    def sample(self, t: int) -> Rollout:
        """Step 1: K responses to each of n prompts, by temperature alone; for ReMax the greedy one to each as well.

        Each of several processes takes its share of the prompts.
        """
        picked = processes.share(self._picked(t))
        prompts, prompt_ids = [self.prompts[i] for i in picked], [self.prompt_ids[i] for i in picked]
        rollout = self.learner.sample(prompts, self.config.num_generations, prompt_ids)
        if self.algorithm.needs_greedy:
            rollout.greedy = self.learner.sample(prompts, 1, prompt_ids, greedy=True)
        return rollout

    def annotate(self, rollout: Rollout, t: int, row: dict[str, float]) -> Annotations:
        """Steps 2 and 3: rewards with policy feedback, log-probabilities and advantages, from the first pass of the
        policy over the round; `seconds/first_epoch` is the time of that pass where it is the first epoch's, too."""
        batch = self.scorer.prepare(rollout, t, self.learner.minibatches(rollout))
        self.run_epoch(rollout, batch, t, self.first_epoch, row)
        row |= describe_samples(rollout, batch, self.config) | padding(rollout, batch)
        if self.config.r2m.attends:
            row |= {"weight": self.updater.weight, "reward/correlation": self.updater.alignment(batch.initial).item()}
        return batch

    def optimize_policy(self, rollout: Rollout, batch: Annotations, t: int, row: dict[str, float]) -> None:
        """Step 4: what is left of the k epochs (equation 7)."""
        for epoch in range(self.first_epoch + 1, self.config.epochs + 1):
            self.run_epoch(rollout, batch, t, epoch, row)
        passes = self.config.epochs * len(rollout.prompts)
        row |= processes.mean({f"policy/{name}": (v / passes).item() for name, v in batch.totals.items()})

    def run_epoch(self, rollout: Rollout, batch: Annotations, t: int, epoch: int, row: dict[str, float]) -> None:
        """One pass of the policy over the round. The first scores, the last refreshes the feedback for free; all but
        epoch 0 train the policy."""
        learner, scorer = self.learner, self.scorer
        scores, refreshes, trains = epoch == self.first_epoch, epoch == self.config.epochs, epoch > 0
        what = progress.phase(f"epoch {epoch} of {self.config.epochs}" if trains else "policy")
        clock = timed("first_epoch", row, learner.device) if scores and trains else nullcontext()
        with what, clock, learner.training() if trains else nullcontext(), torch.set_grad_enabled(trains):
            for minibatch in track(learner.ordered(batch.minibatches, t, epoch), "minibatch"):
                for micro_batch in track(minibatch, "micro-batch"):
                    with learner.averages_gradients(last=micro_batch is minibatch[-1]):
                        feed = scorer.feed(batch, scores=scores, collects=refreshes)  # h goes on as it is made
                        log_probs = list[Tensor]()
                        for part in micro_batch:
                            logits = learner.logits(part, feed)
                            log_probs.append(learner.log_probs(logits, part))
                            if scores:
                                scorer.take(batch, part, log_probs[-1], logits)
                        rows = torch.cat([part.rows for part in micro_batch])
                        if scores and trains:
                            scorer.assign_credit(rollout, batch, rows.sort().values)  # whole groups
                        if trains:
                            learner.backward(torch.cat(log_probs), rollout, batch, rows)
                if scores:
                    scorer.check_finite(batch, t)
                if trains:
                    self.session.sigterm.hold()
                    row["policy/grad_norm"] = learner.step(t, epoch)
            if scores and not trains:
                scorer.assign_credit(rollout, batch)

    def align_reward_model(self, batch: Annotations, t: int, row: dict[str, float]) -> None:
        """Step 5: GREBT on rewards recomputed from the refreshed feedback, beside it the labels; the backbone and the
        policy do not run."""
        if self.config.r2m.feedback == "none":
            return
        labels_loss = None if self.labels is None else self.labels.loss()
        try:
            row |= processes.mean(self.updater.step(batch.scores, labels_loss, grebt=self.config.preferences.grebt))
        except FloatingPointError as error:
            raise FloatingPointError(f"phase reward_model, round {t}: {error}") from None

    # ---- the rest ----

    @property
    def history(self) -> list[dict[str, float]]:
        """metrics.jsonl's rows."""
        return self.run.history

    def prompts_of_round(self, t: int) -> list[Prompt]:
        """The n prompts of round t, a function of the seed and t alone."""
        return [self.prompts[i] for i in self._picked(t)]

    def _picked(self, t: int) -> list[int]:
        return prompts_of_round(len(self.prompts), self.config.prompts_per_round, self.config.seed, t)

    def evaluate(
        self, prompts: list[Prompt], num_generations: int = 1
    ) -> tuple[dict[str, float], Rollout, Annotations]:
        """Sample responses to each prompt and score them as round T would (w = Omega); nothing is trained.

        Returns the measures that a round logs (those inside groups from 2 generations on), the samples and what is
        known of them. The random numbers are the same in every call. Of several processes each samples a share, and
        returns the measures of all and its own samples. A reward model that still lacks its statistics is standardised
        by these samples, and lacks them again afterwards.
        """
        check_list("prompts", prompts, "load_prompts")
        return self.evaluator.measure(prompts, num_generations)

    def evaluate_held_out(self) -> dict[str, float]:
        """The measures of a metrics row on what training never sees: `eval/*` on the prompts, `rm/pair_accuracy`."""
        return self.evaluator.held_out()

    def held_out_accuracy(self, weight: float | None = None) -> float:
        """Accuracy of the reward model on the held-out pairs with the feedback of the policy as it is now.

        weight: the fusion weight w, by default 1 without feedback (where nothing else is possible) and Omega with it.
        """
        return self.evaluator.pair_accuracy(weight)

    def save_pretrained(self, folder: str | Path) -> None:
        """The trained policy (or adapter), tokenizer, and reward model, as `from_pretrained` loads them, with cards."""
        folder = Path(folder)
        self.learner.save_pretrained(folder / "policy")
        if processes.index() == 0:
            write_policy_card(folder / "policy", self.config, self.history)
            self.reward_model.save_pretrained(folder / "reward_model")

    def _check_devices(self) -> None:
        own, other, place = self.learner.device, self.reward_model.head.weight.device, self.config.placement
        if own != other:
            raise ValueError(f"reward_model is on {other}, the policy on {own}; expected one device")
        if processes.number() > 1 and place.device not in (None, own.type):
            raise ValueError(
                f"placement.device is {place.device!r} in each of {processes.number()} processes; expected none, or "
                f"{own.type!r}: each takes the one of its number"
            )


def lr_factor(schedule: str, warmup: int, rounds: int, done: int) -> float:
    """Share of the learning rate after `done` of `rounds` rounds. No round is without: transformers' schedules give the
    first of a warm-up none, and with R2M a round is hundreds of samples."""
    if done < warmup:
        return (done + 1) / (warmup + 1)
    share = (done - warmup) / max(1, rounds - warmup)
    factors = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    if schedule not in factors:
        raise ValueError(f"schedule is {schedule!r}; expected {', '.join(map(repr, factors))}")
    return factors[schedule]
