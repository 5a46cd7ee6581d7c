"""R2M in verl's PPO trainer: `trainer.v1.trainer_mode=r2m`, with the settings under `+r2m.` (docs/verl.md).

verl finds the trainer by itself, by an entry point of its group `verl.plugins` (verl_plugin.py). What is registered
here, the trainer and its engine, has names of its own, so that runs without R2M stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.plugin.platform import get_platform
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from r2m.config import R2M
from r2m.integrations.remote import Pools, RewardModel, check_settings, pool_packed
from r2m.integrations.verl_plugin import NAME
from r2m.method.hidden_states import HiddenStateTap
from r2m_kernels import attention_pool_with_gradient

QUERY, DIRECTION, ROW = "r2m_query", "r2m_direction", "r2m_row"  # of a batch
POOLS = [f"r2m_{name}" for name in Pools._fields]


# ---- the policy's processes ----


@EngineRegistry.register(model_type=NAME, backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class PoolingEngine(FSDPEngineWithLMHead):
    """Pools each micro-batch that comes with g, as its hidden states are computed.

    The pools of a pass without gradient leave with its log-probs; `refreshed` has those of training, by row.
    """

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> tuple[Tensor, dict]:
        direction = tu.get_non_tensor_data(micro_batch, DIRECTION, default=None)
        if direction is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        found: list[Pools] = []

        def pool(hidden: Tensor, _: Tensor | None) -> None:
            rows = micro_batch.to(hidden.device)
            query, lengths = torch.stack(rows[QUERY].unbind()), rows["input_ids"].offsets().diff()
            g = direction.to(hidden.device)
            if tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True):
                found.append(pool_packed(query, g, hidden.squeeze(0), lengths, group=self.ulysses_parallel_group))
            else:
                mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None] - 1
                found.append(Pools(*attention_pool_with_gradient(query, hidden, g, mask=mask, scale=1.0)))

        with HiddenStateTap(self.module, pool):
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if len(found) != 1:
            raise RuntimeError(
                f"the backbone was called {len(found)} times for a micro-batch; expected once. A patch that calls its "
                "layers without it hides the hidden states: switch it off (actor_rollout_ref.model.use_fused_kernels)"
            )
        if forward_only:
            output["model_output"] |= by_name(found[0])
        else:
            self.refreshed.append((micro_batch[ROW].to(found[0].lse.device), *found[0]))
        return loss, output


def by_name(pools: Pools) -> dict[str, Tensor]:
    """Fields of a batch; verl wants a dimension beside that of the rows."""
    return dict(zip(POOLS, (*pools[:2], pools.lse.view(len(pools.lse), -1)), strict=True))


class PoolingWorker(TrainingWorker):
    """An actor that pools again in the last epoch of its update; verl drops what a training pass returns."""

    def __init__(self, config: TrainingWorkerConfig):
        super().__init__(dataclasses.replace(config, model_type=NAME))
        self.model_config.model_type = config.model_type  # which model the engine builds

    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        rows = len(data)
        data[ROW] = torch.arange(rows)
        self.engine.refreshed, self._rows_before = [], rows * (tu.get(data, "epochs") - 1)
        output = super().train_mini_batch(data)
        row, *parts = (torch.cat(part) for part in zip(*self.engine.refreshed, strict=True))
        self.refreshed = tu.get_tensordict(by_name(Pools(*(t[row.argsort()] for t in parts))))
        return output

    def train_batch(self, data: TensorDict) -> TensorDict:
        if self._rows_before > 0:
            tu.pop(data, DIRECTION)
        self._rows_before -= len(data)
        return super().train_batch(data)


class PoolingActorRolloutRefWorker(ActorRolloutRefWorker):
    actor_worker_cls = PoolingWorker

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def refreshed_pools(self, data: TensorDict) -> TensorDict:
        """Of the last update of the same batch, in its order: into the batch, as all that verl's workers return."""
        return self.actor.refreshed.cpu()


# ---- the controller ----


