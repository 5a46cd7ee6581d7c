"""R2M in verl's own trainer, on CPUs: Ray, TransferQueue, FSDP2 and agent loops are verl's; the rollout is a stand-in.

`make verl` has the environment. A run has ten processes, and most of its time goes into starting them.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("verl") is None:  # not imported yet: it reads the environment that is set here
    pytest.skip("verl is not installed; `make verl` has an environment with it", allow_module_level=True)

HERE = Path(__file__).parent
os.environ |= {
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",  # for Ray's processes too
    "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "disabled",
}

import pandas
import ray
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import tensordict_utils as tu
from verl_on_cpu import Float32RewardModel

from examples.own_rloo import save_tiny_models
from r2m import R2MRewardModel
from r2m.integrations import verl
from r2m.integrations.remote import pool_packed
from r2m.integrations.verl import POOLS, PoolingActorRolloutRefWorker
from r2m_kernels import policy_feedback_reward, time_weight

PROMPTS, K, STEPS = 3, 3, 2
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Policy, R2M reward model and prompts, in a folder."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_tiny_models(folder)
    for name in ("policy", "reward_model"):
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)
    R2MRewardModel.from_pretrained(folder / "reward_model", policy=folder / "policy", inner_width=32).save_pretrained(
        folder / "r2m"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": " ".join(f"w{i * 7 + j + 1}" for j in range(1 + i % 3))}],
            "data_source": "none",
            "reward_model": {"ground_truth": ""},
            "extra_info": {"index": i},
        }
        for i in range(8)
    ]
    pandas.DataFrame(rows).to_parquet(folder / "prompts.parquet")
    return folder


def overrides(models, output, ranks):
    model, actor = "actor_rollout_ref.model", "actor_rollout_ref.actor"
    full = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    return [
        "trainer.v1.trainer_mode=r2m",
        f"+r2m.reward_model={models}/r2m",
        "+r2m.learning_rate=0.01",
        "algorithm.adv_estimator=rloo",
        f"data.train_files={models}/prompts.parquet",
        f"data.val_files={models}/prompts.parquet",
        "data.val_max_samples=2",
        f"data.train_batch_size={PROMPTS}",
        "data.max_prompt_length=16",
        "data.max_response_length=8",
        "data.dataloader_num_workers=0",
        f"{model}.path={models}/policy",
        f"{model}.enable_gradient_checkpointing=False",
        f"+{model}.override_config.attn_implementation=sdpa",
        f"{actor}.strategy=fsdp2",
        f"{actor}.use_torch_compile=False",
        f"+{actor}.fsdp_config.mixed_precision={full}",
        f"{actor}.ppo_mini_batch_size=2",
        f"{actor}.ppo_micro_batch_size_per_gpu=3",
        f"{actor}.optim.lr=0.0001",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=3",
        f"+actor_rollout_ref.ref.fsdp_config.mixed_precision={full}",
        "actor_rollout_ref.rollout.name=transformers",
        f"actor_rollout_ref.rollout.n={K}",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.calculate_log_probs=False",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=3",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "reward.num_workers=1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        f"trainer.n_gpus_per_node={ranks}",
        "trainer.nnodes=1",
        "trainer.device=cpu",
        "trainer.logger=[console]",
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=1",
        f"trainer.default_local_dir={output}",
        "trainer.val_before_train=False",
    ]


class Recorded(list):
    """One entry a step: keys, tags and what stood in the queue when rewards were given, then the refreshed pools."""

    FIELDS = ("raw_prompt", "responses", "input_ids", "rm_scores", "r2m_pooled")

    def __init__(self, monkeypatch):
        trainer = get_trainer_cls("r2m")
        advantage, update = trainer._compute_advantage, trainer._update_actor

        def compute_advantage(trainer, batch, metrics):
            result = advantage(trainer, batch, metrics)
            self.append({"tags": batch.tags, "rows": trainer.rows, **self.read(batch, self.FIELDS)})
            return result

        def update_actor(trainer, batch, metrics):
            result = update(trainer, batch, metrics)
            self[-1] |= {"refreshed": self.read(batch, ["r2m_pooled"])["r2m_pooled"], "metrics": dict(metrics)}
            return result

        monkeypatch.setattr(trainer, "_compute_advantage", compute_advantage)
        monkeypatch.setattr(trainer, "_update_actor", update_actor)

    @staticmethod
    def read(batch, fields):
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))
        return {name: list(data[name]) for name in fields}


def train(options, monkeypatch, gpus):
    """A run in this process and Ray's; what `Recorded` has of it."""
    steps = Recorded(monkeypatch)
    monkeypatch.setattr(verl, "RewardModel", Float32RewardModel)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", options)
    ray.init(num_cpus=16, num_gpus=gpus, object_store_memory=200 * 2**20, include_dashboard=False)
    try:
        TaskRunnerV1.__ray_metadata__.modified_class().run(config)
    finally:
        ray.shutdown()
        monkeypatch.undo()
    return steps


