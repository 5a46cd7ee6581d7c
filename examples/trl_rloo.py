"""R2M in TRL's RLOOTrainer: the five lines marked R2M are all there is to add. Needs `pip install 'r2m-kernels[trl]'`.

Without arguments it makes tiny random models and toy prompts, which shows that everything runs, not that it learns:

    python examples/trl_rloo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback-prompt \
        --reward-model Skywork/Skywork-Reward-V2-Qwen3-0.6B --tokens 256 --steps 800 --output runs/trl
"""

import argparse
import tempfile

import torch
import transformers
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from r2m import R2MRewardModel  # R2M
from r2m.integrations.trl import r2m_reward  # R2M


def train(model: str, reward_name: str, prompts: Dataset, output: str, options: argparse.Namespace) -> None:
    args = RLOOConfig(
        output_dir=output,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,  # a rollout: 4 prompts, 8 completions of each
        num_generations=8,
        num_iterations=2,  # passes of the policy over a rollout; the last one refreshes the feedback
        max_completion_length=options.tokens,
        max_steps=options.steps,
        beta=0.0,
        logging_steps=2,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reward_model = R2MRewardModel.from_pretrained(reward_name, policy=policy)  # R2M
    reward, callback = r2m_reward(reward_model, num_generations=8)  # R2M; settings=r2m.config.R2M(...) for the rest
    trainer = RLOOTrainer(
        model=policy,
        args=args,
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        reward_funcs=reward,  # R2M, and the callback
        callbacks=[callback],
    )
    trainer.train()
    reward_model.save_pretrained(f"{output}/reward_model")


def make_tiny_models(folder: str) -> tuple[str, str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<pad>", "</s>", *alphabet])}, merges=[]))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", pad_token="<pad>")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(num_labels=1, **ids, **size)
    for name in ("LlamaForCausalLM", "LlamaForSequenceClassification"):
        getattr(transformers, name)(config).save_pretrained(f"{folder}/{name}")
        tokenizer.save_pretrained(f"{folder}/{name}")
    return f"{folder}/LlamaForCausalLM", f"{folder}/LlamaForSequenceClassification"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the policy: hub id or path")
    parser.add_argument("--reward-model", help="a sequence-classification checkpoint, or a saved R2M reward model")
    parser.add_argument("--dataset", help="of the hub, with a column prompt")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of a completion, at most")
    parser.add_argument("--output", help="folder for checkpoints and the reward model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        names = (options.model, options.reward_model) if options.model else make_tiny_models(scratch)
        toy = Dataset.from_dict({"prompt": [f"Count to {i}." for i in range(32)]})
        prompts = load_dataset(options.dataset, split="train") if options.dataset else toy
        train(*names, prompts, options.output or f"{scratch}/output", options)