@register_trainer(NAME)
class R2MTrainer(PPOTrainerSync):
    """verl's synchronous trainer whose rewards come from a reward model that reads the policy's hidden states."""

    def __init__(self, config: DictConfig):
        self.reward_model_path, self.settings = read_settings(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl asks in several places whether it is that
            # verl wants a score when a response arrives; R2M has none before the log-prob pass.
            config.reward.custom_reward_function.path = f"pkg://{no_score.__module__}"
            config.reward.custom_reward_function.name = no_score.__name__
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in {Role.ActorRollout, Role.ActorRolloutRef} & set(self.role_worker_mapping):
            self.role_worker_mapping[role] = ray.remote(PoolingActorRolloutRefWorker)
        check_resources(self.resource_pool_manager.get_n_gpus())
        self.reward_model = (
            ray.remote(RewardModel)
            .options(**get_platform().ray_resource_options(1))
            .remote(
                self.reward_model_path,
                self.config.actor_rollout_ref.model.path,
                self.total_training_steps,
                self.config.actor_rollout_ref.rollout.n,
                self.settings,
                get_platform().device_name,
            )
        )
        ray.get(self.reward_model.__ray_ready__.remote())

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        self.rows = prompt_major(batch, self.config.actor_rollout_ref.rollout.n)
        texts = self._get(batch, ["raw_prompt", "responses"])
        prompts, ids = list(texts["raw_prompt"]), texts["responses"].unbind()
        responses = self.tokenizer.batch_decode([ids[i].tolist() for i in self.rows], skip_special_tokens=True)
        query, self.direction = ray.get(
            self.reward_model.begin_round.remote([prompts[i] for i in self.rows], responses, self.global_steps)
        )
        queries = query.new_zeros(len(batch), *query.shape[1:])  # rows that fill up the batch keep zeros
        queries[self.rows] = query
        self._put(batch, QUERY, queries)
        batch.extra_info[DIRECTION] = self.direction
        batch = super()._compute_old_log_prob(batch, metrics)
        batch.extra_info.pop(DIRECTION, None)  # an adapter's reference is a pass of the same worker
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        rewards = torch.zeros(len(batch))
        rewards[self.rows] = ray.get(self.reward_model.score.remote(self._pools(batch)))
        masks = self._get(batch, ["response_mask"])["response_mask"].unbind()
        scores = [
            torch.nn.functional.pad(reward[None], (len(mask) - 1, 0))  # at the last token
            for reward, mask in zip(rewards, masks, strict=True)
        ]
        self._put(batch, "rm_scores", torch.nested.as_nested_tensor(scores, layout=torch.jagged))
        return super()._compute_advantage(batch, metrics)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch.extra_info[DIRECTION] = self.direction
        batch = super()._update_actor(batch, metrics)
        batch.extra_info.pop(DIRECTION)
        rows = KVBatchMeta(keys=batch.keys, tags=batch.tags, partition_id=batch.partition_id, fields=[QUERY])
        self.actor_rollout_wg.refreshed_pools(rows)
        metrics.update(ray.get(self.reward_model.step.remote(self._pools(batch))))
        return batch

    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        ray.get(self.reward_model.save.remote((folder / NAME).absolute()))
        super()._save_checkpoint()  # its last file says that the checkpoint is whole

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            trainer = self.config.trainer
            folder = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
            if trainer.resume_mode == "resume_path":
                folder = Path(trainer.resume_from_path)
            ray.get(self.reward_model.load.remote((folder / NAME).absolute()))

    def _get(self, batch: KVBatchMeta, fields: list[str]) -> TensorDict:
        return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)

    def _put(self, batch: KVBatchMeta, field: str, values: Tensor) -> None:
        fields = tu.get_tensordict({field: values})
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _pools(self, batch: KVBatchMeta) -> Pools:
        data = self._get(batch, POOLS)
        pooled, gradient, lse = (torch.stack([data[name][i] for i in self.rows]) for name in POOLS)
        return Pools(pooled, gradient, lse.squeeze(1))


def read_settings(config: DictConfig) -> tuple[str, R2M]:
    """The reward model's path and R2M's settings, from `config.r2m`.

    Raises ValueError for what is missing, unknown, or leaves R2M without hidden states or groups.
    """
    given: Any = OmegaConf.to_container(config.get(NAME) or OmegaConf.create(), resolve=True)
    path = given.pop("reward_model", None)
    if path is None:
        raise ValueError(
            "r2m.reward_model is missing; expected +r2m.reward_model=FOLDER, an R2M reward model or a "
            "sequence-classification checkpoint"
        )
    settings = R2M(**given)
    check_settings(settings, config.actor_rollout_ref.rollout.n)
    expected = {
        "actor_rollout_ref.actor.strategy": ("fsdp", "fsdp2"),
        "algorithm.rollout_correction.bypass_mode": (False, None),  # no log-prob pass
        "algorithm.filter_groups.enable": (False, None),  # by scores that are not there yet
        "reward.reward_model.enable": (False, None),  # verl's own rewards
        "reward.custom_reward_function.path": (None,),
        "trainer.critic_warmup": (0, 1),  # no update, no refresh
    }
    for name, values in expected.items():
        found = OmegaConf.select(config, name)
        if found not in values:
            raise ValueError(f"{name} is {found!r}; with trainer.v1.trainer_mode=r2m, expected {values[0]!r}")
    return path, settings


def check_resources(policy: int) -> None:
    """Raises ValueError if the cluster has not `policy` accelerators and one more: Ray would wait for ever."""
    name = get_platform().ray_resource_name()
    found = ray.cluster_resources().get(name, 0)
    if found < policy + 1:
        raise ValueError(
            f"Ray has {found:g} {name}s; expected {policy + 1}: {policy} for trainer.n_gpus_per_node * trainer.nnodes "
            "and what else the config asks for, and 1 for the reward model. Lower trainer.n_gpus_per_node, or add one"
        )


def prompt_major(batch: KVBatchMeta, num_generations: int) -> list[int]:
    """Rows of the batch, the K responses to a prompt one after another, without those that fill it up."""
    groups = defaultdict(list)
    for row, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
        if not tag.get("is_padding", False):
            groups[key.rsplit("_", 2)[0]].append(row)  # {uid}_{session}_{index}
    sizes = {len(rows) for rows in groups.values()}
    if sizes != {num_generations}:
        raise ValueError(
            f"prompts have {sorted(sizes)} responses; expected {num_generations} each, actor_rollout_ref.rollout.n "
            "(one output to a session, none failed)"
        )
    return [row for rows in groups.values() for row in rows]


def no_score(**_: Any) -> float:
    return 0.0
