"""The memory estimate against what real tensors of a real run take, phase by phase, and against sums made by hand."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from r2m import processes
from r2m.commands.build import build_trainer
from r2m.commands.memory import estimate_memory
from r2m.config import config_from_dict
from r2m.integrations.vllm import cache_bytes
from r2m_kernels.bench.measure import MemoryTracker

PROMPT, RESPONSE, WORDS = 30, 20, 2000
SHAPE = {"vocab_size": WORDS, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}


def peaks_of_round(trainer, tracker, t):
    peaks, row = {}, {}
    rollout, peaks["rollout"] = tracker.peak_of(lambda: trainer.sample(t))
    batch, peaks["annotate"] = tracker.peak_of(lambda: trainer.annotate(rollout, t, row))
    _, peaks["policy"] = tracker.peak_of(lambda: trainer.optimize_policy(rollout, batch, t, row))
    _, peaks["reward_model"] = tracker.peak_of(lambda: trainer.align_reward_model(batch, t, row))
    return peaks, rollout, batch


def measured_peaks(config):
    """Live bytes of real tensors at the peak of each phase of the second round."""
    trainer, tracker = build_trainer(config), MemoryTracker()
    with trainer.learner.reference() as reference:
        models = [trainer.policy, reference, trainer.reward_model, trainer.reward_model.backbone]
    for tensor in itertools.chain(*(itertools.chain(model.parameters(), model.buffers()) for model in models)):
        tracker.add(tensor)
    with tracker:
        first_round = peaks_of_round(trainer, tracker, 1)  # what a round leaves lies there in the next one
        return peaks_of_round(trainer, tracker, 2)[0] if first_round else None


def assert_estimated(peaks, estimated):
    """Of the phases that were measured and that this run has."""
    phases = peaks.keys() & estimated.keys()
    assert phases >= {"rollout", "annotate", "policy", "reward_model"}
    assert {phase: estimated[phase] for phase in phases} == pytest.approx(
        {phase: peaks[phase] for phase in phases}, rel=0.15
    )


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a random policy of a config, a reward model of another shape, and prompts; each of weights, activations and
    logits is a share of the whole that the tolerance below would not hide."""

    def make(policy, dtype=torch.float32):
        folder = tmp_path_factory.mktemp("memory")
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1", unk_token="w0")
        reward = LlamaConfig(**SHAPE, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_labels=1)
        for name, model in (
            ("policy", AutoModelForCausalLM.from_config(policy)),
            ("reward", LlamaForSequenceClassification(reward)),
        ):
            model.to(dtype).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        prompts = [" ".join(["w7"] * (PROMPT - i)) for i in range(4)]  # of several lengths: masks are needed
        (folder / "prompts.txt").write_text("\n".join(prompts))
        return folder

    return make


@pytest.fixture(scope="module")
def llama(save):
    return save(LlamaConfig(**SHAPE, **SIZES))


def run_config(folder, **settings):
    return config_from_dict(run_settings(folder, **settings))


def run_settings(folder, **settings):
    defaults = {
        "policy": str(folder / "policy"),
        "reward_model": str(folder / "reward"),
        "prompts": str(folder / "prompts.txt"),
        "output_dir": str(folder / "out"),
        "prompts_per_round": 4,
        "num_generations": 4,
        "micro_batch_size": 8,
        "learning_rate": 1e-4,
        "precision": "float32",
        "r2m": {"inner_width": 64},
        "generation": {"max_prompt_tokens": PROMPT, "max_new_tokens": RESPONSE, "eos_token_ids": [WORDS]},
    }
    return defaults | settings


