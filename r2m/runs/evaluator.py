"""What training never sees: held-out prompts and pairs, measured with the policy and the reward model as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r2m import processes, progress
from r2m.config import R2MConfig
from r2m.data.sources import Preference, Prompt
from r2m.fitting.bradley_terry import pair_accuracy
from r2m.fitting.pairs import embed_pairs, tokenize_pairs
from r2m.policy.loss import sequence_kl
from r2m.policy.rollout import Annotations, Rollout, micro_batches
from r2m.progress import track, waiting
from r2m.runs.judge import Judge, mean_score
from r2m.runs.monitor import describe_samples
from r2m.scoring import Scorer


class Evaluator:
    def __init__(
        self,
        scorer: Scorer,
        config: R2MConfig,
        *,
        prompts: list[Prompt],
        pairs: Sequence[Preference] | None,
        judge: Judge | None,
    ):
        self.scorer, self.config, self.prompts, self.judge = scorer, config, prompts, judge
        self.pairs: tuple[Tensor, Rollout] | None = None  # this process's share: RTEs and texts, chosen first
        self.number_of_pairs = len(pairs or [])
        if pairs:
            own, learner, reward_model = processes.share(pairs), scorer.learner, scorer.reward_model
            with reward_model.backbone_loaded(), progress.phase("held-out pairs"):
                rte = embed_pairs(reward_model, own, config.batch_size)
            self.pairs = rte, tokenize_pairs(learner.policy, learner.tokenizer, own, config.r2m.positions)

    @torch.no_grad()
    def measure(self, prompts: list[Prompt], num_generations: int = 1) -> tuple[dict[str, float], Rollout, Annotations]:
        """See `R2MTrainer.evaluate`."""
        config, scorer, learner = self.config, self.scorer, self.scorer.learner
        processes.seed(config.seed)
        with progress.phase("sampling"):
            rollout = learner.sample(processes.share(prompts), num_generations)
        parts = micro_batches(rollout, config.batch_size)
        with scorer.undone():
            batch = scorer.prepare(rollout, config.rounds, [parts])
            for (part,) in track(parts, "policy, pass"):
                logits = learner.logits(part, scorer.feed(batch, scores=True, collects=False))
                scorer.take(batch, part, learner.log_probs(logits, part), logits)
        scorer.check_finite(batch, config.rounds)
        batch.scores.copy_(batch.rewards)
        batch.kl.copy_(sequence_kl(batch.log_probs, batch.reference_log_probs, rollout.completion_mask))
        return describe_samples(rollout, batch, config, num_generations, len(prompts)), rollout, batch

    def held_out(self) -> dict[str, float]:
        """The measures of a metrics row: `eval/*` on the prompts, `rm/pair_accuracy` on the pairs."""
        row: dict[str, float] = {}
        if self.prompts:
            with progress.phase("held-out prompts"):
                measures, rollout, _ = self.measure(self.prompts)
            names = {"reward/mean": "reward", "reward/initial": "initial_reward", "policy/kl": "kl"}
            names |= {"length/mean": "length", "length/eos_share": "eos_share"}
            row |= {f"eval/{name}": measures[key] for key, name in names.items()}
            if self.judge is not None:
                completions = processes.gather_items(rollout.completions)[: len(self.prompts)]
                if processes.index() == 0:
                    with waiting("judge"):
                        row["eval/judge"] = mean_score(self.judge, self.prompts, completions)
        if self.pairs is not None:
            row["rm/pair_accuracy"] = self.pair_accuracy()
        return row

    def pair_accuracy(self, weight: float | None = None) -> float:
        """See `R2MTrainer.held_out_accuracy`."""
        if self.pairs is None:
            raise ValueError("held_out_pairs were not given to the trainer")
        if not self.config.r2m.attends:
            weight = 1.0
        elif weight is None:
            weight = self.config.r2m.floor
        with progress.phase("held-out pairs"):
            by_pair = self.scorer.score_apart(*self.pairs, weight).unflatten(0, (2, -1)).T
        return pair_accuracy(processes.gather(by_pair)[: self.number_of_pairs].T.flatten())
