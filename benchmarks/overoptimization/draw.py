"""Samples of the start policy, into r2m/demo/start_samples.json.gz: what all reward models of the demo and of the
testbed are fitted on. They come with the package, so that every machine has the same.

python benchmarks/overoptimization/draw.py     # minutes; other machines and versions draw other samples
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from r2m.demo.model import small_smollm2
from r2m.demo.movie_reviews import load_reviews, load_splits
from r2m.demo.start import HELD_OUT, NEW_TOKENS, SAMPLED, SAMPLES, TEMPERATURE
from r2m.policy.generate import Sampling, generate, until_end
from r2m.policy.load import load_tokenizer


@torch.no_grad()
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model = small_smollm2(load_reviews())
    tokenizer = load_tokenizer(str(model))
    splits = load_splits(tokenizer, seed=0, new_tokens=NEW_TOKENS)
    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    settings = Sampling(TEMPERATURE, NEW_TOKENS, [tokenizer.eos_token_id], [], 0)
    texts = {"prompts": splits.prompts, "held_out_prompts": splits.eval_prompts[: HELD_OUT[0]]}
    for name, of, count in (("train", "prompts", SAMPLES), ("held_out", "held_out_prompts", HELD_OUT[1])):
        torch.manual_seed(0)
        ids = tokenizer(texts[of], add_special_tokens=False).input_ids
        rows = generate(policy, tokenizer, ids, count, settings, batch_size=96)
        texts[name] = [
            tokenizer.decode(until_end(tokenizer, row, settings.eos_ids, []), skip_special_tokens=True) for row in rows
        ]
    written = json.dumps(texts, ensure_ascii=False, indent=0).encode()
    (ROOT / "r2m" / "demo" / SAMPLED).write_bytes(gzip.compress(written, 9, mtime=0))


if __name__ == "__main__":
    main()
