"""A small run as files: config, tiny models, prompts, pairs and a judge."""

import json

import tiny
import yaml

PROMPTS = ["hello ", "what is it? ", "a b", [{"role": "user", "content": "hi"}]]
HELD_OUT = ["who ", "why? ", "x"]
PAIRS = [("hello ", "there", "no"), ("a", "bc", "yes, why?"), ("q ", "x", "y"), ("z ", "long " * 500, "y")]
K = 3


def judge(prompts, responses):
    return [sum(response.encode()) % 97 for response in responses]


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_config(folder, reward_checkpoint, width=32):
    """A run of 3 rounds with held-out prompts, pairs and a judge; all checkpoints are kept."""
    tiny.policy(width, num_hidden_layers=1).save_pretrained(folder / "policy")
    tiny.tokenizer().save_pretrained(folder / "policy")
    pairs = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    values = {
        "policy": str(folder / "policy"),
        "reward_model": str(reward_checkpoint),
        "prompts": write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS]),
        "output_dir": str(folder / "out"),
        "rounds": 3, "prompts_per_round": 2, "num_generations": K, "micro_batch_size": K, "precision": "float32",
        "learning_rate": 1e-2,
        "generation": {"max_new_tokens": 5, "eos_token_ids": list(range(1, 50))},
        "r2m": {"learning_rate": 1e-3, "inner_width": 16},
        "evaluation": {
            "every": 1,
            "prompts": write_jsonl(folder / "held-out.jsonl", [{"prompt": prompt} for prompt in HELD_OUT]),
            "pairs": write_jsonl(folder / "pairs.jsonl", pairs),
            "judge": f"{__file__}:judge",
        },
        "checkpoints": {"every": 1, "keep": 9},
        "placement": {"device": "cpu"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"
