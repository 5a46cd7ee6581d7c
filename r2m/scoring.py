"""What a round's samples are worth: rewards with policy feedback, log-probabilities, credit (steps 2 and 3)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor

from r2m import processes
from r2m.algorithms import ALGORITHMS, Credit
from r2m.config import R2MConfig
from r2m.data.sources import Prompt
from r2m.fitting.pairs import feature_statistics, score_rollout, stream_hidden
from r2m.method.reward_model import R2MRewardModel
from r2m.method.updater import R2MUpdater
from r2m.policy.learner import Learner
from r2m.policy.loss import sequence_kl, token_entropy
from r2m.policy.passes import Consume
from r2m.policy.rollout import Annotations, MicroBatch, Part, Rollout
from r2m.progress import track


class Scorer:
    """Fills in a round's `Annotations`: `prepare` all that needs no pass of the policy, `feed` and `take` on the way
    through such a pass, `close` what needs all of it."""

    def __init__(self, learner: Learner, reward_model: R2MRewardModel, updater: R2MUpdater, config: R2MConfig):
        self.learner, self.reward_model, self.updater, self.config = learner, reward_model, updater, config
        self.initial_head = copy.deepcopy(reward_model.head)  # its score is comparable across rounds and runs
        self.algorithm = ALGORITHMS[config.algorithm]
        # Whose hidden states are the feedback: the policy's, as it runs, or the reference's, which never change.
        self.taps_policy = config.r2m.attends and config.r2m.source != "reference"

    @torch.no_grad()
    def prepare(self, rollout: Rollout, t: int, minibatches: list[list[MicroBatch]]) -> Annotations:
        """The initial reward model's scores, the reference's log-probabilities, and rewards that need no pass of the
        policy; the rest NaN, to be filled in. The updater is ready for round t."""
        rte = self.embed(rollout.prompts, rollout.completions)
        if self.reward_model.needs_statistics:
            self._take_statistics(rte, rollout)
        if self.config.r2m.feedback != "none":
            self.updater.begin_round(rte, t)
        initial = self.initial_head(self.reward_model.standardized(rte))
        batch, consume = Annotations.blank(rollout, initial, minibatches), None
        if not self.config.r2m.attends:
            batch.rewards.copy_(self.reward_model.vanilla_score(rte))
        elif not self.taps_policy:
            consume = self._feed(batch, scores=True, collects=True)  # one pass of the reference does for both
        with self.learner.reference() as reference:
            for part in track(list(chain(*chain(*minibatches))), "reference, pass"):
                logits = self.learner.logits(part, consume, model=reference)
                batch.reference_log_probs[part.rows] = self.learner.log_probs(logits, part)
        if rollout.greedy is not None:
            batch.baseline = self._greedy_scores(rollout.greedy).repeat_interleave(self.config.num_generations)
        return batch

    def feed(self, batch: Annotations, *, scores: bool, collects: bool) -> Consume | None:
        """What takes the policy's hidden states as they are made: with `scores` rewards are made of them, with
        `collects` what the reward model's update needs. None: nothing does."""
        return (
            self._feed(batch, scores=scores, collects=collects) if self.taps_policy and (scores or collects) else None
        )

    def take(self, batch: Annotations, part: Part, log_probs: Tensor, logits: Tensor) -> None:
        """Log-probabilities and entropies of the policy that sampled."""
        batch.log_probs[part.rows] = log_probs.detach()
        batch.entropy[part.rows] = part.to_rollout(token_entropy(logits, self.config.generation.temperature))

    def assign_credit(self, rollout: Rollout, batch: Annotations, rows: Tensor | slice = slice(None)) -> None:
        """Scores, KL and advantages of `rows`, prompt-major: all that the algorithm compares, already scored."""
        config, mask = self.config, rollout.completion_mask[rows]
        scores = less_unfinished(batch.rewards[rows], rollout.finished[rows], config.missing_eos_penalty)
        kl = sequence_kl(batch.log_probs[rows], batch.reference_log_probs[rows], mask)
        batch.scores[rows], batch.kl[rows] = scores, kl
        penalised = config.kl.placement == "reward" and not self.algorithm.kl_in_return
        credit = Credit(
            scores=scores - config.kl.beta * kl if penalised else scores,
            token_kl=batch.log_probs[rows] - batch.reference_log_probs[rows],
            mask=mask,
            baseline=None if batch.baseline is None else batch.baseline[rows],
            num_generations=config.num_generations,
            beta=config.kl.beta,
        )
        if self.algorithm.needs_greedy and batch.baseline is None:
            raise ValueError("rollout.greedy is None; expected the greedy responses, as R2MTrainer.sample makes them")
        advantages = self.algorithm.advantages(credit)
        if advantages.shape[1:] != batch.advantages.shape[1:]:  # each token has its own
            batch.advantages = torch.full_like(batch.log_probs, torch.nan)
        batch.advantages[rows] = advantages

    def check_finite(self, batch: Annotations, t: int) -> None:
        """FloatingPointError, naming phase and round, for a score that is not finite."""
        values = {"reward": batch.rewards, "log-probability": batch.log_probs, "reference": batch.reference_log_probs}
        if batch.baseline is not None:
            values["greedy response's reward"] = batch.baseline
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise FloatingPointError(f"phase annotate, round {t}: a {name} is not finite")

    @torch.no_grad()
    def score_apart(self, rte: Tensor, rollout: Rollout, weight: float) -> Tensor:
        """Rewards [B] of texts that are no samples of the round, in passes of their own where w < 1 needs them."""
        if weight == 1:
            return self.reward_model.vanilla_score(rte)
        source, batch_size = self.config.r2m.source, self.config.batch_size
        feedback_of = self.learner.reference() if source == "reference" else nullcontext(self.learner.policy)
        with feedback_of as model, self.learner.autocast():
            return score_rollout(
                self.reward_model, model, rte, rollout, weight, batch_size=batch_size, noise=source == "noise"
            )

    def embed(self, prompts: list[Prompt], completions: list[str]) -> Tensor:
        """RTEs [B, D_rm]."""
        with self.reward_model.backbone_loaded():
            return self.reward_model.embed(prompts, completions, batch_size=self.config.batch_size)

    @contextmanager
    def undone(self) -> Iterator[None]:
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

    def _feed(self, batch: Annotations, *, scores: bool, collects: bool) -> Consume:
        def consume(rows: Tensor, hidden: Tensor, feedback_mask: Tensor) -> None:
            if scores:
                batch.rewards[rows] = self.updater.score(rows, hidden, feedback_mask)
            if collects:
                self.updater.collect(rows, hidden, feedback_mask)

        return consume

    def _greedy_scores(self, greedy: Rollout) -> Tensor:
        """ReMax: rewards [n] of the greedy responses by the reward model, feedback and w(t) of their round's samples.

        As any response one pays for not ending by itself. None pays for its KL: of a sequence that was not sampled the
        log-ratio estimates no KL, and a baseline is unbiased whatever it leaves out.
        """
        rte = self.embed(greedy.prompts, greedy.completions)
        weight = self.updater.weight if self.config.r2m.attends else 1.0
        rewards = self.updater.scale * self.score_apart(rte, greedy, weight)
        return less_unfinished(rewards, greedy.finished, self.config.missing_eos_penalty)

    def _take_statistics(self, rte: Tensor, rollout: Rollout) -> None:
        """Standardise by the first round's samples; for a reward model whose statistics no fit has set."""
        with self.learner.autocast():
            hidden = stream_hidden(self.learner.policy, rollout, self.config.batch_size)
            mean, scale = feature_statistics(hidden)
        self.reward_model.set_statistics(processes.gather(rte, self.config.num_generations), mean, scale)
        self.initial_head.load_state_dict(self.reward_model.head.state_dict())


def less_unfinished(rewards: Tensor, finished: Tensor, penalty: float | None) -> Tensor:
    """Rewards [B], less the penalty (None: none) where the response did not end by itself: `finished` [B] bool."""
    return rewards if penalty is None else rewards - penalty * (~finished)
