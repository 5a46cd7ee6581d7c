"""RLOO and GRPO with R2M: the training round of the paper's Algorithm 1, one function a phase.

sample              K responses to each of n prompts from the current policy
annotate            rewards with policy feedback (equations 1-3), log-probabilities, advantages
optimize_policy     k epochs; the last one's forward passes refresh the feedback
align_reward_model  pairs, GREBT, one step on the reward model's small part (equations 4-6)
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r2m.advantages import ADVANTAGES
from r2m.checkpoint import load_checkpoint, save_checkpoint
from r2m.config import R2MConfig, config_to_yaml
from r2m.data import Preference, Prompt
from r2m.fitting import embed_pairs, feature_statistics, pair_accuracy, score_pairs, stream_hidden, tokenize_pairs
from r2m.hidden_states import HiddenStateTap
from r2m.monitor import describe_samples, phase, report_start, warn_about_drift, warn_about_settings
from r2m.policy import compact_head_input, disable_dropout, freeze_reference
from r2m.policy_loss import policy_loss, sequence_kl, token_entropy, token_log_probs
from r2m.reward_model import R2MRewardModel
from r2m.rollout import Annotations, Rollout, RolloutFn, encode_prompt, sample
from r2m.updater import R2MUpdater

logger = logging.getLogger(__name__)

# (prompts, completions) of a round -> extra columns of its metrics row
SampleMetrics = Callable[[list[Prompt], list[str]], dict[str, float]]
# Consumes the hidden states of one micro-batch: (rows, hidden [b, S, D_p], mask [b, S])
Consume = Callable[[slice, Tensor, Tensor], Any]


class R2MTrainer:
    """Trains `policy` on `prompts` against `reward_model`, and the reward model's small part on the policy's own
    samples.

    policy: a transformers causal LM or a PEFT model; its trainable weights are float32. A frozen copy of it (for an
        adapter: of the adapter) is the KL reference.
    reward_model: on the device of the policy.
    prompts: text or chat messages; those above `generation.max_prompt_tokens` are dropped and counted.
    rollout_fn: another generator in place of transformers' generate.
    held_out_pairs: human preferences on which the reward model's accuracy is measured every `evaluate_every` rounds.
    sample_metrics: extra metrics from the samples of a round, such as a judge's score.

    Raises ValueError for no prompts, a reward model of another width or on another device, or trainable weights that
    are not float32; FloatingPointError, naming phase and round, as soon as a loss is not finite.
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
        held_out_pairs: list[Preference] | None = None,
        sample_metrics: SampleMetrics | None = None,
    ):
        self.config, self.tokenizer, self.reward_model = config, tokenizer, reward_model
        self.rollout_fn, self.sample_metrics = rollout_fn, sample_metrics
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.prompts = self._usable(prompts)
        reward_model.check_policy_width(policy.config.get_text_config().hidden_size)
        compact_head_input(policy)
        if config.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.reference = freeze_reference(policy)
        disable_dropout(policy)  # the reference adapter's too
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("policy has no trainable weights; an adapter has to be loaded with is_trainable=True")
        optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.accelerator = Accelerator(device_placement=False)  # everything stays where the user put it
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self.device = next(self.policy.parameters()).device
        self._check_weights()

        self.updater = R2MUpdater(
            reward_model, config.r2m, total_steps=config.rounds, num_generations=config.num_generations
        )
        self.initial_head = copy.deepcopy(reward_model.head)  # its score is comparable across rounds and runs
        self.output_dir = Path(config.output_dir)
        self.history: list[dict[str, float]] = []
        self.held_out: tuple[Tensor, Rollout] | None = None
        if held_out_pairs:
            self.held_out = embed_pairs(reward_model, held_out_pairs), tokenize_pairs(policy, tokenizer, held_out_pairs)
        warn_about_settings(config)

    # ---- Algorithm 1 ----

    def train(self, resume_from: str | Path | None = None) -> list[dict[str, float]]:
        """Run rounds 1..T, or those after a checkpoint; returns metrics.jsonl's rows, one a round."""
        first_round = 1 + (load_checkpoint(self, resume_from) if resume_from is not None else 0)
        self._open_output(first_round)
        rounds = tqdm(
            range(first_round, self.config.rounds + 1), unit="round", disable=not self.accelerator.is_main_process
        )
        for t in rounds:
            row: dict[str, float] = {"round": t}
            torch.manual_seed(self.config.seed * 1_000_003 + t)  # a round's noise depends on nothing before it
            with phase("rollout", row, self.device):
                rollout = self.sample(t)
            with phase("annotate", row, self.device):
                batch = self.annotate(rollout, t, row)
            with phase("policy", row, self.device):
                self.optimize_policy(rollout, batch, t, row)
            with phase("reward_model", row, self.device):
                self.align_reward_model(batch, t, row)
            self._finish_round(rollout, row, rounds)
        return self.history

    def sample(self, t: int) -> Rollout:
        """Step 1: K responses to each of n prompts, by temperature alone."""
        return self._sample(self.prompts_of_round(t))

    @torch.no_grad()
    def annotate(self, rollout: Rollout, t: int, row: dict[str, float]) -> Annotations:
        """Steps 2 and 3: one forward pass of the policy gives old log-probabilities and, on the way, the feedback that
        the rewards need; then advantages inside each group.
        """
        config, mask = self.config, rollout.completion_mask
        rte = self.reward_model.embed(rollout.prompts, rollout.completions)
        if self.reward_model.needs_statistics:
            self._take_statistics(rte, rollout)
        initial = self.initial_head(self.reward_model.standardized(rte))
        rewards, consume = initial.clone(), None
        if config.r2m.feedback != "none":
            self.updater.begin_round(rte, t)

            def consume(rows: slice, hidden: Tensor, feedback_mask: Tensor) -> None:
                rewards[rows] = self.updater.score(rows, hidden, feedback_mask)

        temperature = config.generation.temperature
        log_probs, reference_log_probs, entropy = rewards.new_empty(3, *mask.shape)
        # In the micro-batches of the update: in bf16 the same rows give the same bits, so the first ratio is 1.
        for rows in chain(*self._minibatches(len(rewards))):
            logits = self._logits(self.policy, rollout, rows, consume)
            log_probs[rows] = token_log_probs(logits, rollout.completion_ids[rows], temperature)
            entropy[rows] = token_entropy(logits, temperature)
        with self.reference() as reference:
            for rows in chain(*self._minibatches(len(rewards))):
                logits = self._logits(reference, rollout, rows)
                reference_log_probs[rows] = token_log_probs(logits, rollout.completion_ids[rows], temperature)

        for name, value in (("reward", rewards), ("log-probability", log_probs), ("reference", reference_log_probs)):
            if not torch.isfinite(value).all():
                raise FloatingPointError(f"phase annotate, round {t}: a {name} is not finite")
        scores = rewards
        if config.missing_eos_penalty is not None:
            scores = rewards - config.missing_eos_penalty * (~rollout.finished)
        kl = sequence_kl(log_probs, reference_log_probs, mask)
        penalised = scores - config.kl.beta * kl if config.kl.placement == "reward" else scores
        advantages = ADVANTAGES[config.algorithm](penalised.view(-1, config.num_generations)).flatten()

        batch = Annotations(log_probs, reference_log_probs, entropy, kl, rewards, initial, scores, advantages)
        row |= describe_samples(rollout, batch, config)
        if config.r2m.feedback != "none":
            row |= {"weight": self.updater.weight, "reward/correlation": self.updater.alignment(initial).item()}
        return batch

    def optimize_policy(self, rollout: Rollout, batch: Annotations, t: int, row: dict[str, float]) -> None:
        """Step 4: k epochs over the round (equation 7); the last one's forward passes refresh the feedback for free."""
        config = self.config
        self.policy.train()
        count = len(rollout.prompts)
        minibatches = self._minibatches(count)
        totals: dict[str, Tensor] = {}
        for epoch in range(1, config.epochs + 1):
            refresh = epoch == config.epochs and config.r2m.feedback != "none"
            for i in torch.randperm(len(minibatches)).tolist():
                for rows in minibatches[i]:
                    logits = self._logits(self.policy, rollout, rows, self.updater.collect if refresh else None)
                    loss, stats = policy_loss(
                        token_log_probs(logits, rollout.completion_ids[rows], config.generation.temperature),
                        batch.log_probs[rows],
                        batch.reference_log_probs[rows],
                        batch.advantages[rows],
                        rollout.completion_mask[rows],
                        algorithm=config.algorithm,
                        clip_range=config.clip_range,
                        beta=config.kl.beta if config.kl.placement == "loss" else 0.0,
                        estimator=config.kl.estimator,
                    )
                    self.accelerator.backward(loss.sum() * config.minibatches / count)
                    for name, value in {"loss": loss.detach(), **stats}.items():
                        totals[name] = totals.get(name, 0.0) + value.sum()
                row["policy/grad_norm"] = self._step_policy(t, epoch)
        self.policy.eval()
        row |= {f"policy/{name}": (v / (config.epochs * count)).item() for name, v in totals.items()}

    def align_reward_model(self, batch: Annotations, t: int, row: dict[str, float]) -> None:
        """Step 5: GREBT on rewards recomputed from the refreshed feedback; the backbone and the policy do not run."""
        if self.config.r2m.feedback == "none":
            return
        try:
            row |= self.updater.step(batch.scores)
        except FloatingPointError as error:
            raise FloatingPointError(f"phase reward_model, round {t}: {error}") from None

    # ---- forward passes ----

    def _sample(self, prompts: list[Prompt]) -> Rollout:
        config = self.config
        with self.autocast():
            return sample(
                self.policy,
                self.tokenizer,
                prompts,
                config.num_generations,
                config.generation,
                positions=config.r2m.positions,
                rollout_fn=self.rollout_fn,
            )

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
        """The rows of each minibatch, a slice for each micro-batch."""
        size, micro = count // self.config.minibatches, self.config.micro_batch_size
        return [
            [slice(i, min(i + micro, start + size)) for i in range(start, start + size, micro)]
            for start in range(0, count, size)
        ]

    def _step_policy(self, t: int, epoch: int) -> float:
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if not norm < float("inf"):  # NaN too
            raise FloatingPointError(f"phase policy, round {t}, epoch {epoch}: the gradient norm is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    # ---- evaluation and output ----

    def evaluate(self, prompts: list[Prompt]) -> tuple[dict[str, float], Rollout]:
        """Sample K responses to each prompt and annotate them as round T would be (w = Omega); nothing is trained."""
        row: dict[str, float] = {}
        rollout = self._sample(prompts)
        self.annotate(rollout, self.config.rounds, row)
        return row, rollout

    def prompts_of_round(self, t: int) -> list[Prompt]:
        """n prompts: the t-th slice of an endless sequence of shuffled passes, a function of the seed and t alone."""
        n, size = self.config.prompts_per_round, len(self.prompts)
        order: dict[int, list[int]] = {}
        picked = []
        for i in range((t - 1) * n, t * n):
            if i // size not in order:
                generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + i // size)
                order[i // size] = torch.randperm(size, generator=generator).tolist()
            picked.append(self.prompts[order[i // size][i % size]])
        return picked

    def held_out_accuracy(self, weight: float | None = None) -> float:
        """Accuracy of the reward model on the held-out pairs with the feedback of the policy as it is now.

        weight: the fusion weight w, by default 1 without feedback and Omega with it.
        """
        if self.held_out is None:
            raise ValueError("held_out_pairs were not given to the trainer")
        rte, rollout = self.held_out
        if weight == 1 or self.config.r2m.feedback == "none":
            return pair_accuracy(self.reward_model.vanilla_score(rte))
        with self.autocast():
            weight = self.config.r2m.floor if weight is None else weight
            return pair_accuracy(score_pairs(self.reward_model, self.policy, rte, rollout, weight))

    def save_pretrained(self, folder: str | Path) -> None:
        """The trained policy (or adapter), tokenizer, and reward model, in the forms that `from_pretrained` loads."""
        folder = Path(folder)
        policy = self.accelerator.unwrap_model(self.policy)
        # The reference adapter stays out.
        chosen = {"selected_adapters": [policy.active_adapter]} if isinstance(policy, PeftModel) else {}
        policy.save_pretrained(folder / "policy", **chosen)
        self.tokenizer.save_pretrained(folder / "policy")
        self.reward_model.save_pretrained(folder / "reward_model")

    def _finish_round(self, rollout: Rollout, row: dict[str, float], progress: Any) -> None:
        config, t = self.config, int(row["round"])
        row |= self.sample_metrics(rollout.prompts, rollout.completions) if self.sample_metrics else {}
        if self.held_out is not None and (t % config.evaluate_every == 0 or t in (1, config.rounds)):
            row["rm/pair_accuracy"] = self.held_out_accuracy()
        self.history.append(row)
        with (self.output_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {"reward": "reward/mean", "kl": "policy/kl", "entropy": "policy/entropy"}
        progress.set_postfix({name: f"{row[key]:.3f}" for name, key in shown.items()})
        if t == 1:
            report_start(row, config)
        warn_about_drift(self.history[0], row)
        if config.save_every and t % config.save_every == 0:
            save_checkpoint(self, t)

    def _take_statistics(self, rte: Tensor, rollout: Rollout) -> None:
        """Standardise by the first round's samples; for a reward model whose statistics no fit has set."""
        with self.autocast():
            mean, scale = feature_statistics(stream_hidden(self.policy, rollout, self.config.micro_batch_size), rollout)
        self.reward_model.set_statistics(rte, mean, scale)
        self.initial_head.load_state_dict(self.reward_model.head.state_dict())

    def _usable(self, prompts: list[Prompt]) -> list[Prompt]:
        limit = self.config.generation.max_prompt_tokens
        kept = [prompt for prompt in prompts if 0 < len(encode_prompt(self.tokenizer, prompt)) <= limit]
        if not kept:
            raise ValueError(f"prompts: none of {len(prompts)} has between 1 and {limit} tokens; expected at least 1")
        if len(kept) < len(prompts):
            logger.warning(
                "dropped %d of %d prompts: empty or longer than %d tokens",
                len(prompts) - len(kept),
                len(prompts),
                limit,
            )
        return kept

    def _check_weights(self) -> None:
        own, other = self.device, self.reward_model.head.weight.device
        if own != other:
            raise ValueError(f"reward_model is on {other}, the policy on {own}; expected one device")
        wrong = {str(p.dtype) for p in self.parameters if p.dtype != torch.float32}
        if wrong:
            raise ValueError(
                f"policy has trainable weights of {', '.join(sorted(wrong))}; expected float32, "
                "since at small learning rates narrower weights never move (precision is a key of the config)"
            )

    def _open_output(self, first_round: int) -> None:
        """Cut the metrics of an earlier run in this folder back to the rounds that are not run again."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "config.yaml").write_text(config_to_yaml(self.config))
        metrics = self.output_dir / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        self.history = [row for row in map(json.loads, lines) if row["round"] < first_round]
        metrics.write_text("".join(json.dumps(row) + "\n" for row in self.history))
