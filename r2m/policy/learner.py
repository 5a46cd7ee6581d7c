"""The policy as it learns: its weights, the frozen reference, the optimizer, and the passes of a round."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r2m import processes
from r2m.algorithms import ALGORITHMS
from r2m.config import R2MConfig
from r2m.data.order import minibatch_order
from r2m.data.sources import Prompt
from r2m.policy.generate import GenerateFn, Generator
from r2m.policy.loss import importance_ratios, policy_loss, token_log_probs
from r2m.policy.passes import Consume, compact_head_input, disable_dropout, response_logits, training_mode
from r2m.policy.reference import freeze_reference
from r2m.policy.rollout import Annotations, MicroBatch, Part, Rollout, asked, micro_batches, sample


class Learner:
    """Takes the policy over: no dropout, evaluation mode between steps, a reference frozen as the policy is now.

    Raises ValueError for a policy without trainable weights, or with some that are not float32, and for an adapter with
    placement.shard_policy.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        config: R2MConfig,
        generator: Generator | GenerateFn | None = None,
    ):
        self.policy, self.tokenizer, self.config, self.generator = policy, tokenizer, config, generator
        self._handed_over = -1  # the version of the weights that the generator has
        place = config.placement
        compact_head_input(policy)
        if config.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        if place.shard_policy and isinstance(policy, PeftModel):
            raise ValueError("placement.shard_policy is true with an adapter; expected false, or a policy without one")
        narrow = config.precision == "bf16"
        if place.shard_policy and processes.number() > 1:
            processes.shard(policy, policy.device, narrow=narrow)
        self.reference = freeze_reference(policy, offload=place.offload_reference, narrow=narrow)
        disable_dropout(policy)  # the reference adapter's too
        policy.eval()  # but where activations are recomputed: see `training_mode`
        self.parameters = [p for _, p in processes.named_parameters(policy) if p.requires_grad]
        if not self.parameters:
            raise ValueError("policy has no trainable weights; an adapter has to be loaded with is_trainable=True")
        wrong = {str(p.dtype) for p in self.parameters if p.dtype != torch.float32}
        if wrong:
            raise ValueError(
                f"policy has trainable weights of {', '.join(sorted(wrong))}; expected float32, "
                "since at small learning rates narrower weights never move (precision is a key of the config)"
            )
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.parameters[0].is_cuda or None,  # the default there makes temporaries of the size of all weights
        )
        # `wrapped` runs the passes whose gradients are averaged over processes, `policy` itself all others.
        self.wrapped = processes.replicate(policy)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def sample(
        self,
        prompts: list[Prompt],
        num_generations: int,
        prompt_ids: list[list[int]] | None = None,
        *,
        greedy: bool = False,
    ) -> Rollout:
        """`num_generations` responses to each prompt, by temperature alone, or the most likely ones."""
        # Held-out prompts may be more than this process's of a round, whose cache fits.
        share = self.config.prompts_per_round * self.config.num_generations // processes.number()
        at_once = min(self.config.sequences_at_once, share)
        settings = dataclasses.replace(self.config.generation, batch_size=at_once)
        self.update_generator()
        with self.autocast() if self.generator is None else nullcontext():
            return sample(
                self.policy,
                self.tokenizer,
                prompts,
                num_generations,
                settings,
                prompt_ids=prompt_ids,
                positions=self.config.r2m.positions,
                generator=self.generator,
                greedy=greedy,
            )

    def update_generator(self) -> None:
        """Hand the weights over to a generator that has others."""
        version = sum(p._version for p in self.parameters)  # PyTorch counts what writes into a tensor
        if isinstance(self.generator, Generator) and version != self._handed_over:
            with asked(self.generator):
                self.generator.update(self.policy)
            self._handed_over = version

    def logits(self, part: Part, consume: Consume | None = None, *, model: nn.Module | None = None) -> Tensor:
        """`response_logits` of the policy as it is now, or of `model`."""
        if model is None:
            model = self.wrapped if torch.is_grad_enabled() else self.policy
        with self.autocast():
            return response_logits(model, part, consume)

    def log_probs(self, logits: Tensor, part: Part) -> Tensor:
        """Of the response tokens [b, R], at the temperature that they were sampled at; 0 behind their end."""
        return part.to_rollout(token_log_probs(logits, part.response_ids, self.config.generation.temperature))

    def minibatches(self, rollout: Rollout) -> list[list[MicroBatch]]:
        """The micro-batches of each minibatch of a round, in the order of the samples.

        All phases and epochs run the same passes: in bf16 the same rows give the same bits, so the first importance
        ratio is 1. Micro-batches are of whole groups where the first epoch scores and compares them.
        """
        config, count = self.config, len(rollout.prompts)
        size = count // config.minibatches
        return [
            micro_batches(rollout, config.batch_size, range(start, start + size), config.kept_together)
            for start in range(0, count, size)
        ]

    def ordered(self, minibatches: list[list[MicroBatch]], t: int, epoch: int) -> list[list[MicroBatch]]:
        """As round t's epoch takes them; epoch 0, which trains nothing, as one."""
        if epoch == 0:
            return [list(chain(*minibatches))]
        return [minibatches[i] for i in minibatch_order(len(minibatches), self.config.seed, t, epoch)]

    @contextmanager
    def training(self) -> Iterator[None]:
        training_mode(self.policy)
        try:
            yield
        finally:
            self.policy.eval()

    def averages_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Around the passes of a micro-batch; `last`: of its minibatch."""
        return processes.averages_gradients(self.wrapped, last)

    def backward(self, log_probs: Tensor, rollout: Rollout, batch: Annotations, rows: Tensor) -> None:
        """Add the gradient of the loss of `rows` to the policy's, and loss and statistics to `batch.totals`."""
        config, weights = self.config, None
        if rollout.sampled_log_probs is not None:
            ratios = importance_ratios(
                batch.log_probs[rows], rollout.sampled_log_probs[rows], rollout.completion_mask[rows]
            )
            weights = ratios.clamp_max(config.generation.importance_cap)
        loss, stats = policy_loss(
            log_probs,
            batch.log_probs[rows],
            batch.reference_log_probs[rows],
            batch.advantages[rows],
            rollout.completion_mask[rows],
            ratio_of=ALGORITHMS[config.algorithm].ratio,
            clip_range=config.clip_range,
            beta=config.kl.beta if config.kl.placement == "loss" else 0.0,
            estimator=config.kl.estimator,
            weights=weights,
        )
        (loss.sum() * config.minibatches / len(rollout.prompts)).backward()
        for name, value in {"loss": loss.detach(), **stats}.items():
            batch.totals[name] = batch.totals.get(name, 0.0) + value.sum()

    def step(self, t: int, epoch: int) -> float:
        """One optimizer step; returns the gradient's norm before clipping. FloatingPointError if it is not finite."""
        norm = processes.full(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)).item()
        if not norm < float("inf"):  # NaN too
            raise FloatingPointError(f"phase policy, round {t}, epoch {epoch}: the gradient norm is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def trained_weights(self) -> dict[str, Tensor]:
        """By name: what a checkpoint holds. What writes into them is seen by `update_generator`."""
        return {name: p.detach() for name, p in processes.named_parameters(self.policy) if p.requires_grad}

    def save_pretrained(self, folder: Any) -> None:
        """The policy, or its adapter, with the tokenizer. All processes take part; the first writes."""
        chosen: dict[str, Any] = {}
        if self.config.placement.shard_policy:
            chosen["state_dict"] = processes.whole(self.policy.state_dict())
        if processes.index():
            return
        if isinstance(self.policy, PeftModel):
            chosen["selected_adapters"] = [self.policy.active_adapter]  # the reference adapter stays out
        self.policy.save_pretrained(str(folder), **chosen)
        self.tokenizer.save_pretrained(folder)
