"""A generator of one's own in the trainer: whatever takes weights over and returns tokens.

    python examples/own_generator.py

`Plain` samples by forward passes without a cache, the slowest way there is. Because it says what probability each token
had, the trainer corrects for the difference between its values and the policy's. `generation/importance_ratio` is the
mean of that correction: 1 where there is none.
"""

import tempfile
from pathlib import Path

import torch
from own_rloo import save_tiny_models

from r2m import R2MConfig, R2MRewardModel, R2MTrainer, load_policy, load_tokenizer
from r2m.policy.generate import Sampling


class Plain:
    def update(self, policy: torch.nn.Module) -> None:
        self.policy = policy  # an engine elsewhere would copy the weights

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]], num_generations: int, settings: Sampling):
        random, rows, log_probs = torch.Generator().manual_seed(settings.seed), [], []
        for prompt in [ids for ids in prompt_ids for _ in range(num_generations)]:
            row, sampled = [], []
            while len(row) < settings.max_new_tokens and not set(row) & set(settings.eos_ids):
                logits = self.policy(torch.tensor([prompt + row])).logits[0, -1]
                log_p = (logits / settings.temperature).log_softmax(-1)
                token = log_p.argmax() if settings.greedy else torch.multinomial(log_p.exp(), 1, generator=random)
                row.append(int(token))
                sampled.append(float(log_p[token]))
            rows.append(row)
            log_probs.append(sampled)
        return rows, log_probs  # or None for log_probs, if they are not known


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_models(folder)
        config = R2MConfig(
            policy=str(folder / "policy"), output_dir=str(folder / "run"), rounds=4, prompts_per_round=2,
            num_generations=4, algorithm="remax", learning_rate=1e-3, precision="float32",
            generation={"max_new_tokens": 8}, checkpoints={"every": 0}, evaluation={"samples_every": 0},
        )  # fmt: skip
        policy, tokenizer = load_policy(config), load_tokenizer(config.policy)
        reward_model = R2MRewardModel.from_pretrained(folder / "reward_model", policy=policy, inner_width=32)
        trainer = R2MTrainer(policy, reward_model, tokenizer, ["w1 w2", "w3", "w5 w8"], config, generator=Plain())
        for row in trainer.train():
            print(
                f"round {row['round']}: reward {row['reward/mean']:.3f}, "
                f"importance ratio {row['generation/importance_ratio']:.6f}"
            )


if __name__ == "__main__":
    main()
