"""Seconds of a round against FLOPs and bytes counted by hand."""

import pytest
from transformers import LlamaConfig

from r2m.commands.seconds import BYTES_USED, FLOPS_USED, GPUS, LAUNCHES, Work, estimate_seconds
from r2m.config import config_from_dict

# Widths of Llama-3-8B, two layers.
D, K, M, V, LAYERS = 4096, 1024, 14336, 128256, 2
WEIGHTS = LAYERS * (2 * D * D + 2 * D * K + 3 * D * M)  # that multiply every token; norms are a few more
SEQUENCES, LENGTH, NEW = 64 * 8, 1024, 512
H100 = GPUS["h100"]


@pytest.fixture
def large(tmp_path):
    shape = {"vocab_size": V, "hidden_size": D, "intermediate_size": M, "num_hidden_layers": LAYERS}
    LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8).save_pretrained(tmp_path)
    placement = {"device": "cuda"}
    return {"policy": str(tmp_path), "reward_model": str(tmp_path), "precision": "bf16", "placement": placement}


def seconds(config, number=1, **changes):
    return estimate_seconds(config_from_dict(config | changes), H100, number)


def test_a_part_takes_as_long_as_the_slowest_of_what_it_does():
    assert Work(flops=989e12 * FLOPS_USED).seconds(H100) == pytest.approx(1)
    assert Work(flops=989e12 * FLOPS_USED, reads=2 * 3.35e12 * BYTES_USED).seconds(H100) == pytest.approx(2)
    assert Work(launches=3, sent=450e9 * BYTES_USED).seconds(H100) == 3


def test_training_is_three_forward_passes_and_checkpointing_one_more(large):
    attention = LAYERS * D * SEQUENCES * LENGTH**2  # half of it: causal
    rows = SEQUENCES * (NEW + 1) * V * D
    forward = 2 * (WEIGHTS * SEQUENCES * LENGTH + attention + rows)
    step = 28 * (WEIGHTS + 2 * V * D) / 3.35e12 / BYTES_USED
    expected = 3 * forward / 989e12 / FLOPS_USED + step  # the second epoch; the first is in `annotate`
    assert seconds(large).phases["policy"] == pytest.approx(expected, rel=1e-3)
    again = seconds(large, gradient_checkpointing=True).phases["policy"]
    assert again - step == pytest.approx(4 / 3 * (expected - step), rel=1e-3)


def test_a_token_reads_all_weights_keys_and_values_and_transformers_launches_every_operation(large):
    vllm = seconds(large, generation={"engine": "vllm"}).phases["rollout"]
    cache = SEQUENCES * (LENGTH - NEW / 2) * 2 * K * LAYERS * 2  # on average, in bfloat16
    reading = NEW * (2 * (WEIGHTS + 2 * V * D) + cache) / 3.35e12 / BYTES_USED
    prompts = 2 * 64 * 512 * (WEIGHTS + LAYERS * D * 512) / 989e12 / FLOPS_USED
    assert vllm == pytest.approx(reading + prompts, rel=1e-3)
    one = seconds(large, generation={"batch_size": 8}, prompts_per_round=1).phases["rollout"]
    assert one >= NEW * LAYERS * LAUNCHES


def test_eight_gpus_share_the_round_and_send_what_is_sharded(large):
    one, eight = seconds(large), seconds(large, 8)
    assert eight.phases["annotate"] == pytest.approx(one.phases["annotate"] / 8, rel=0.3)  # but for the step
    sharded = {"device": "cuda", "shard_policy": True}
    many = seconds(large, 8, placement=sharded, micro_batch_size=1)  # 64 passes, which gather all weights
    assert many.phases["policy"] > 3 * eight.phases["policy"]


def test_r2m_is_two_reads_of_the_hidden_states_and_the_small_part(large):
    time = seconds(large)
    read = SEQUENCES * LENGTH * D * 4 / 3.35e12 / BYTES_USED
    assert 2 * read < time.r2m < 3 * read and time.r2m < 0.01 * time.round
    assert seconds(large, r2m={"feedback": "none"}).r2m == 0