def rewards_alone(models, step, rounds):
    """Of the first step: each sequence by itself, through the equations as they stand, by the models on disk."""
    policy = AutoModelForCausalLM.from_pretrained(models / "policy", dtype=torch.float32).eval()
    model = R2MRewardModel.from_pretrained(models / "r2m", policy=models / "policy", dtype=torch.float32)
    attention, head, weight = model.attention, model.head, time_weight(1, rounds, model.config.floor)
    for i in step["rows"]:
        with torch.no_grad():
            hidden = policy.base_model(step["input_ids"][i][None]).last_hidden_state[:, :-1]
            text = model.tokenizer.decode(step["responses"][i], skip_special_tokens=True)
            rte = model.embed([list(step["raw_prompt"][i])], [text])
            weights = (attention.w_q, attention.w_k, attention.w_v, attention.w_o, head.weight, head.bias)
            yield i, policy_feedback_reward(rte, hidden, *weights, weight=weight).item()


def check(models, step, rounds):
    for i, expected in rewards_alone(models, step, rounds):
        scores = step["rm_scores"][i]
        assert scores[-1].item() == pytest.approx(expected, abs=2e-5)
        assert not scores[:-1].any()
    padding = [i for i, tag in enumerate(step["tags"]) if tag.get("is_padding", False)]
    assert sorted(padding + step["rows"]) == list(range(len(step["tags"])))
    assert not any(step["rm_scores"][i].any() for i in padding)
    # Refreshed pools are those of a policy that has moved a little, of the same sequences in the same order. Responses
    # may be equal, and so their pools.
    before, after = (torch.stack([step[name][i] for i in step["rows"]]) for name in ("r2m_pooled", "refreshed"))
    moved = torch.cdist(after, before)
    assert (moved.diagonal() > 0).all() and (moved.diagonal() <= 1.01 * moved.min(1).values).all()
    assert step["metrics"]["grebt/loss"] > 0
    return padding


def rewards_by_text(step):
    return {tuple(step["input_ids"][i].tolist()): step["rm_scores"][i].sum().item() for i in step["rows"]}


def test_two_epochs_with_a_reference_and_rows_that_fill_up_and_the_same_run_resumed(models, tmp_path, monkeypatch):
    options = [
        *overrides(models, tmp_path / "whole", 1),
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.shuffle=True",
        "trainer.val_before_train=True",
    ]
    steps = train(options, monkeypatch, gpus=2)
    assert len(steps) == STEPS
    assert len(check(models, steps[0], STEPS)) == 3  # 9 rows, in mini-batches of 6

    resumed = [
        *options,
        "trainer.val_before_train=False",
        f"trainer.default_local_dir={tmp_path}/resumed",
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={tmp_path}/whole/global_step_1",
    ]
    (again,) = train(resumed, monkeypatch, gpus=2)
    assert rewards_by_text(again) == pytest.approx(rewards_by_text(steps[1]), abs=1e-4)
    start, whole, part = (
        load_file(tmp_path / folder / "r2m" / "r2m.safetensors")
        for folder in ("whole/global_step_1", "whole/global_step_2", "resumed/global_step_2")
    )
    # Rows stand as their responses arrived, so that mini-batches differ, and by a little the refreshed pools. The
    # step of an optimizer that starts anew is longer by a third.
    for name in whole:
        assert (part[name] - whole[name]).norm() <= 0.2 * (whole[name] - start[name]).norm()


