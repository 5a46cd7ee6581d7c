"""The memory estimate against what real tensors of a real run take, phase by phase."""

import itertools
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from r2m.commands.build import build_trainer
from r2m.commands.memory import MemoryTracker, estimate_memory
from r2m.config import config_from_dict

PROMPT, RESPONSE = 30, 20  # tokens
WORDS = 2000


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A policy, a reward model of another shape and prompts; weights, activations and logits all weigh something."""
    folder = tmp_path_factory.mktemp("memory")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1", unk_token="w0")
    shape = {"vocab_size": WORDS, "num_key_value_heads": 2, "num_attention_heads": 4, "pad_token_id": None}
    policy = LlamaConfig(**shape, hidden_size=128, intermediate_size=384, num_hidden_layers=2)
    reward = LlamaConfig(**shape, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_labels=1)
    for name, model in (("policy", LlamaForCausalLM(policy)), ("reward", LlamaForSequenceClassification(reward))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = [" ".join(["w7"] * (PROMPT - i)) for i in range(4)]  # of several lengths: masks are needed
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return folder


def run_config(folder, **settings):
    defaults = {
        "policy": str(folder / "policy"),
        "reward_model": str(folder / "reward"),
        "prompts": str(folder / "prompts.txt"),
        "output_dir": str(folder / "out"),
        "prompts_per_round": 4,
        "num_generations": 4,
        "micro_batch_size": 4,
        "learning_rate": 1e-4,
        "r2m": {"inner_width": 64},
        "generation": {"max_prompt_tokens": PROMPT, "max_new_tokens": RESPONSE, "eos_token_ids": [WORDS]},
    }
    return config_from_dict(defaults | settings)


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


def peaks_of_round(trainer, tracker, t):
    peaks, row = {}, {}
    rollout, peaks["rollout"] = tracker.peak_of(lambda: trainer.sample(t))
    batch, peaks["annotate"] = tracker.peak_of(lambda: trainer.annotate(rollout, t, row))
    _, peaks["policy"] = tracker.peak_of(lambda: trainer.optimize_policy(rollout, batch, t, row))
    _, peaks["reward_model"] = tracker.peak_of(lambda: trainer.align_reward_model(batch, t, row))
    return peaks, rollout, batch


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "float32"},
        {"precision": "bf16"},
        {"precision": "bf16", "lora": {"rank": 4}},
        {"precision": "bf16", "gradient_checkpointing": True},
        {"precision": "float32", "micro_batch_size": 2},
        {"precision": "bf16", "minibatches": 2, "micro_batch_size": 3, "epochs": 1, "kl": {"placement": "reward"}},
        {"precision": "float32", "algorithm": "remax", "micro_batch_size": 3},
        {
            "precision": "bf16",
            "algorithm": "reinforce++",
            "kl": {"placement": "reward"},
            "num_generations": 1,
            "prompts_per_round": 16,
            "r2m": {"feedback": "frozen", "inner_width": 64},
        },
        {"precision": "bf16", "r2m": {"feedback": "head", "inner_width": 64}},
        {"precision": "float32", "r2m": {"source": "noise", "inner_width": 64}},
        {"precision": "float32", "r2m": {"source": "reference", "inner_width": 64}},
    ],
    ids=str,
)
def test_the_peak_of_every_phase_is_that_of_a_real_run(checkpoints, settings):
    config = run_config(checkpoints, **settings)
    assert estimate_memory(config).phases == pytest.approx(measured_peaks(config), rel=0.15)


def test_batches_of_generation_bound_the_cache(checkpoints):
    """Half of the sequences at once, half of the cache, and the peak of a real run."""
    config = run_config(checkpoints)
    whole = estimate_memory(config)
    config.generation.batch_size = 8
    half = estimate_memory(config)
    assert half.parts["generation cache"] == whole.parts["generation cache"] / 2
    assert half.phases["rollout"] == pytest.approx(measured_peaks(config)["rollout"], rel=0.15)


@pytest.fixture
def large(tmp_path):
    """Configs of models of 8B-parameter width, two layers deep; no weights and no tokenizer."""
    shape = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2}
    llama = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"])
    llama.save_pretrained(tmp_path)
    return {"policy": str(tmp_path), "reward_model": str(tmp_path)}


# Weights of `large`: two layers, embedding, head (of the policy alone) and norms.
LAYERS = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 5 * 4096
TABLE = 128256 * 4096


def test_a_config_alone_is_enough(large):
    """The paper's batch; sizes that can be counted by hand."""
    parts = estimate_memory(config_from_dict(large | {"placement": {"device": "cuda"}})).parts
    weights = 4 * (LAYERS + 2 * TABLE)
    for part in ("policy weights", "reference", "gradients"):
        assert parts[part] == pytest.approx(weights, rel=1e-3)
    assert parts["optimizer state"] == pytest.approx(2 * weights, rel=1e-3)
    assert parts["reward model backbone"] == pytest.approx(2 * (LAYERS + TABLE), rel=1e-3)
    assert parts["logits"] == 8 * 513 * 128256 * 2
    tokens = 512 * 1023  # of 64 x 8 sequences; the last one sampled is never read
    # Layers, tokens, keys and values, width, bytes: rotation makes float32 of keys where the weights are float32, and
    # the cache takes their type for the values too.
    assert parts["generation cache"] == 2 * tokens * 2 * 1024 * 4


def test_placement_takes_models_off_the_policy_s_device(large):
    def estimate(**placement):
        few = {"prompts_per_round": 4, "num_generations": 4}
        return estimate_memory(config_from_dict(large | few | {"placement": {"device": "cuda"} | placement}))

    whole, off, apart = (
        estimate(),
        estimate(offload_reference=True, offload_reward_model=True),
        estimate(reward_model="cpu"),
    )
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
        "policy_width": 4096, "inner_width": 4096, "num_heads": 1, "floor": 0.6, "standardize": False,
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


@pytest.mark.parametrize("config", [GPTNeoXConfig, Qwen2Config, Gemma2Config, OPTConfig])
def test_other_architectures_are_simulated_too(large, tmp_path, config):
    sizes = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config(**sizes, num_key_value_heads=2, word_embed_proj_dim=64).save_pretrained(tmp_path / "other")
    small = {"prompts_per_round": 2, "num_generations": 2, "micro_batch_size": 2, "policy": str(tmp_path / "other")}
    estimate = estimate_memory(config_from_dict(large | small))
    assert min(estimate.parts.values()) > 0
    assert estimate.phases["policy"] > estimate.parts["reward model backbone"] + 4 * estimate.parts["policy weights"]


def test_what_is_missing_is_named(large):
    with pytest.raises(ValueError, match="reward_model is not set; expected it in the config file"):
        estimate_memory(config_from_dict({"policy": large["policy"]}))
    with pytest.raises(OSError, match="no/such/model"):
        estimate_memory(config_from_dict(large | {"policy": "no/such/model"}))
