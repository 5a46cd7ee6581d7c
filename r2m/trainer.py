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
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from r2m.advantages import ADVANTAGES
from r2m.config import R2MConfig, config_to_yaml
from r2m.data import Preference
from r2m.fitting import embed_pairs, feature_statistics, pair_accuracy, score_pairs, stream_hidden, tokenize_pairs
from r2m.hidden_states import HiddenStateTap
from r2m.policy import disable_dropout, freeze_reference
from r2m.policy_loss import policy_loss, sequence_kl, token_entropy, token_log_probs
from r2m.reward_model import R2MRewardModel
from r2m.rollout import Prompt, Rollout, RolloutFn, encode_prompt, sample
from r2m.updater import R2MUpdater
from r2m_kernels import grebt_loss

logger = logging.getLogger(__name__)

# (prompts, completions) of a round -> extra columns of its metrics row
SampleMetrics = Callable[[list[Prompt], list[str]], dict[str, float]]
# Consumes the hidden states of one micro-batch: (rows, hidden [b, S, D_p], mask [b, S])
Consume = Callable[[slice, Tensor, Tensor], Any]


@dataclass
class Annotations:
    """What phase 2 hands on: [B, R] per token, [B] per sequence."""

    log_probs: Tensor  # [B, R] under the policy that sampled
    reference_log_probs: Tensor  # [B, R]
    scores: Tensor  # [B] rewards without KL: they pick the pairs
    advantages: Tensor  # [B]