def test_two_ranks_with_dynamic_batches_and_an_adapter(models, tmp_path, monkeypatch):
    options = [
        *overrides(models, tmp_path, 2),
        "trainer.total_training_steps=1",
        "data.train_batch_size=4",
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora.merge=True",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16",  # a rank has six sequences, up to 11 tokens each
        "actor_rollout_ref.actor.ppo_epochs=2",
    ]
    (step,) = train(options, monkeypatch, gpus=3)
    assert check(models, step, 1) == []


LENGTHS, RESPONSE = (5, 9, 7, 6, 8, 12), 3


def test_an_actor_pools_each_sequence_and_again_in_the_last_epoch(models, tmp_path, monkeypatch):
    """The worker and its FSDP2 engine, in this process."""
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DIST_INIT_METHOD": f"file://{tmp_path}/store"}
    for name, value in (one | {"MASTER_ADDR": "not used", "MASTER_PORT": "not used"}).items():
        monkeypatch.setenv(name, value)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides(models, tmp_path, 1)).actor_rollout_ref
    config.actor.optim.total_training_steps = 2
    worker = PoolingActorRolloutRefWorker(config=config, role="actor")
    try:
        worker.init_model()
        torch.manual_seed(0)
        ids = [torch.randint(1, 64, (length,)) for length in LENGTHS]
        query, direction = torch.randn(len(ids), 64), torch.randn(64)

        def batch(**values):
            ones = [torch.ones(RESPONSE, dtype=torch.long) for _ in ids]
            rows = {
                "input_ids": ids,
                "position_ids": [torch.arange(len(row)) for row in ids],
                "prompts": [row[:-RESPONSE] for row in ids],
                "responses": [row[-RESPONSE:] for row in ids],
                "response_mask": ones,
                "loss_mask": ones,
                "old_log_probs": [torch.full((RESPONSE,), -4.0) for _ in ids],
                "advantages": [torch.randn(RESPONSE) for _ in ids],
            }
            nested = {name: torch.nested.as_nested_tensor(row, layout=torch.jagged) for name, row in rows.items()}
            data = tu.get_tensordict(nested | {"r2m_query": query})
            for name, value in (values | {"temperature": 1.0, "r2m_direction": direction}).items():
                tu.assign_non_tensor_data(data, name, value)
            return data

        policy = AutoModelForCausalLM.from_pretrained(models / "policy", dtype=torch.float32)
        with torch.no_grad():
            hidden = torch.cat([policy.base_model(row[None]).last_hidden_state[0] for row in ids])
        expected = pool_packed(query, direction, hidden, torch.tensor(LENGTHS))

        for packed in (True, False):
            output = worker.actor.infer_batch(batch(compute_loss=False, use_remove_padding=packed))
            for name, value in zip(POOLS, expected, strict=True):
                found = torch.stack(list(output[name]))
                torch.testing.assert_close(found.view_as(value), value, rtol=1e-4, atol=1e-4)

        settings = {"mini_batch_size": 3, "global_batch_size": 3, "seed": 1, "dataloader_kwargs": {"shuffle": True}}
        worker.actor.train_mini_batch(batch(epochs=2, **settings))
        moved = torch.cdist(worker.actor.refreshed["r2m_pooled"], expected.pooled)
        assert (moved.diagonal() > 0).all() and torch.equal(moved.argmin(1), torch.arange(len(ids)))
    finally:
        torch.distributed.destroy_process_group()


def test_too_few_gpus_is_an_error_not_a_wait(models, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Ray has 1 GPUs; expected 2: 1 for .* 1 for the reward model"):
        train(overrides(models, tmp_path, 1), monkeypatch, gpus=1)


def test_verl_alone_imports_no_adapter_and_chooses_no_platform():
    """Another plugin may register the platform; verl's other trainers, and a name that none has, are as without R2M."""
    code = """if True:
        import sys, verl
        from verl.plugin.platform import platform_manager
        assert platform_manager._current_platform is None
        from verl.trainer.ppo.v1 import get_trainer_cls
        assert get_trainer_cls("sync").__name__ == "PPOTrainerSync"
        try:
            get_trainer_cls("none")
        except ValueError:
            pass
        assert "r2m.integrations.verl" not in sys.modules
        assert get_trainer_cls("r2m").__name__ == "R2MTrainer"
    """
    env = {name: value for name, value in os.environ.items() if name != "VERL_USE_EXTERNAL_MODULES"}
    subprocess.run([sys.executable, "-c", code], env=env | {"VERL_PLATFORM": "nvidia"}, check=True)