CASES = {
    "full": {},
    "full, bf16": {"precision": "bf16"},
    "adapter": {"lora": {"rank": 4}},
    "adapter, bf16": {"lora": {"rank": 4}, "precision": "bf16"},
    "adapter in the last layer": {"lora": {"rank": 4, "top_layers": 1}},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, adapter, bf16": {"gradient_checkpointing": True, "lora": {"rank": 4}, "precision": "bf16"},
    "eager attention": {"placement": {"attention": "eager"}},
    "scoring apart": {"micro_batch_size": 3},  # groups are not whole in a pass
    "one pass": {"micro_batch_size": 16},  # its gradients come as its activations go
    "minibatches": {"minibatches": 2, "micro_batch_size": 4, "epochs": 1},
    "budget of tokens": {"micro_batch_size": None, "micro_batch_tokens": 9 * (PROMPT + RESPONSE)},  # two groups
    "budget, scoring apart": {"micro_batch_size": None, "micro_batch_tokens": 3 * (PROMPT + RESPONSE)},
    "one response, frozen reward model": {
        "algorithm": "reinforce++", "kl": {"placement": "reward"}, "num_generations": 1, "prompts_per_round": 16,
        "r2m": {"feedback": "frozen", "inner_width": 64},
    },
    "the head alone trains": {"r2m": {"feedback": "head", "inner_width": 64}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_the_peak_of_every_phase_is_that_of_a_real_run(llama, case):
    config = run_config(llama, **CASES[case])
    assert_estimated(measured_peaks(config), estimate_memory(config).phases)


# LayerNorm, one product for q, k and v, an MLP without gate; the same, with gelu_new; norms of heads; experts.
@pytest.mark.parametrize(
    "policy",
    [
        GPTNeoXConfig(vocab_size=WORDS, num_attention_heads=4, **SIZES),
        GPT2Config(vocab_size=WORDS, n_embd=128, n_inner=384, n_layer=4, n_head=4, n_positions=64),
        Qwen3Config(**SHAPE, **SIZES, head_dim=32),
        MixtralConfig(**SHAPE, **SIZES, num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=lambda policy: policy.model_type,
)
@pytest.mark.slow
def test_other_layers_keep_what_theirs_keep(save, policy):
    config = run_config(save(policy))
    assert_estimated(measured_peaks(config), estimate_memory(config).phases)


@pytest.mark.slow
def test_batches_of_generation_bound_the_cache(llama):
    config = run_config(llama)
    whole = estimate_memory(config)
    config.generation.batch_size = 8
    half = estimate_memory(config)
    assert half.parts["generation cache"] == whole.parts["generation cache"] / 2
    assert half.phases["rollout"] == pytest.approx(measured_peaks(config)["rollout"], rel=0.15)


# ---- resident memory of processes ----

SCRIPT = Path(__file__).with_name("peaks_of_processes.py")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def weighty(save):
    """60M parameters. In bfloat16 on the disk: weights that a run maps from a file, unconverted, are not its own."""
    size = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 8}
    return save(LlamaConfig(**SHAPE, **size), torch.bfloat16)


def resident_peaks(folder, number, settings):
    """Bytes of each phase in every process, beyond what an interpreter takes that has imported all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    # Freed memory goes back at once: all but the smallest allocations are mappings of their own.
    shared = {"MALLOC_MMAP_THRESHOLD_": 2**16, "MALLOC_TRIM_THRESHOLD_": 2**16, "PYTHONPATH": ROOT}
    shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
    group = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [shared | group | {"RANK": i, "LOCAL_RANK": i} for i in range(number)] if number > 1 else [shared]
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder / "run.yaml"), str(folder)],
            env=os.environ | {key: str(value) for key, value in environment.items()},
        )
        for environment in environments
    ]
    try:
        assert [process.wait(600) for process in started] == [0] * number
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"peaks-{i}.json").read_text()) for i in range(number)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "placement"),
    [(1, {}), (2, {}), (2, {"shard_policy": True})],
    ids=["one process", "two copies", "two shards"],
)
def test_processes_take_the_memory_that_is_estimated(weighty, tmp_path, number, placement):
    pair = {"prompt": "w7 " * PROMPT, "chosen": "w8 w8", "rejected": "w9"}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps(pair)] * 4))
    settings = run_settings(
        weighty,
        num_generations=2,
        micro_batch_size=2,
        generation={"max_prompt_tokens": PROMPT, "max_new_tokens": 4, "eos_token_ids": [WORDS]},
        evaluation={"prompts": str(weighty / "prompts.txt"), "pairs": str(tmp_path / "pairs.jsonl")},
        placement=placement,
        output_dir=str(tmp_path / "out"),
    )
    estimated = estimate_memory(config_from_dict(settings), number).phases
    for peaks in resident_peaks(tmp_path, number, settings):
        assert_estimated(peaks, estimated)


# ---- sums made by hand ----

# Widths of Llama-3-8B, two layers; its weights: layers with norms, and a table each for embedding and head.
D, Q, K, M, V = 4096, 4096, 1024, 14336, 128256
LAYERS, TABLE = 2 * (2 * D * Q + 2 * D * K + 3 * D * M) + 5 * D, V * D
LENGTH, NEW = 1024, 512


@pytest.fixture
def large(tmp_path):
    """A config alone: no weights and no tokenizer."""
    shape = {"vocab_size": V, "hidden_size": D, "intermediate_size": M, "num_hidden_layers": 2}
    llama = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"])
    llama.save_pretrained(tmp_path)
    return {"policy": str(tmp_path), "reward_model": str(tmp_path), "precision": "bf16"}


def test_parts_of_full_training(large):
    estimate = estimate_memory(config_from_dict(large | {"placement": {"device": "cuda"}}))
    weights, sequences = LAYERS + 2 * TABLE, 64 * 8
    expected = {
        "policy weights": 4 * weights,
        "reference": 4 * weights,
        "gradients": 4 * weights,
        "optimizer state": 8 * weights,
        "reward model backbone": 2 * (LAYERS + TABLE),  # bfloat16, without the policy's head
        # W_q, W_k, W_v, W_o of inner width 2048 and phi, 16 bytes each, beside a few vectors of every sequence.
        "R2M part": 16 * (4 * 2048 * D + D) + 4 * sequences * (4 * D + 2048) + sequences * (20 * LENGTH + 12 * NEW),
        "logits": 8 * (NEW + 1) * V * 2,  # of a micro-batch of 8, in bfloat16
        "generation cache": sequences * (LENGTH - 1) * 2 * 2 * K * 4,  # two layers, keys and values in float32
    }
    assert {part: estimate.parts[part] for part in expected} == expected
    # Of a token and layer: inputs of five half norms, as they are and normalised, in float32; in bfloat16 the input of
    # six products, q, k, v and the result, a row of the mask, and gate, up, activation and product.
    kept = 5 * D * 4 + (6 * D + 4 * Q + LENGTH + 4 * M) * 2
    assert estimate.terms["policy"]["activations"] == 2 * 8 * LENGTH * kept
    assert estimate.terms["policy"]["bfloat16 weights"] == 2 * (LAYERS + TABLE)


@pytest.mark.parametrize(("tokens", "size"), [(17 * LENGTH, 16), (7 * LENGTH, 7), (1, 1), (None, 8)])
def test_a_budget_takes_the_memory_of_the_sequences_of_greatest_length_in_it(large, tokens, size):
    """17 are two whole groups; of 7, scoring is a pass of its own, and groups are cut."""
    budget = estimate_memory(config_from_dict(large | {"micro_batch_tokens": tokens}))
    assert budget == estimate_memory(config_from_dict(large | {"micro_batch_size": size}))


def test_an_adapter_trains_its_own_weights_alone(large):
    def parts(**lora):
        return estimate_memory(
            config_from_dict(large | {"lora": {"rank": 16, "target_modules": ["q_proj"]} | lora})
        ).parts

    adapter = 2 * 16 * (D + Q)  # in each layer, two matrices beside q_proj
    assert parts()["policy weights"] == 2 * (LAYERS + 2 * TABLE) + 4 * adapter
    assert parts()["optimizer state"] == 2 * parts()["gradients"] == 8 * adapter
    assert parts()["reference"] == 0  # a new adapter is the identity: switched off
    assert parts(top_layers=1)["gradients"] == 4 * adapter / 2


def test_placement_takes_models_off_the_policy_s_device(large):
    def estimate(**placement):
        few = {"prompts_per_round": 4, "num_generations": 4}
        return estimate_memory(config_from_dict(large | few | {"placement": {"device": "cuda"} | placement}))

    whole, apart = estimate(), estimate(reward_model="cpu")
    off = estimate(offload_reference=True, offload_reward_model=True)
    backbone, reference = whole.parts["reward model backbone"], whole.parts["reference"]
    assert off.parts["reference"] == off.parts["reward model backbone"] == 0
    assert whole.phases["policy"] - off.phases["policy"] == backbone + reference
    # Activations of the policy, beside which neither lies, are most of what annotating takes.
    assert whole.phases["annotate"] - off.phases["annotate"] == backbone + reference
    assert whole.phases["policy"] - apart.phases["policy"] == backbone
    assert whole.reward_model_device is None and apart.reward_model_device > backbone
    quantized = estimate(quantize_reward_model="8bit").parts["reward model backbone"]
    assert quantized == pytest.approx(2 * TABLE + LAYERS, rel=1e-3)


def test_a_saved_reward_model_names_its_backbone_and_widths(large, tmp_path):
    saved = {
        "backbone": large["policy"], "backbone_revision": None, "policy": "any", "policy_revision": None,
        "policy_width": D, "inner_width": 4096, "num_heads": 1, "floor": 0.6, "standardize": False,
        "rte_token": "checkpoint", "suffix": "", "max_length": 2048,
    }  # fmt: skip
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "r2m_config.json").write_text(json.dumps(saved))
    small = {"prompts_per_round": 2, "num_generations": 2, "micro_batch_size": 2, "r2m": {"inner_width": 2048}}
    new, old = (
        estimate_memory(config_from_dict(large | small | {"reward_model": name})).parts
        for name in (large["reward_model"], str(folder))
    )
    assert old["reward model backbone"] == new["reward model backbone"]
    assert old["R2M part"] == pytest.approx(2 * new["R2M part"], rel=0.01)  # twice the inner width


def test_a_model_without_attention_gets_a_figure(large, tmp_path):
    MambaConfig(vocab_size=500, hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path / "mamba")
    estimate = estimate_memory(config_from_dict(large | {"policy": str(tmp_path / "mamba")}))
    assert estimate.phases["policy"] > estimate.parts["reward model backbone"] + 5 * estimate.parts["policy weights"]


def test_what_is_missing_is_named(large):
    with pytest.raises(ValueError, match="reward_model is not set; expected it in the config file"):
        estimate_memory(config_from_dict({"policy": large["policy"]}))
    with pytest.raises(OSError, match="no/such/model"):
        estimate_memory(config_from_dict(large | {"policy": "no/such/model"}))


def test_vllm_has_its_own_weights_and_cache_throughout_and_nothing_is_generated_beside_it(llama):
    plain = estimate_memory(run_config(llama))
    config = run_config(llama)
    config.generation.engine = "vllm"
    estimate = estimate_memory(config)
    assert estimate.parts["vLLM weights"] == plain.parts["policy weights"]
    of_token = 4 * 2 * SIZES["num_hidden_layers"] * 2 * (128 // 4)  # float32 keys and values: layers, heads, width
    blocks = config.sequences_at_once + 1  # of 128 tokens: a sequence has at most 50
    assert estimate.parts["vLLM cache"] == blocks * 128 * of_token
    added = estimate.parts["vLLM weights"] + estimate.parts["vLLM cache"]
    assert estimate.phases["policy"] == plain.phases["policy"] + added
    assert estimate.phases["rollout"] < plain.phases["rollout"] + added
    config.generation.server = "http://localhost:8000"  # on GPUs of its own
    assert estimate_memory(config).phases["policy"] == plain.phases["policy"]


def test_shards_divide_what_lies_there_and_each_process_has_its_share_of_the_prompts(large):
    one = estimate_memory(config_from_dict(large))
    eight = estimate_memory(config_from_dict(large | {"placement": {"shard_policy": True}}), 8)
    for part in ("policy weights", "reference", "optimizer state", "gradients"):
        assert eight.parts[part] == pytest.approx(one.parts[part] / 8, rel=1e-6)
    assert eight.parts["generation cache"] == one.parts["generation cache"] / 8 / 2  # of bfloat16 weights
    assert eight.parts["reward model backbone"] == one.parts["reward model backbone"]  # each has it whole
    assert eight.phases["start"] < one.phases["start"]


def test_copies_keep_averaged_gradients_beside_those_of_several_passes(large):
    config = config_from_dict(large)
    one, two = estimate_memory(config), estimate_memory(config, 2)
    assert two.parts["gradients, averaged"] == one.parts["gradients"]
    assert two.parts["policy weights"] == one.parts["policy weights"]
    assert two.phases["policy"] > one.phases["policy"]


def test_a_round_that_cannot_be_dealt_is_refused(large):
    with pytest.raises(ValueError, match="prompts_per_round is 64 on 5 processes"):
        estimate_memory(config_from_dict(large), 5)


def test_evaluating_a_run_takes_no_gradients_and_no_optimizer_state(large):
    estimate = estimate_memory(config_from_dict(large))
    small = estimate.parts["R2M part"] - estimate.terms["r2m evaluate"]["R2M part"]
    saved = estimate.phases["evaluation"] - estimate.phases["r2m evaluate"]
    assert saved == estimate.parts["optimizer state"] + small
    assert "optimizer state" not in estimate.terms["r2m evaluate"]


def test_an_engine_of_each_of_several_processes_caches_what_that_one_samples(llama, monkeypatch):
    config = run_config(llama)
    config.generation.engine = "vllm"
    estimated = estimate_memory(config, 2).parts["vLLM cache"]
    monkeypatch.setattr(processes, "number", lambda: 2)
    assert cache_bytes(LlamaConfig(**SHAPE, **SIZES), config) == estimated
