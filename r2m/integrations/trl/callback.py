"""R2M in TRL's RLOOTrainer and GRPOTrainer: a reward function and a callback, and nothing of TRL is subclassed.

    reward, callback = r2m_reward(reward_model, num_generations=8)
    trainer = RLOOTrainer(model=..., reward_funcs=reward, callbacks=[callback], args=..., train_dataset=...)
    trainer.train()
    reward_model.save_pretrained("reward_model")

The trainer runs the policy over prompt + completion itself, and nothing is computed twice. A hook on the policy's
backbone takes the hidden states of the scoring pass for the rewards. Those of the training passes are for the update of
the reward model, which follows the last optimizer step of every rollout.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from r2m import processes
from r2m.analysis.degeneration import degeneration, thirds
from r2m.config import R2M, Preferences
from r2m.data.sources import Prompt
from r2m.data.tokenization import response_texts
from r2m.integrations.trl.checks import (
    check_arguments,
    check_backbone,
    check_noise,
    check_positions,
    check_text,
    check_version,
    check_wait,
    hidden_states,
    known_prompts,
    warn_about_arguments,
)
from r2m.integrations.trl.passes import (
    Pass,
    Rollout,
    Tokens,
    feedback_mask,
    length_of_prompt,
    micro_batches,
    passes_a_rollout,
    sequences_of,
)
from r2m.method.backbone import hidden_width
from r2m.method.hidden_states import policy_backbone
from r2m.method.reward_model import WEIGHTS_FILE, R2MRewardModel
from r2m.method.updater import R2MUpdater
from r2m.names import check_labeller
from r2m.policy.rollout import collate
from r2m.preferences.store import FreshLabels
from r2m.runs.monitor import (
    describe_rewards,
    warn_about_degenerate_groups,
    warn_about_drift,
    warn_about_exploitation,
    warn_about_labels,
)

logger = logging.getLogger(__name__)

_STATE = "state.pt"  # in a checkpoint's r2m/, beside the reward model: all else that a resumed run needs


def r2m_reward(
    reward_model: R2MRewardModel,
    *,
    num_generations: int,
    settings: R2M | None = None,
    preferences: Preferences | None = None,
    capture: Literal["scoring", "forward"] = "scoring",
    update_every: Literal["rollout"] = "rollout",
) -> tuple[Callable[..., list[float]], R2MCallback]:
    """The reward function and the callback that make a trainer of TRL train `reward_model` along with its policy.

    num_generations: K, that of the trainer's arguments.
    settings: fields that describe a new reward model do not apply; `feedback` has to be "trained" or "frozen", and
        `source` "policy".
    preferences: fresh labels of each rollout's pairs (docs/labels.md), asked for before the reward model's step. They
        are written to labels.jsonl in the trainer's output_dir, and its seed draws the pairs.
    capture: where the hidden states for the rewards come from.
        "scoring": the trainer's pass for the old log-probabilities, at no cost in time. The texts are known only when
            rewards are asked for, so the hidden states of a process's share of the rollout wait until then: sequences x
            tokens x width x 2 bytes in bfloat16; under autocast the final norm of most models gives float32, 4 bytes.
        "forward": a pass of its own over the policy's backbone, of which one micro-batch is held: for GRPOTrainer,
            whose defaults skip the scoring pass, and where memory is short.
    update_every: the reward model takes one step a rollout, not one a step of the policy's optimizer.

    Rounds t of T are rollouts, as many as the trainer's steps make. Held-out batches are scored at w = Omega and train
    nothing. With several reward functions, pairs are picked by this one alone. The reward model moves to the trainer's
    device; under several processes its copies start equal and average their gradients.

    `callback.history` has a row of metrics for each rollout, of a resumed run also those before; TRL logs them as
    `r2m/...` with the rollout after. Warnings are those of `R2MTrainer`, and at the end of training those of
    `r2m diagnose`. Checkpoints of the trainer hold in `r2m/` the reward model, as `from_pretrained` loads it, its
    optimizer, and the labels that it learns from.

    Raises ImportError where TRL is missing or its release is not supported, ValueError for an argument out of range, a
    labeller that is not there, a reward model partitioned by ZeRO-3 or without its statistics. The trainer's
    construction raises ValueError where its arguments do not fit, or where the policy's hidden states depend on
    padding: TRL gives no position ids, so learned positions are wrong (a policy that FSDP or DeepSpeed shards is not
    tried). Training raises ValueError before anything is sampled where the policy has dropout or other noise, or the
    reward model's chat template refuses the prompts; RuntimeError where its passes are not those that are expected.
    """
    check_version()
    settings, preferences = settings or R2M(), preferences or Preferences()
    if update_every != "rollout":
        raise ValueError(f"update_every is {update_every!r}; expected 'rollout'")
    if capture not in ("scoring", "forward"):
        raise ValueError(f"capture is {capture!r}; expected 'scoring' or 'forward'")
    if not settings.attends:
        raise ValueError(
            f"settings.feedback is {settings.feedback!r}; expected 'trained' or 'frozen': without feedback, give TRL "
            "the reward checkpoint itself as reward_funcs"
        )
    if settings.source != "policy":
        raise ValueError(f"settings.source is {settings.source!r}; expected 'policy', whose passes TRL makes anyway")
    if preferences.labeller is not None:
        if not settings.trains:
            raise ValueError(
                f"preferences.labeller is set, and settings.feedback {settings.feedback!r} learns nothing; expected "
                "'trained'"
            )
        check_labeller(preferences.labeller)
    if reward_model.needs_statistics:
        raise ValueError(
            "reward_model standardises its inputs and has no statistics yet; expected one that "
            "`r2m fit-reward` has fitted, or standardize=False"
        )
    if any(hasattr(p, "ds_id") for p in (*reward_model.parameters(), *reward_model.backbone.parameters())):
        raise ValueError(
            "reward_model is partitioned by DeepSpeed ZeRO-3, and its weights are read as a whole; load it "
            "before the trainer's arguments are made"
        )
    callback = R2MCallback(reward_model, settings, preferences, num_generations, capture)
    return callback.r2m_reward, callback  # a function: TRL gives a module texts of its own making


class R2MCallback(TrainerCallback):
    """What `r2m_reward` returns; one trainer's."""

    def __init__(
        self,
        reward_model: R2MRewardModel,
        settings: R2M,
        preferences: Preferences,
        num_generations: int,
        capture: str,
    ):
        self.reward_model, self.settings, self.preferences = reward_model, settings, preferences
        self.num_generations, self.capture = num_generations, capture
        self.history: list[dict[str, float]] = []
        self._args: Any = None  # the trainer's
        self._updater: R2MUpdater | None = None
        self._labels: FreshLabels | None = None
        self._captured: list[Pass] = []
        self._rollout: Rollout | None = None
        self._unlogged: dict[str, float] = {}

    # ---- the reward function ----

    @torch.no_grad()
    def r2m_reward(
        self,
        prompts: list[Prompt],
        completions: list[Any],
        completion_ids: list[list[int]],
        *,
        log_metric: Callable[[str, float], None],
        **columns: Any,
    ) -> list[float]:
        """Rewards of completions that the policy has just been run over, as TRL asks for them."""
        if self._args is None:
            raise RuntimeError("the trainer was not given the callback; expected callbacks=[callback]")
        updater = self._updater if self._model.training else None  # None: a held-out batch
        if updater is not None:
            self._align_reward_model()  # of a rollout that ended inside an optimizer step
        prompt_ids = [ids for prompt, run in groupby(prompts) for ids in [self._prompt_ids(prompt)] * len(list(run))]
        for completion in completions:
            check_text(completion)
        # Of messages TRL may have parsed a part away, such as the reasoning.
        texts = response_texts(self._tokenizer, prompts, prompt_ids, completion_ids)
        rte = self.reward_model.embed(prompts, texts)
        if updater is not None:
            t = min(updater.total_steps, len(self.history) + 1)
            updater.begin_round(rte, t)
        rewards, rows_of, skipped = rte.new_empty(len(rte)), dict[Tokens, list[int]](), list[int]()
        for sequences, hidden, mask in self._passes_over(prompts, texts, prompt_ids, completion_ids):
            rows = slice(len(skipped), len(skipped) + len(sequences))
            for row, sequence in enumerate(sequences, rows.start):
                prompt_length = length_of_prompt(sequence, completion_ids[row])
                rows_of.setdefault(sequence, []).append(row)
                skipped.append(prompt_length if self.settings.positions == "response" else 0)
            feedback = feedback_mask(mask, skipped[rows])
            if updater is not None:
                rewards[rows] = updater.score(rows, hidden, feedback)
            else:
                weight, scale = self.settings.floor, 1.0 if self._updater is None else self._updater.scale
                rewards[rows] = scale * self.reward_model.score(rte[rows], hidden, weight=weight, mask=feedback)
        self._captured.clear()
        if not torch.isfinite(rewards).all():  # TRL would leave the samples out
            raise FloatingPointError(
                f"{int((~torch.isfinite(rewards)).sum())} of {len(rewards)} rewards are not finite"
            )
        if updater is not None:
            initial = self._initial_head(self.reward_model.standardized(rte))
            self._rollout = Rollout(t, prompts, texts, rewards, initial, self._args.num_iterations, rows_of, skipped)
            correlation = updater.alignment(self.reward_model.vanilla_score(rte)).item()
            for name, value in {**self._unlogged, "weight": updater.weight, "correlation": correlation}.items():
                log_metric(f"r2m/{name}", value)
            self._unlogged = {}
        return rewards.tolist()

    def _passes_over(
        self, prompts: list[Prompt], texts: list[str], prompt_ids: list[list[int]], completion_ids: list[list[int]]
    ) -> Iterator[Pass]:
        """The policy's passes over these samples, in their order."""
        if self.capture == "scoring":
            found = sum(len(one.sequences) for one in self._captured)
            if not found:
                raise RuntimeError(
                    "the trainer did not run the policy over the completions before it asked for their rewards: "
                    "GRPOTrainer does not where gradient_accumulation_steps is a multiple of steps_per_generation * "
                    "num_iterations; expected capture='forward' there"
                )
            if found != len(texts):
                raise RuntimeError(
                    f"the policy ran over {found} sequences before the rewards of {len(texts)} were asked "
                    "for; expected each once"
                )
            yield from self._captured
            return
        args, tokenizer = self._args, self._tokenizer
        size = args.per_device_train_batch_size if self._model.training else args.per_device_eval_batch_size
        batch = collate(
            prompts,
            texts,
            prompt_ids,
            completion_ids,
            pad_id=tokenizer.pad_token_id,
            device=args.device,
        )
        for start in range(0, len(texts), size):
            ids, mask = batch.input_ids[start : start + size], batch.attention_mask[start : start + size]
            yield Pass(sequences_of(ids, mask), hidden_states(self._backbone, ids, mask.long(), args), mask)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        """As TRL tokenises it."""
        if isinstance(prompt, str):
            return self._tokenizer(text=prompt)["input_ids"]
        kwargs = {"add_generation_prompt": True, "return_dict": False, **(self._args.chat_template_kwargs or {})}
        return self._tokenizer.apply_chat_template(prompt, **kwargs)

    # ---- the policy's forward passes ----

    def _on_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Scoring passes run without gradient and wait for the rewards; training passes are collected at once."""
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            self._captured.clear()  # a generation step: what ran before was not for its rewards
            return
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != ids.shape:
            return  # not TRL's; a pass that is missed is found missing
        if not self._adapter_is_the_policys():
            return  # a reference pass
        training = torch.is_grad_enabled()
        if (training and self._rollout is None) or (not training and self.capture == "forward"):
            return
        hidden = (output[0] if isinstance(output, tuple) else output.last_hidden_state).detach()
        mask = mask.bool()
        sequences = sequences_of(ids, mask)
        if not training:
            self._captured.append(Pass(sequences, hidden, mask))
        elif self._rollout is not None and self._updater is not None:
            rows = [self._rollout.row_of(sequence) for sequence in sequences]
            # Of several training passes the last one stays.
            self._updater.collect(rows, hidden, feedback_mask(mask, [self._rollout.skipped[row] for row in rows]))

    def _adapter_is_the_policys(self) -> bool:
        """TRL's reference pass of a PEFT model runs the policy itself, with its adapter off or another one on."""
        layer = self._adapter_layer
        return layer is None or (not layer.disable_adapters and layer.active_adapters == self._adapters)

    @torch.enable_grad()  # the rewards are asked for without
    def _align_reward_model(self) -> None:
        """Step 5 of a round: labels, pairs, GREBT, one optimizer step, for the rollout that waits for it, if any."""
        if self._rollout is None or self._updater is None:
            return
        rollout, updater, labels, size = self._rollout, self._updater, self._labels, self.num_generations
        self._rollout = None
        own = torch.stack([rollout.rewards, rollout.initial], -1)
        rewards, initial = processes.gather(own, size).unbind(-1)
        row = describe_rewards(rewards, initial, rewards, num_generations=size, eps=self.settings.eps)
        if labels is not None:
            row |= labels.ask(rollout.prompts, rollout.texts, rollout.rewards, rollout.t)
        labels_loss = None if labels is None else labels.loss()
        row |= processes.mean(updater.step(rollout.rewards, labels_loss, grebt=self.preferences.grebt))
        self._unlogged = row
        self.history.append({"round": rollout.t, "weight": updater.weight, **row})
        if processes.index() == 0:
            warn_about_drift(self.history)
            warn_about_degenerate_groups(self.history)
            warn_about_exploitation(self.history)
            warn_about_labels(self.history)

    # ---- events of the trainer ----

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._args is not None:
            raise ValueError("callback belongs to another trainer already; expected a new r2m_reward for each")
        check_arguments(args, self.num_generations)
        self._model, self._tokenizer = kwargs["model"], kwargs["processing_class"]
        self.reward_model.check_policy_width(hidden_width(self._model))
        self.reward_model.to(args.device)
        self._backbone = policy_backbone(self._model)
        check_positions(self._model, self._backbone, args)
        self._backbone.register_forward_hook(self._on_forward, with_kwargs=True)
        layers = (module for module in self._model.modules() if isinstance(module, BaseTunerLayer))
        self._adapter_layer = next(layers, None)
        self._adapters = [] if self._adapter_layer is None else list(self._adapter_layer.active_adapters)
        self._args = args

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        batches = kwargs["train_dataloader"]
        self.reward_model.check_prompts(known_prompts(batches.dataset))
        check_noise(self._model, self._backbone, args)
        check_wait(args, self.preferences)
        check_backbone(self.reward_model)
        # TRL counts optimizer steps, of which a rollout may take several or less than one.
        length, accumulated = passes_a_rollout(args), args.gradient_accumulation_steps
        epoch = len(batches) if has_length(batches) else None
        self._updater = R2MUpdater(
            self.reward_model,
            self.settings,
            total_steps=-(-micro_batches(state.max_steps, accumulated, epoch) // length),
            num_generations=self.num_generations,
        )
        if self.preferences.labeller is not None:
            self._labels = FreshLabels(self._updater, self.preferences, folder=args.output_dir, seed=args.seed)
        self.history, self._rollout = [], None
        processes.keep_equal(self.reward_model)
        self._initial_head = copy.deepcopy(self.reward_model.head)
        if state.global_step:
            self._restore(args, state)
        warn_about_arguments(args)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._rollout is None and not self.history:
            raise RuntimeError("the trainer asked for no reward; expected reward_funcs=reward, of the same r2m_reward")
        if self._rollout is not None and self._rollout.is_complete:
            self._align_reward_model()

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._captured.clear()  # of the pass for the held-out loss

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._rollout is not None:
            logger.warning("training ended inside rollout %d: the reward model was not updated on it", self._rollout.t)
        if processes.index() == 0 and len(self.history) >= 3:
            for warning in degeneration(thirds(self.history), self.settings.eps):
                logger.warning("%s", warning)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._updater is None:
            return
        saved = {
            "updater": self._updater.state_dict(),
            "labels": None if self._labels is None else self._labels.state_dict(),
            "initial_head": self._initial_head.state_dict(),
            "history": self.history,
        }
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / "r2m"
            self.reward_model.save_pretrained(folder)
            torch.save(saved, folder / _STATE)

    def _restore(self, args: Any, state: TrainerState) -> None:
        """TRL tells a callback where training goes on, not from which folder."""
        given = args.resume_from_checkpoint
        checkpoint = Path(given or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        folder = checkpoint / "r2m"
        if not (folder / _STATE).is_file():
            raise FileNotFoundError(
                f"training goes on after step {state.global_step}, and {folder} holds no reward model; expected a "
                "checkpoint that was written with this callback, in args.output_dir or at args.resume_from_checkpoint"
            )
        saved = torch.load(folder / _STATE, map_location=args.device, weights_only=True)
        if (saved["labels"] is None) != (self._labels is None):
            raise ValueError(
                f"preferences.labeller is {self.preferences.labeller!r}, and {folder} is of a run "
                f"with{'out' if saved['labels'] is None else ''} fresh labels; expected preferences as in that run"
            )
        assert self._updater is not None
        self.reward_model.load_state_dict(load_file(folder / WEIGHTS_FILE, device=str(args.device)))
        self._updater.load_state_dict(saved["updater"])
        if self._labels is not None:
            self._labels.load_state_dict(saved["labels"])
        self._initial_head.load_state_dict(saved["initial_head"])
        self.history = saved["history"]
