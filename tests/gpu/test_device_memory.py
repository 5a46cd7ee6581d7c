"""The memory estimate of r2m against what PyTorch's allocator hands out on a device."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from r2m.commands.build import build_trainer
from r2m.commands.memory import estimate_memory
from r2m.config import config_from_dict

# Skipped here rather than by the fixture of this folder, which comes after the models below are made.
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPT, RESPONSE, WORDS = 200, 200, 32000


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1", unk_token="w0")
    shape = {"vocab_size": WORDS, "num_key_value_heads": 4, "num_attention_heads": 8, "pad_token_id": None}
    shape |= {"hidden_size": 1024, "intermediate_size": 3072}
    policy = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=8))
    reward = LlamaForSequenceClassification(LlamaConfig(**shape, num_hidden_layers=4, num_labels=1))
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = [" ".join(["w7"] * (PROMPT - i)) for i in range(8)]  # of several lengths: masks are needed
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "float32"},
        {"precision": "bf16"},
        {"precision": "bf16", "lora": {"rank": 16}},
        {"precision": "bf16", "gradient_checkpointing": True},
        {"precision": "bf16", "placement": {"offload_reference": True, "offload_reward_model": True}},
    ],
    ids=str,
)
def test_the_peak_of_every_phase_is_the_allocator_s(checkpoints, free_memory, settings):
    free_memory(24e9)
    torch.set_default_device(None)  # as in a run of `r2m train`
    paths = {"policy": "policy", "reward_model": "reward", "prompts": "prompts.txt", "output_dir": "out"}
    lengths = {"max_prompt_tokens": PROMPT, "max_new_tokens": RESPONSE, "eos_token_ids": [WORDS]}
    sizes = {"prompts_per_round": 8, "num_generations": 4, "micro_batch_size": 8, "generation": lengths}
    config = config_from_dict({key: str(checkpoints / name) for key, name in paths.items()} | sizes | settings)
    before = torch.cuda.memory_allocated()
    trainer = build_trainer(config)
    first_round = allocated_in_round(trainer, 1)  # what a round leaves lies there in the next one
    second_round = allocated_in_round(trainer, 2)
    peaks = {phase: peak - before for phase, peak in second_round[0].items()}
    del first_round, second_round
    assert estimate_memory(config).phases == pytest.approx(peaks, rel=0.15)


def allocated_in_round(trainer, t):
    def peak_of(phase, function):
        torch.cuda.reset_peak_memory_stats()
        result = function()
        peaks[phase] = torch.cuda.max_memory_allocated()
        return result

    peaks, row, first_epoch = {}, {}, trainer.scores_in_first_epoch
    rollout = peak_of("rollout", lambda: trainer.sample(t))
    batch = peak_of("annotate", lambda: trainer.annotate(rollout, t, row, first_epoch=first_epoch))
    peak_of("policy", lambda: trainer.optimize_policy(rollout, batch, t, row))
    peak_of("reward_model", lambda: trainer.align_reward_model(batch, t, row))
    return peaks, rollout, batch
