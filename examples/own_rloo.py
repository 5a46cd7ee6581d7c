"""R2M in an RLOO loop of one's own: plain transformers models, own sampling, own loss.

Of `r2m` it takes R2MRewardModel, R2MUpdater and HiddenStateTap. A round is one pass over the samples: the hidden states
of a group give its rewards and are pooled for the reward model's update, then its log-probabilities make the loss.
Models are tiny and random. The last rewards are compared with those of hidden states that were kept.
"""

import copy
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from r2m import HiddenStateTap, R2MRewardModel, R2MUpdater
from r2m.config import R2M

PROMPTS = ["w3 w1 w4", "w1 w5", "w9 w2 w6 w5", "w3"]
K, NEW_TOKENS, ROUNDS = 8, 12, 20  # responses to each prompt


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_models(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/policy", padding_side="left")
        policy = AutoModelForCausalLM.from_pretrained(f"{folder}/policy")  # in eval mode: no dropout
        reward_model = R2MRewardModel.from_pretrained(
            f"{folder}/reward_model", policy=policy, dtype=torch.float32, inner_width=32
        )
    initial_head = copy.deepcopy(reward_model.head)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    updater = R2MUpdater(reward_model, R2M(learning_rate=1e-3), total_steps=ROUNDS, num_generations=K)
    prompts = [prompt for prompt in PROMPTS for _ in range(K)]

    for t in range(1, ROUNDS + 1):
        ids, mask, width = sample(policy, tokenizer, prompts)
        rte = reward_model.embed(prompts, tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True))
        updater.begin_round(rte, t)
        feedback = mask & (mask.flip(1).cumsum(1).flip(1) > 1)  # attended: all but the last token of each sequence
        rewards = rloo_gradients(policy, updater, ids, mask, feedback, width)
        if t == ROUNDS:
            with torch.no_grad():
                hidden = run(policy, ids, mask, output_hidden_states=True).hidden_states[-1]
                expected = reward_model.score(rte, hidden, weight=updater.weight, mask=feedback)
            print(f"largest difference from rewards of hidden states kept: {(rewards - expected).abs().max():.1e}")
        optimizer.step()
        optimizer.zero_grad()
        metrics = updater.step(rewards)  # pairs, GREBT, one step of the reward model
        print(
            f"round {t:2}: w {updater.weight:.2f}, reward {rewards.mean():6.3f}, initial reward model's "
            f"{initial_head(rte).mean():6.3f}, GREBT {metrics['grebt/loss']:.3f}"
        )


def rloo_gradients(
    policy: PreTrainedModel, updater: R2MUpdater, ids: Tensor, mask: Tensor, feedback: Tensor, width: int
) -> Tensor:
    """The RLOO loss goes backward, a group at a time; returns the rewards [n * K]."""
    rewards = torch.empty(len(ids))
    for start in range(0, len(ids), K):
        rows = slice(start, start + K)

        def use(hidden: Tensor, _: Tensor | None, rows: slice = rows) -> None:
            rewards[rows] = updater.score(rows, hidden, feedback[rows])
            updater.collect(rows, hidden, feedback[rows])

        with HiddenStateTap(policy, use):
            logits = run(policy, ids[rows], mask[rows]).logits[:, width - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(-1, ids[rows, width:, None]).squeeze(-1)
        log_likelihood = (log_probs * mask[rows, width:]).sum(1)
        advantages = (rewards[rows] - rewards[rows].mean()) * K / (K - 1)  # the others' mean is the baseline
        (-(advantages * log_likelihood).sum() / len(ids)).backward()
    return rewards


def sample(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> tuple[Tensor, Tensor, int]:
    """Ids and mask [n * K, P + R] of left-padded prompts and their responses, and P."""
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    ids = policy.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS)
    width = inputs.input_ids.shape[1]
    ends = (ids[:, width:] == tokenizer.eos_token_id).int()
    until_end = ends.cumsum(1) - ends == 0  # the first end-of-sequence token included; padding may be that token, too
    return ids, torch.cat([inputs.attention_mask.bool(), until_end], 1), width


def run(policy: PreTrainedModel, ids: Tensor, mask: Tensor, **options: bool):
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    return policy(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False, **options)


def save_tiny_models(folder: Path) -> None:
    """A causal LM and a reward model (sequence classification) with a tokenizer, as from_pretrained finds them."""
    vocabulary = {"</s>": 0} | {f"w{i}": i for i in range(1, 64)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(vocabulary), **sizes, bos_token_id=None, eos_token_id=0, pad_token_id=0, num_labels=1,
        initializer_range=0.1,
    )  # fmt: skip
    for name, model in (("policy", LlamaForCausalLM), ("reward_model", LlamaForSequenceClassification)):
        model(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    main()
