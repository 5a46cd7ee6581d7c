"""RLOO, GRPO, ReMax and REINFORCE++ with R2M: the training round of the paper's Algorithm 1, one function a phase.

sample              K responses to each of n prompts from the current policy
annotate            rewards with policy feedback (equations 1-3), log-probabilities, advantages
optimize_policy     k epochs; the last one's forward passes refresh the feedback
align_reward_model  pairs, GREBT, one step on the reward model's small part (equations 4-6)
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r2m import processes, progress
from r2m.commands.export import write_policy_card
from r2m.config import GROUP_METHODS, R2MConfig, config_to_yaml
from r2m.data.sources import Preference, Prompt, check_list
from r2m.data.tokenization import usable_prompts
from r2m.devices import resolve_precision
from r2m.fitting.recipe import (
    embed_pairs,
    feature_statistics,
    pair_accuracy,
    score_rollout,
    stream_hidden,
    tokenize_pairs,
)
from r2m.method.hidden_states import HiddenStateTap
from r2m.method.reward_model import R2MRewardModel, hidden_width
from r2m.method.updater import R2MUpdater
from r2m.policy.advantages import assign_credit, less_unfinished
from r2m.policy.load import check_tokens, compact_head_input, disable_dropout, freeze_reference, training_mode
from r2m.policy.loss import policy_loss, sequence_kl, token_entropy, token_log_probs
from r2m.policy.rollout import Annotations, Rollout, RolloutFn, sample
from r2m.policy.self_check import check_policy
from r2m.progress import track, waiting
from r2m.runs.checkpoint import (
    append_metrics,
    best_round,
    check_unused,
    checkpoint_to_resume,
    checkpoints,
    claim,
    cut_back,
    load_checkpoint,
    origin_of,
    save_checkpoint,
)
from r2m.runs.judge import Judge, mean_score
from r2m.runs.monitor import (
    check_trackers,
    describe_samples,
    phase,
    report_start,
    sample_table,
    start_trackers,
    timed,
    warn_about_clipping,
    warn_about_degenerate_groups,
    warn_about_drift,
    warn_about_exploitation,
    warn_about_settings,
)
from r2m.runs.sigterm import Sigterm, Terminated, on_sigterm

logger = logging.getLogger(__name__)

_SIGTERM_STATUS = 128 + signal.SIGTERM  # as a shell reports it

# (prompts, completions) of a round -> extra columns of its metrics row
SampleMetrics = Callable[[list[Prompt], list[str]], dict[str, float]]
# Consumes the hidden states of one micro-batch: (rows, hidden [b, S, D_p], mask [b, S])
Consume = Callable[[slice, Tensor, Tensor], Any]


class R2MTrainer:
    """Trains `policy` on `prompts` against `reward_model`, and the reward model's small part on the policy's own
    samples.

    policy: a transformers causal LM or a PEFT model; its trainable weights are float32. A frozen copy of it (for an
        adapter: of the adapter) is the KL reference.
    reward_model: its trainable part on the device of the policy.
    prompts: text or chat messages; those above `generation.max_prompt_tokens` are dropped and counted.
    rollout_fn: another generator in place of transformers' generate; not with ReMax, since it only samples.
    eval_prompts: held-out prompts, sampled once each, every `evaluation.every` rounds.
    judge: (prompts, responses) -> scores, asked on the held-out prompts; the checkpoint it likes best is kept.
    held_out_pairs: human preferences on which the reward model's accuracy is measured as often.
    sample_metrics: extra metrics from the samples of every round.

    Raises TypeError for text where a list is expected, and for a judge that is no function; ValueError for no prompts,
    a reward model whose head is random (`R2MRewardModel.head_is_new`), a judge without eval_prompts, ReMax with a
    rollout_fn, a reward model of another width, on another device or whose chat template refuses the prompts, or
    trainable weights that are not float32; ImportError for a tracker that is not installed; FloatingPointError, naming
    phase and round, as soon as a loss is not finite.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        reward_model: R2MRewardModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Prompt],
        config: R2MConfig,
        *,
        rollout_fn: RolloutFn | None = None,
        eval_prompts: list[Prompt] | None = None,
        judge: Judge | None = None,
        held_out_pairs: list[Preference] | None = None,
        sample_metrics: SampleMetrics | None = None,
    ):
        # A copy, checked as a whole: keys may have been assigned one by one.
        config = resolve_precision(dataclasses.replace(config), next(policy.parameters()).device)
        self.config, self.tokenizer, self.reward_model = config, tokenizer, reward_model
        self.rollout_fn, self.sample_metrics, self.judge = rollout_fn, sample_metrics, judge
        check_list("prompts", prompts, "load_prompts")
        check_list("eval_prompts", eval_prompts, "load_prompts")
        check_list("held_out_pairs", held_out_pairs, "load_pairs")
        if judge is not None and not callable(judge):
            raise TypeError(f"judge is {judge!r}; expected a function: r2m.runs.judge.load_judge makes one of a name")
        check_trackers(config.trackers)
        processes.start(config.placement.timeout)
        config.check_processes(processes.number())
        if judge is not None and not eval_prompts:
            raise ValueError("judge is given without eval_prompts; expected the held-out prompts it is asked about")
        if config.algorithm == "remax" and rollout_fn is not None:
            raise ValueError(
                "algorithm is 'remax' with a rollout_fn, which only samples; "
                "expected none, so that the greedy responses can be generated too"
            )
        limit = config.generation.max_prompt_tokens
        self.prompts, self.prompt_ids = usable_prompts(tokenizer, prompts, limit)
        self.eval_prompts, eval_ids = usable_prompts(tokenizer, eval_prompts, limit) if eval_prompts else ([], [])
        check_tokens(policy, tokenizer, [*self.prompt_ids, *eval_ids], config.generation.max_new_tokens)
        reward_model.check_policy_width(hidden_width(policy))
        reward_model.check_prompts([*self.prompts, *self.eval_prompts])
        compact_head_input(policy)
        if config.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        place = config.placement
        if place.shard_policy and isinstance(policy, PeftModel):
            raise ValueError("placement.shard_policy is true with an adapter; expected false, or a policy without one")
        self.reference = freeze_reference(policy, offload=place.offload_reference, shard=place.shard_policy)
        disable_dropout(policy)  # the reference adapter's too
        policy.eval()  # but where activations are recomputed: see `training_mode`
        if place.shard_policy:
            processes.shard(policy)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("policy has no trainable weights; an adapter has to be loaded with is_trainable=True")
        self.updater = R2MUpdater(
            reward_model, config.r2m, total_steps=config.rounds, num_generations=config.num_generations
        )
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.parameters[0].is_cuda or None,  # the default there makes temporaries of the size of all weights
        )
        stepping = [optimizer, self.updater.optimizer] if config.r2m.trains else [optimizer]
        self.schedules = [
            LambdaLR(steps, partial(lr_factor, config.lr_schedule, config.warmup_rounds, config.rounds))
            for steps in stepping
        ]
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(log_with=config.trackers or None, project_dir=self.output_dir)
        # `wrapped` runs the passes whose gradients are averaged over processes, `policy` itself all others.
        self.policy, self.optimizer = policy, optimizer
        self.wrapped = policy if place.shard_policy else processes.replicate(policy)
        self.device = self.parameters[0].device
        self._check_weights()
        processes.keep_equal(reward_model)
        self.initial_head = copy.deepcopy(reward_model.head)  # its score is comparable across rounds and runs
        # With one optimizer step an epoch, all of the first epoch runs on the weights that sampled: its forward passes
        # are the scoring pass, if each knows its advantages: of whole groups, of ReMax, whose baseline is known before.
        whole_groups = config.algorithm in GROUP_METHODS and config.micro_batch_size % config.num_generations == 0
        self.scores_in_first_epoch = config.minibatches == 1 and (whole_groups or config.algorithm == "remax")
        self.history: list[dict[str, float]] = []
        self.held_out: tuple[Tensor, Rollout] | None = None
        if held_out_pairs:
            self.pairs_held_out = len(held_out_pairs)
            own = processes.share(held_out_pairs)
            self.held_out = self._embed_pairs(own), tokenize_pairs(policy, tokenizer, own, config.r2m.positions)
        warn_about_settings(config, has_adapter=isinstance(policy, PeftModel))

    # ---- Algorithm 1 ----

    def train(self, resume_from: str | Path | None = None) -> list[dict[str, float]]:
        """Run rounds 1..T; returns metrics.jsonl's rows, one a round.

        resume_from: a checkpoint folder, or "last": the newest one in output_dir, or the start where there is none. The
        rounds after it are taken out of the folder and run again.

        On SIGTERM the run saves a checkpoint and raises SystemExit, at once while it samples and scores, else at the
        end of the round. Raises OSError if output_dir cannot be written, is another run's, or holds rounds already.
        """
        with processes.ends_all(), claim(self.output_dir), on_sigterm() as sigterm, logging_redirect_tqdm():
            first_round = self._open_output(resume_from)
            rounds = tqdm(
                range(first_round, self.config.rounds + 1),
                initial=first_round - 1,
                total=self.config.rounds,
                unit="round",
                disable=processes.index() > 0,
            )
            for t in rounds:
                row: dict[str, float] = {"round": t}
                self._set_seed(self.config.seed * 1_000_003 + t)  # a round's noise depends on nothing before it
                with self._saved_if_stopped(t), progress.phase(f"round {t} of {self.config.rounds}"):
                    # Nothing has moved yet; but one process must not leave while others wait for it.
                    with sigterm.interrupts() if processes.number() == 1 else nullcontext():
                        with phase("rollout", row, self.device):
                            rollout = self.sample(t)
                        with phase("annotate", row, self.device):
                            batch = self.annotate(rollout, t, row, first_epoch=self.scores_in_first_epoch)
                    with phase("policy", row, self.device):
                        self.optimize_policy(rollout, batch, t, row)
                    with phase("reward_model", row, self.device):
                        self.align_reward_model(batch, t, row)
                    self._finish_round(rollout, batch, row, rounds)
                    if self._is_last(t, row, sigterm):
                        break
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return self.history

    def sample(self, t: int) -> Rollout:
        """Step 1: K responses to each of n prompts, by temperature alone; for ReMax the greedy one to each as well.

        Each of several processes takes its share of the prompts.
        """
        picked = processes.share(self._picked(t))
        prompts, prompt_ids = [self.prompts[i] for i in picked], [self.prompt_ids[i] for i in picked]
        rollout = self._sample(prompts, self.config.num_generations, prompt_ids)
        if self.config.algorithm == "remax":
            rollout.greedy = self._sample(prompts, 1, prompt_ids, greedy=True)
        return rollout

    @torch.no_grad()
    def annotate(self, rollout: Rollout, t: int, row: dict[str, float], *, first_epoch: bool = False) -> Annotations:
        """Steps 2 and 3: rewards with policy feedback, and advantages.

        One forward pass of the policy gives old log-probabilities and, on the way, the hidden states that the rewards
        need. With `first_epoch` (see `scores_in_first_epoch`) it is that epoch's pass too: as soon as a micro-batch has
        its advantages its loss goes backward, and `optimize_policy` goes on from there; `seconds/first_epoch` is the
        time of that pass, forward and backward.
        """
        config = self.config
        micro_batches = list(chain(*self._minibatches(len(rollout.prompts))))
        batch = self._blank_annotations(rollout, t, micro_batches)
        if config.algorithm == "remax":
            batch.baseline = self._greedy_scores(rollout).repeat_interleave(config.num_generations)
        refreshes = first_epoch and config.epochs == 1
        if first_epoch:
            training_mode(self.policy)
        totals: dict[str, Tensor] = {}
        what = "first epoch, micro-batch" if first_epoch else "policy, micro-batch"
        with timed("first_epoch", row, self.device) if first_epoch else nullcontext():
            for rows in track(micro_batches, what):
                last = rows is micro_batches[-1]
                with torch.set_grad_enabled(first_epoch), processes.averages_gradients(self.wrapped, last):
                    log_probs = self._score(rollout, batch, rows, refreshes)
                    if first_epoch:
                        assign_credit(rollout, batch, config, rows)
                        self._accumulate(log_probs, rollout, batch, rows, totals)
        self._check_finite(batch, t)
        if first_epoch:
            batch.first_epoch = totals
        else:
            assign_credit(rollout, batch, config)
        row |= describe_samples(rollout, batch, config)
        if config.r2m.attends:
            row |= {"weight": self.updater.weight, "reward/correlation": self.updater.alignment(batch.initial).item()}
        return batch

    def optimize_policy(self, rollout: Rollout, batch: Annotations, t: int, row: dict[str, float]) -> None:
        """Step 4: k epochs over the round (equation 7); the last one's forward passes refresh the feedback for free."""
        config = self.config
        training_mode(self.policy)
        count = len(rollout.prompts)
        minibatches = self._minibatches(count)
        totals = batch.first_epoch or {}
        if batch.first_epoch is not None:
            row["policy/grad_norm"] = self._step_policy(t, 1)
        order = torch.Generator().manual_seed(config.seed * 1_000_003 + t)  # one for all processes
        for epoch in range(1 if batch.first_epoch is None else 2, config.epochs + 1):
            refresh = epoch == config.epochs and self._taps_policy
            picked = torch.randperm(len(minibatches), generator=order).tolist()
            with progress.phase(f"epoch {epoch} of {config.epochs}"):
                for i in track(picked, "minibatch"):
                    for rows in track(minibatches[i], "micro-batch"):
                        with processes.averages_gradients(self.wrapped, rows is minibatches[i][-1]):
                            consume = self.updater.collect if refresh else None
                            logits = self._logits(self.wrapped, rollout, rows, consume)
                            ids = rollout.completion_ids[rows]
                            log_probs = token_log_probs(logits, ids, config.generation.temperature)
                            self._accumulate(log_probs, rollout, batch, rows, totals)
                    row["policy/grad_norm"] = self._step_policy(t, epoch)
        self.policy.eval()
        means = {f"policy/{name}": (v / (config.epochs * count)).item() for name, v in totals.items()}
        row |= processes.mean(means)

    def align_reward_model(self, batch: Annotations, t: int, row: dict[str, float]) -> None:
        """Step 5: GREBT on rewards recomputed from the refreshed feedback; the backbone and the policy do not run."""
        if self.config.r2m.feedback == "none":
            return
        try:
            row |= processes.mean(self.updater.step(batch.scores))
        except FloatingPointError as error:
            raise FloatingPointError(f"phase reward_model, round {t}: {error}") from None

    # ---- forward passes ----

    def _sample(
        self,
        prompts: list[Prompt],
        num_generations: int,
        prompt_ids: list[list[int]] | None = None,
        *,
        greedy: bool = False,
    ) -> Rollout:
        settings = self.config.generation
        if settings.batch_size is None:  # held-out prompts may be more than a round's, whose cache fits
            at_once = self.config.prompts_per_round * self.config.num_generations
            settings = dataclasses.replace(settings, batch_size=at_once)
        with self.autocast():
            return sample(
                self.policy,
                self.tokenizer,
                prompts,
                num_generations,
                settings,
                prompt_ids=prompt_ids,
                positions=self.config.r2m.positions,
                rollout_fn=self.rollout_fn,
                greedy=greedy,
            )

    def _blank_annotations(self, rollout: Rollout, t: int, micro_batches: list[slice]) -> Annotations:
        """The initial reward model's scores, the reference's log-probabilities, and rewards that need no pass of the
        policy; the rest NaN, to be filled in. The updater is ready for round t."""
        rte = self._embed(rollout.prompts, rollout.completions)
        if self.reward_model.needs_statistics:
            self._take_statistics(rte, rollout)
        if self.config.r2m.feedback != "none":
            self.updater.begin_round(rte, t)
        initial = self.initial_head(self.reward_model.standardized(rte))
        batch, consume = Annotations.blank(rollout, initial), None
        if not self.config.r2m.attends:
            batch.rewards.copy_(self.reward_model.vanilla_score(rte))
        elif not self._taps_policy:
            consume = self._feed(batch, collect=True)  # the reference never changes: one pass scores and refreshes
        with self.reference() as reference:
            for rows in track(micro_batches, "reference, micro-batch"):
                logits = self._logits(reference, rollout, rows, consume)
                batch.reference_log_probs[rows] = token_log_probs(
                    logits, rollout.completion_ids[rows], self.config.generation.temperature
                )
        return batch

    def _score(self, rollout: Rollout, batch: Annotations, rows: slice, refreshes: bool = False) -> Tensor:
        """Fill in rewards, log-probabilities and entropy of `rows`; returns the log-probabilities with their graph."""
        consume = self._feed(batch, collect=refreshes) if self._taps_policy else None
        temperature = self.config.generation.temperature
        model = self.wrapped if torch.is_grad_enabled() else self.policy
        logits = self._logits(model, rollout, rows, consume)
        log_probs = token_log_probs(logits, rollout.completion_ids[rows], temperature)
        batch.log_probs[rows], batch.entropy[rows] = log_probs.detach(), token_entropy(logits, temperature)
        return log_probs

    @property
    def _taps_policy(self) -> bool:
        return self.config.r2m.attends and self.config.r2m.source != "reference"

    def _feed(self, batch: Annotations, *, collect: bool) -> Consume:
        """Turns hidden states into rewards, and with `collect` into what the reward model's update needs."""

        def consume(rows: slice, hidden: Tensor, feedback_mask: Tensor) -> None:
            batch.rewards[rows] = self.updater.score(rows, hidden, feedback_mask)
            if collect:
                self.updater.collect(rows, hidden, feedback_mask)

        return consume

    def _greedy_scores(self, rollout: Rollout) -> Tensor:
        """ReMax: rewards [n] of the greedy responses by the reward model, feedback and w(t) of their round's samples.

        As any response one pays for not ending by itself. None pays for its KL: of a sequence that was not sampled the
        log-ratio estimates no KL, and a baseline is unbiased whatever it leaves out.
        """
        greedy = rollout.greedy
        if greedy is None:
            raise ValueError("rollout.greedy is None; expected the greedy responses, as R2MTrainer.sample makes them")
        rte = self._embed(greedy.prompts, greedy.completions)
        weight = self.updater.weight if self.config.r2m.attends else 1.0
        rewards = self.updater.scale * self._score_apart(rte, greedy, weight)
        return less_unfinished(rewards, greedy.finished, self.config.missing_eos_penalty)

    def _score_apart(self, rte: Tensor, rollout: Rollout, weight: float) -> Tensor:
        """Rewards [B] of texts that are no samples of the round, in passes of their own where w < 1 needs them."""
        if weight == 1:
            return self.reward_model.vanilla_score(rte)
        source, batch_size = self.config.r2m.source, self.config.micro_batch_size
        feedback_of = self.reference() if source == "reference" else nullcontext(self.policy)
        with feedback_of as model, self.autocast():
            return score_rollout(
                self.reward_model, model, rte, rollout, weight, batch_size=batch_size, noise=source == "noise"
            )

    def _accumulate(
        self, log_probs: Tensor, rollout: Rollout, batch: Annotations, rows: slice, totals: dict[str, Tensor]
    ) -> None:
        """Add the gradient of the loss of `rows` to the policy's, and loss and statistics to `totals`."""
        config = self.config
        loss, stats = policy_loss(
            log_probs,
            batch.log_probs[rows],
            batch.reference_log_probs[rows],
            batch.advantages[rows],
            rollout.completion_mask[rows],
            algorithm=config.algorithm,
            clip_range=config.clip_range,
            beta=config.kl.beta if config.kl.placement == "loss" else 0.0,
            estimator=config.kl.estimator,
        )
        (loss.sum() * config.minibatches / len(rollout.prompts)).backward()
        for name, value in {"loss": loss.detach(), **stats}.items():
            totals[name] = totals.get(name, 0.0) + value.sum()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _logits(self, model: nn.Module, rollout: Rollout, rows: slice, consume: Consume | None = None) -> Tensor:
        """Logits [b, R, vocabulary] that predict the response tokens; the hidden states go to `consume` on the way."""
        tap: AbstractContextManager[object] = nullcontext()
        if consume is not None:
            tap = HiddenStateTap(model, lambda hidden, _: consume(rows, hidden, rollout.feedback_mask[rows]))
        with tap, self.autocast():
            return model(
                input_ids=rollout.input_ids[rows],
                attention_mask=rollout.attention_mask[rows],
                position_ids=rollout.position_ids[rows],
                logits_to_keep=rollout.completion_mask.shape[1] + 1,
                use_cache=False,
            ).logits[:, :-1]

    def _minibatches(self, count: int) -> list[list[slice]]:
        """The micro-batches of each minibatch. The passes without gradient run the same ones: in bf16 the same rows
        give the same bits, so the first importance ratio is 1."""
        size = count // self.config.minibatches
        return [self._micro_batches(start, start + size) for start in range(0, count, size)]

    def _micro_batches(self, start: int, stop: int) -> list[slice]:
        micro = self.config.micro_batch_size
        return [slice(i, min(i + micro, stop)) for i in range(start, stop, micro)]

    def _step_policy(self, t: int, epoch: int) -> float:
        norm = processes.full(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)).item()
        if not norm < float("inf"):  # NaN too
            raise FloatingPointError(f"phase policy, round {t}, epoch {epoch}: the gradient norm is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    # ---- evaluation ----

    @torch.no_grad()
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
        self._set_seed(self.config.seed)
        with progress.phase("sampling"):
            rollout = self._sample(processes.share(prompts), num_generations)
        micro_batches = self._micro_batches(0, len(rollout.prompts))
        with self._undone():
            batch = self._blank_annotations(rollout, self.config.rounds, micro_batches)
            for rows in track(micro_batches, "policy, micro-batch"):
                self._score(rollout, batch, rows)
        self._check_finite(batch, self.config.rounds)
        batch.scores.copy_(batch.rewards)
        batch.kl.copy_(sequence_kl(batch.log_probs, batch.reference_log_probs, rollout.completion_mask))
        return describe_samples(rollout, batch, self.config, num_generations, len(prompts)), rollout, batch

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Leave the updater's round as it is, and a reward model without statistics, too."""
        updater, self.updater = self.updater, copy.copy(self.updater)  # a new round makes tensors of its own
        changed = [self.reward_model, self.initial_head] if self.reward_model.needs_statistics else []
        states = [copy.deepcopy(module.state_dict()) for module in changed]
        try:
            yield
        finally:
            self.updater = updater
            for module, state in zip(changed, states, strict=True):
                module.load_state_dict(state)

    def evaluate_held_out(self) -> dict[str, float]:
        """The measures of a metrics row on what training never sees: `eval/*` on the prompts, `rm/pair_accuracy`."""
        row: dict[str, float] = {}
        if self.eval_prompts:
            with progress.phase("held-out prompts"):
                measures, rollout, _ = self.evaluate(self.eval_prompts)
            names = {"reward/mean": "reward", "reward/initial": "initial_reward", "policy/kl": "kl"}
            names |= {"length/mean": "length", "length/eos_share": "eos_share"}
            row |= {f"eval/{name}": measures[key] for key, name in names.items()}
            if self.judge is not None:
                completions = processes.gather_items(rollout.completions)[: len(self.eval_prompts)]
                if processes.index() == 0:
                    with waiting("judge"):
                        row["eval/judge"] = mean_score(self.judge, self.eval_prompts, completions)
        if self.held_out is not None:
            row["rm/pair_accuracy"] = self.held_out_accuracy()
        return row

    def held_out_accuracy(self, weight: float | None = None) -> float:
        """Accuracy of the reward model on the held-out pairs with the feedback of the policy as it is now.

        weight: the fusion weight w, by default 1 without feedback (where nothing else is possible) and Omega with it.
        """
        if self.held_out is None:
            raise ValueError("held_out_pairs were not given to the trainer")
        rte, rollout = self.held_out
        if not self.config.r2m.attends:
            weight = 1.0
        elif weight is None:
            weight = self.config.r2m.floor
        with progress.phase("held-out pairs"):
            by_pair = self._score_apart(rte, rollout, weight).unflatten(0, (2, -1)).T
        return pair_accuracy(processes.gather(by_pair)[: self.pairs_held_out].T.flatten())

    # ---- the run's folder ----

    @cached_property
    def origin(self) -> dict[str, Any]:
        return origin_of(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """The trained policy (or adapter), tokenizer, and reward model, as `from_pretrained` loads them, with cards."""
        folder, policy = Path(folder), self.policy
        chosen: dict[str, Any] = {}
        if self.config.placement.shard_policy:
            chosen["state_dict"] = processes.whole(policy.state_dict())
        if processes.index():
            return
        if isinstance(policy, PeftModel):
            chosen["selected_adapters"] = [policy.active_adapter]  # the reference adapter stays out
        policy.save_pretrained(str(folder / "policy"), **chosen)
        self.tokenizer.save_pretrained(folder / "policy")
        write_policy_card(folder / "policy", self.config, self.history)
        self.reward_model.save_pretrained(folder / "reward_model")

    def _open_output(self, resume_from: str | Path | None) -> int:
        """Restore the checkpoint, if any, and cut the folder back to the rounds before; returns the first to run."""
        if resume_from is None:
            check_unused(self.output_dir)
        checkpoint = None if resume_from is None else checkpoint_to_resume(self.config, resume_from)
        first_round = 1 if checkpoint is None else 1 + load_checkpoint(self, checkpoint)
        check_policy(self)  # not before: a sharded policy would keep the weights that its passes have gathered
        processes.wait()  # all have read what the first now changes
        if processes.index() == 0:
            self.history = cut_back(self.output_dir, first_round)
            (self.output_dir / "config.yaml").write_text(config_to_yaml(self.config))
            start_trackers(self.accelerator, self.config, first_round)
        self.history = processes.from_first(self.history)
        if first_round > 1:
            logger.info("resumed from %s: %d rounds to go", checkpoint, self.config.rounds - first_round + 1)
        return first_round

    def _finish_round(self, rollout: Rollout, batch: Annotations, row: dict[str, float], bar: Any) -> None:
        config, t = self.config, int(row["round"])
        for schedule in self.schedules:
            schedule.step()
        if self.sample_metrics:
            texts = [processes.gather_items(x, config.num_generations) for x in (rollout.prompts, rollout.completions)]
            row |= self.sample_metrics(*texts) if processes.index() == 0 else {}
        if t % config.evaluation.every == 0 or t in (1, config.rounds):
            row |= self.evaluate_held_out()
        row |= processes.from_first(row)
        self.history.append(row)
        if processes.index() == 0:
            append_metrics(self.output_dir, row)
        self.accelerator.log(row, step=t)
        shown = {"reward": "reward/mean", "kl": "policy/kl", "entropy": "policy/entropy"}
        bar.set_postfix({name: f"{row[key]:.3f}" for name, key in shown.items()})
        if t == 1:
            report_start(row, config)
        if config.evaluation.samples_every and t % config.evaluation.samples_every == 0:
            logger.info("samples of round %d:\n%s", t, sample_table(rollout, batch))
        warn_about_drift(self.history)
        warn_about_degenerate_groups(self.history)
        warn_about_exploitation(self.history)
        warn_about_clipping(self.history)

    def _is_last(self, t: int, row: dict[str, float], sigterm: Sigterm) -> bool:
        """Save what is due after round t; whether training ends with it."""
        config, limit = self.config, self.config.evaluation.stop_at_kl
        stopped = limit is not None and row["policy/kl"] > limit
        if stopped:
            logger.warning(
                "round %d: KL %.3f is above evaluation.stop_at_kl %g; training ends", t, row["policy/kl"], limit
            )
        every = config.checkpoints.every
        is_best = best_round(self.history) == t
        terminated = processes.anywhere(sigterm.received)
        if terminated or (every and (t % every == 0 or t == config.rounds or stopped or is_best)):
            save_checkpoint(self, t)
        if terminated:
            raise SystemExit(_SIGTERM_STATUS)
        return stopped

    @contextmanager
    def _saved_if_stopped(self, t: int) -> Iterator[None]:
        """Round t - 1 is what counts if round t is interrupted or fails."""
        try:
            yield
        except Terminated:
            if t - 1 not in {0, *checkpoints(self.output_dir)}:
                save_checkpoint(self, t - 1)
            raise SystemExit(_SIGTERM_STATUS) from None
        except FloatingPointError as error:
            last = max(checkpoints(self.output_dir).items(), default=(0, "none"))[1]
            raise FloatingPointError(f"{error}; last good checkpoint: {last}") from error

    # ---- the rest ----

    def _set_seed(self, seed: int) -> None:
        """Every process draws numbers of its own."""
        set_seed((seed * processes.number() + processes.index()) % 2**32)

    def prompts_of_round(self, t: int) -> list[Prompt]:
        """n prompts: the t-th slice of an endless sequence of shuffled passes, a function of the seed and t alone."""
        return [self.prompts[i] for i in self._picked(t)]

    def _picked(self, t: int) -> list[int]:
        n, size = self.config.prompts_per_round, len(self.prompts)
        order: dict[int, list[int]] = {}
        picked = []
        for i in range((t - 1) * n, t * n):
            if i // size not in order:
                generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + i // size)
                order[i // size] = torch.randperm(size, generator=generator).tolist()
            picked.append(order[i // size][i % size])
        return picked

    def _check_finite(self, batch: Annotations, t: int) -> None:
        values = {"reward": batch.rewards, "log-probability": batch.log_probs, "reference": batch.reference_log_probs}
        if batch.baseline is not None:
            values["greedy response's reward"] = batch.baseline
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise FloatingPointError(f"phase annotate, round {t}: a {name} is not finite")

    def _embed(self, prompts: list[Prompt], completions: list[str]) -> Tensor:
        with self.reward_model.backbone_loaded():
            return self.reward_model.embed(prompts, completions, batch_size=self.config.micro_batch_size)

    def _embed_pairs(self, pairs: list[Preference]) -> Tensor:
        with self.reward_model.backbone_loaded(), progress.phase("held-out pairs"):
            return embed_pairs(self.reward_model, pairs, self.config.micro_batch_size)

    def _take_statistics(self, rte: Tensor, rollout: Rollout) -> None:
        """Standardise by the first round's samples; for a reward model whose statistics no fit has set."""
        with self.autocast():
            mean, scale = feature_statistics(stream_hidden(self.policy, rollout, self.config.micro_batch_size), rollout)
        self.reward_model.set_statistics(processes.gather(rte, self.config.num_generations), mean, scale)
        self.initial_head.load_state_dict(self.reward_model.head.state_dict())

    def _check_weights(self) -> None:
        own, other, place = self.device, self.reward_model.head.weight.device, self.config.placement
        if own != other:
            raise ValueError(f"reward_model is on {other}, the policy on {own}; expected one device")
        if processes.number() > 1 and place.device not in (None, own.type):
            raise ValueError(
                f"placement.device is {place.device!r} in each of {processes.number()} processes; expected none, or "
                f"{own.type!r}: each takes the one of its number"
            )
        wrong = {str(p.dtype) for p in self.parameters if p.dtype != torch.float32}
        if wrong:
            raise ValueError(
                f"policy has trainable weights of {', '.join(sorted(wrong))}; expected float32, "
                "since at small learning rates narrower weights never move (precision is a key of the config)"
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