class R2MTrainer:
    """Trains `policy` on `prompts` against `reward_model`, and the reward model's small part on the policy's own samples.

    policy: a transformers causal LM or a PEFT model; its trainable weights are float32. A frozen copy of it (for an
        adapter: of the adapter) is the KL reference.
    reward_model: on the device of the policy.
    prompts: text or chat messages; those above `generation.max_prompt_tokens` are dropped and counted.
    rollout_fn: another generator in place of transformers' generate.
    held_out_pairs: human preferences on which the reward model's accuracy is measured every `evaluate_every` rounds.
    sample_metrics: extra metrics from the samples of a round, such as a judge's score.

    Raises ValueError for no prompts, a reward model of another width or on another device, or trainable weights that are
    not float32; FloatingPointError, naming phase and round, as soon as a loss is not finite.
    """

    def __init__(
        self,
        policy: nn.Module,
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
        disable_dropout(policy)
        if config.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.reference = freeze_reference(policy)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.accelerator = Accelerator()
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
        self._warn_about_settings()

    # ---- Algorithm 1 ----

    def train(self, resume_from: str | Path | None = None) -> list[dict[str, float]]:
        """Run rounds 1..T, or those after a checkpoint; returns the metrics, one row a round, as written to metrics.jsonl."""
        first_round = 1 + (self.load_checkpoint(resume_from) if resume_from is not None else 0)
        self._open_output(append=resume_from is not None)
        rounds = tqdm(range(first_round, self.config.rounds + 1), unit="round", disable=not self.accelerator.is_main_process)
        for t in rounds:
            row: dict[str, float] = {"round": t}
            torch.manual_seed(self.config.seed * 1_000_003 + t)  # a round's noise depends on nothing before it
            with self._phase("rollout", row):
                rollout = self.sample(t)
            with self._phase("annotate", row):
                batch = self.annotate(rollout, t, row)
            with self._phase("policy", row):
                self.optimize_policy(rollout, batch, t, row)
            with self._phase("reward_model", row):
                self.align_reward_model(batch, t, row)
            self._finish_round(rollout, row, rounds)
        return self.history

    def sample(self, t: int) -> Rollout:
        """Step 1: K responses per prompt, by temperature alone."""
        with self.autocast():
            return sample(
                self.policy,
                self.tokenizer,
                self.prompts_of_round(t),
                self.config.num_generations,
                self.config.generation,
                positions=self.config.r2m.positions,
                rollout_fn=self.rollout_fn,
            )

    @torch.no_grad()
    def annotate(self, rollout: Rollout, t: int, row: dict[str, float]) -> Annotations:
        """Steps 2 and 3: one forward pass of the policy gives old log-probabilities and, on the way, the feedback that the
        rewards need; then advantages inside each group.
        """
        config, mask = self.config, rollout.completion_mask
        rte = self.reward_model.embed(rollout.prompts, rollout.completions)
        if self.reward_model.needs_statistics:
            self._take_statistics(rte, rollout)
        initial = self.reward_model.standardized(rte) @ self.initial_head.weight + self.initial_head.bias
        rewards, consume = initial.clone(), None
        if config.r2m.feedback != "none":
            self.updater.begin_round(rte, t)

            def consume(rows: slice, hidden: Tensor, feedback_mask: Tensor) -> None:
                rewards[rows] = self.updater.score(rows, hidden, feedback_mask)

        log_probs, entropy = self._log_probs(self.policy, rollout, consume)
        with self.reference() as reference:
            reference_log_probs, _ = self._log_probs(reference, rollout)

        scores = rewards
        if config.missing_eos_penalty is not None:
            scores = rewards - config.missing_eos_penalty * (~rollout.finished)
        kl = sequence_kl(log_probs, reference_log_probs, mask)
        penalised = scores - config.kl.beta * kl if config.kl.placement == "reward" else scores
        advantages = ADVANTAGES[config.algorithm](penalised.view(-1, config.num_generations)).flatten()

        row |= {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std().item(),
            "reward/initial": initial.mean().item(),
            "reward/group_std": scores.view(-1, config.num_generations).std(-1, correction=0).mean().item(),
            "policy/kl": kl.mean().item(),
            "policy/entropy": ((entropy * mask).sum() / mask.sum()).item(),
            "length/mean": mask.sum(-1).float().mean().item(),
            "length/eos_share": rollout.finished.float().mean().item(),
        }
        if config.r2m.feedback != "none":
            row |= {"weight": self.updater.weight, "reward/correlation": self.updater.alignment(initial).item()}
        return Annotations(log_probs, reference_log_probs, scores, advantages)

    def optimize_policy(self, rollout: Rollout, batch: Annotations, t: int, row: dict[str, float]) -> None:
        """Step 4: k epochs over the round (equation 7); the last epoch's forward passes refresh the feedback, at no cost."""
        config = self.config
        self.policy.train()
        per_minibatch = len(rollout.prompts) // config.minibatches
        totals: dict[str, Tensor] = {}
        for epoch in range(1, config.epochs + 1):
            refresh = epoch == config.epochs and config.r2m.feedback != "none"
            for minibatch in torch.randperm(config.minibatches).tolist():
                for rows in self._micro_batches(minibatch * per_minibatch, (minibatch + 1) * per_minibatch):
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
                    self.accelerator.backward(loss.sum() / per_minibatch)
                    for name, value in {"loss": loss.detach(), **stats}.items():
                        totals[name] = totals.get(name, 0.0) + value.sum()
                row["policy/grad_norm"] = self._step_policy(t, epoch)
        self.policy.eval()
        row |= {f"policy/{name}": (v / (config.epochs * len(rollout.prompts))).item() for name, v in totals.items()}

    def align_reward_model(self, batch: Annotations, t: int, row: dict[str, float]) -> None:
        """Step 5: GREBT on rewards recomputed from the refreshed feedback; the backbone and the policy do not run."""
        if self.config.r2m.feedback != "none":
            try:
                row |= self.updater.step(batch.scores)
            except FloatingPointError as error:
                raise FloatingPointError(f"phase reward_model, round {t}: {error}") from None
            return
        # The fixed reward model has group statistics too.
        _, stats = grebt_loss(
            batch.scores.view(-1, self.config.num_generations), eps=self.config.r2m.eps, return_stats=True
        )
        row["grebt/entropy"] = stats["entropy"].mean().item()
        row["reward/degenerate_share"] = (stats["std"] < self.config.r2m.eps).float().mean().item()

    # ---- forward passes ----

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _logits(self, model: nn.Module, rollout: Rollout, rows: slice, consume: Consume | None = None) -> Tensor:
        """Logits [b, R, vocabulary] that predict the response tokens; the hidden states go to `consume` on the way."""
        tap = nullcontext()
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

    def _log_probs(self, model: nn.Module, rollout: Rollout, consume: Consume | None = None) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies) of all response tokens, [B, R] each, in the micro-batches of the update: in bf16
        the same rows give the same bits, so the first importance ratio is 1.
        """
        log_probs, entropies = [], []
        temperature = self.config.generation.temperature
        per_minibatch = len(rollout.prompts) // self.config.minibatches
        for start in range(0, len(rollout.prompts), per_minibatch):
            for rows in self._micro_batches(start, start + per_minibatch):
                logits = self._logits(model, rollout, rows, consume)
                log_probs.append(token_log_probs(logits, rollout.completion_ids[rows], temperature))
                entropies.append(token_entropy(logits, temperature))
        return torch.cat(log_probs), torch.cat(entropies)

    def _micro_batches(self, start: int, end: int) -> Iterator[slice]:
        size = self.config.micro_batch_size
        return (slice(i, min(i + size, end)) for i in range(start, end, size))

    def _step_policy(self, t: int, epoch: int) -> float:
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if not norm < float("inf"):  # NaN too
            raise FloatingPointError(f"phase policy, round {t}, epoch {epoch}: the gradient norm is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    # ---- evaluation, logging, checkpoints ----

    def prompts_of_round(self, t: int) -> list[Prompt]:
        """n prompts: the t-th slice of an endless sequence of shuffled passes, a function of the seed and t alone."""
        n, size = self.config.prompts_per_round, len(self.prompts)
        order: dict[int, list[int]] = {}
        picked = []
        for i in range((t - 1) * n, t * n):
            if i // size not in order:
                generator = torch.Generator().manual_seed(self.config.seed + i // size)
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

    def save_checkpoint(self, t: int) -> Path:
        """Everything that round t + 1 needs: trainable weights of the policy, the reward model's part, both optimizers."""
        folder = self.output_dir / f"checkpoint-{t}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._trainable(), folder / "policy.safetensors")
        self.reward_model.save_pretrained(folder / "reward_model")
        state = {
            "round": t,
            "rounds": self.config.rounds,
            "optimizer": self.optimizer.state_dict(),
            "updater": self.updater.state_dict(),
            "initial_head": self.initial_head.state_dict(),
        }
        torch.save(state, folder / "state.pt")
        return folder

    def load_checkpoint(self, folder: str | Path) -> int:
        """Restore what `save_checkpoint` wrote into this trainer (made from the same initial policy); returns its round."""
        folder = Path(folder)
        if not (folder / "state.pt").is_file():
            raise FileNotFoundError(f"resume_from: {folder} holds no state.pt; expected a folder checkpoint-<round>")
        state = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
        if state["rounds"] != self.config.rounds:
            raise ValueError(
                f"rounds is {self.config.rounds}, the checkpoint's run has {state['rounds']}: w(t) depends on it"
            )
        saved, own = load_file(folder / "policy.safetensors", device=str(self.device)), self._trainable()
        if saved.keys() != own.keys():
            raise ValueError(f"resume_from: {folder} holds other trainable weights than this policy")
        with torch.no_grad():
            for name, value in saved.items():
                own[name].copy_(value)
        weights = load_file(folder / "reward_model" / "r2m.safetensors", device=str(self.device))
        self.reward_model.load_state_dict(weights)
        self.initial_head.load_state_dict(state["initial_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updater.load_state_dict(state["updater"])
        return state["round"]

    def save_pretrained(self, folder: str | Path) -> None:
        """The trained policy (or adapter), tokenizer, and reward model, in the forms that `from_pretrained` loads."""
        folder = Path(folder)
        self.accelerator.unwrap_model(self.policy).save_pretrained(folder / "policy")
        self.tokenizer.save_pretrained(folder / "policy")
        self.reward_model.save_pretrained(folder / "reward_model")

    def _trainable(self) -> dict[str, Tensor]:
        policy = self.accelerator.unwrap_model(self.policy)
        return {name: p.data for name, p in policy.named_parameters() if p.requires_grad}

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
        if t == 1 and config.r2m.feedback != "none":
            logger.info(
                "policy feedback at the start: the fused reward (w = %.2f) correlates %.2f with the initial one; "
                "%.1f effective attended tokens",
                config.r2m.floor,
                row["reward/correlation"],
                row["rm/attended_tokens"],
            )
        self._warn_about_drift()
        if config.save_every and t % config.save_every == 0:
            self.save_checkpoint(t)

    @contextmanager
    def _phase(self, name: str, row: dict[str, float]) -> Iterator[None]:
        """Wall seconds and peak memory in MiB: of the GPU in this phase, else of the process so far."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        row[f"seconds/{name}"], row[f"memory/{name}"] = time.perf_counter() - start, peak

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
            logger.warning("dropped %d of %d prompts: empty or longer than %d tokens", len(prompts) - len(kept), len(prompts), limit)
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
        if not self.parameters:
            raise ValueError("policy has no trainable weights; an adapter has to be loaded with is_trainable=True")

    def _warn_about_settings(self) -> None:
        config = self.config
        if config.r2m.feedback == "none":
            return
        if config.epochs == 1 and config.minibatches == 1:
            logger.warning("epochs = 1 with one minibatch: the refreshed hidden states equal the sampled ones")
        if config.num_generations == 2:
            logger.warning("num_generations = 2: group reward entropy is constant, GREBT is Bradley-Terry alone")

    def _warn_about_drift(self) -> None:
        first, row = self.history[0], self.history[-1]
        accuracy, start = row.get("rm/pair_accuracy"), first.get("rm/pair_accuracy")
        if accuracy is not None and start is not None and accuracy < start - 0.05:
            logger.warning("round %d: held-out pair accuracy fell from %.3f to %.3f", row["round"], start, accuracy)
        ratio = row["reward/group_std"] / max(first["reward/group_std"], 1e-12)
        if not 0.5 < ratio < 2:
            logger.warning("round %d: the reward's scale inside groups is %.2f times that of round %d", row["round"], ratio, first["round"])  # fmt: skip

    def _open_output(self, *, append: bool) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "config.yaml").write_text(config_to_yaml(self.config))
        if not append:
            (self.output_dir / "metrics.jsonl").write_text("")
