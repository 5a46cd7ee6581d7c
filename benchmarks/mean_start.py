"""Does the mean start rank the policy's own responses better than the reward token embedding alone?

    python benchmarks/mean_start.py --states runs/mean-start.pt

SmolLM2-135M samples 12 responses to each of 96 openings of movie reviews; a classifier over words, which no model
here sees, says which of two to the same prompt is better. In every split of the prompts the reward model is fitted on
pairs of a half of them and stopped on pairs of an eighth; accuracy is that on all pairs of the rest. Splits share their
prompts, so the intervals (95 %, t) say how splits differ and not how prompts do. The states are computed once, in some
fifteen minutes of a core, and kept in the file; a split then takes seconds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM

from r2m.demo.movie_reviews import SUFFIX, fit_judge, load_splits
from r2m.fitting.bradley_terry import batch_margins, bradley_terry, fused_margins, minimize, pair_accuracy
from r2m.fitting.mean_start import mean_start
from r2m.fitting.pairs import Feedback
from r2m.fitting.recipe import TOLERANCE, fit_head
from r2m.method.reward_model import R2MRewardModel
from r2m.models import smollm2
from r2m.policy.generate import Sampling, generate
from r2m.policy.load import load_tokenizer

PROMPTS, RESPONSES, NEW_TOKENS = 96, 12, 24
PAIRS, HELD_OUT_PAIRS, SPLITS = (64, 256), 64, 16


class States(NamedTuple):
    """Of the responses, prompt-major: B = 96 * 12."""

    rte: Tensor  # [B, D]
    hidden: Tensor  # packed [total, D]: of prompt and response, all but the last token
    lens: Tensor  # [B]
    gold: Tensor  # [B] logits of the classifier

    def batch(self, better: Tensor, worse: Tensor) -> Feedback:
        rows = torch.cat([better, worse])
        start = F.pad(self.lens.cumsum(0), (1, 0))
        hidden = torch.cat([self.hidden[start[row] : start[row + 1]] for row in rows])
        return Feedback(self.rte[rows], hidden, F.pad(self.lens[rows].cumsum(0), (1, 0)).int(), len(better))

    def ordered(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        swap = self.gold[one] < self.gold[other]
        return torch.where(swap, other, one), torch.where(swap, one, other)


@torch.no_grad()
def compute_states() -> States:
    """One pass over prompt, response and suffix gives hidden states and RTE: policy and backbone are one model."""
    tokenizer = load_tokenizer(str(smollm2()))
    policy: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    splits = load_splits(tokenizer, seed=0, num_pairs=64, new_tokens=NEW_TOKENS)
    prompt_ids = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in splits.prompts[:PROMPTS]]
    suffix = tokenizer(SUFFIX, add_special_tokens=False).input_ids
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    settings = Sampling(temperature=0.7, max_new_tokens=NEW_TOKENS, eos_ids=[end], stop_strings=[], seed=0)
    responses = generate(policy, tokenizer, prompt_ids, RESPONSES, settings, batch_size=192)
    rte, hidden, texts = list[Tensor](), list[Tensor](), list[str]()
    for row, response in enumerate(responses):
        ids = prompt_ids[row // RESPONSES] + (response[: response.index(end)] if end in response else response)
        states = policy.model(input_ids=torch.tensor([ids + suffix]), use_cache=False).last_hidden_state[0]
        rte.append(states[-1].clone())
        hidden.append(states[: len(ids) - 1].clone())
        texts.append(tokenizer.decode(ids))
    gold = torch.tensor(fit_judge(splits.judge_train)(texts), dtype=torch.float32)
    return States(torch.stack(rte), torch.cat(hidden), torch.tensor([len(rows) for rows in hidden]), gold)


def pairs_of(states: States, prompts: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(better, worse) rows of `count` pairs, each of two responses to one prompt; no response is in two pairs."""
    rows = torch.stack([p * RESPONSES + torch.randperm(RESPONSES, generator=draw) for p in prompts])
    one, other = rows[:, 0::2].flatten(), rows[:, 1::2].flatten()
    taken = torch.randperm(len(one), generator=draw)[:count]
    return states.ordered(one[taken], other[taken])


def split(states: States, model: R2MRewardModel, count: int, seed: int) -> dict[str, float]:
    """Accuracy on the test pairs by what the reward is read of."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(PROMPTS, generator=draw)
    training = states.batch(*pairs_of(states, order[: PROMPTS // 2], count, draw))
    held_out = states.batch(*pairs_of(states, order[PROMPTS // 2 : PROMPTS * 5 // 8], HELD_OUT_PAIRS, draw))
    first, second = torch.triu_indices(RESPONSES, RESPONSES, 1)
    tested = order[PROMPTS * 5 // 8 :, None] * RESPONSES
    test = states.batch(*states.ordered((tested + first).flatten(), (tested + second).flatten()))

    def accuracy() -> float:
        return (fused_margins(model, [test]) > 0).float().mean().item()

    def train() -> float:
        """The held-out loss at the step that is kept."""
        minimize(
            "cross-attention",
            list(model.attention.parameters()),
            lambda batch: bradley_terry(batch_margins(model, batch)),
            [training],
            lambda: bradley_terry(fused_margins(model, [held_out])),
            1e-4,
            None,
            TOLERANCE,
        )
        return bradley_terry(fused_margins(model, [held_out])).item()

    torch.manual_seed(seed)
    model.attention.reset_parameters()
    model.rte_scale.fill_(1)
    model.rte_mean.zero_()
    model.set_statistics(training.rte, training.hidden.mean(0), training.hidden.std(0))
    fit_head(model, training.rte, held_out.rte)
    found = {"RTE alone": pair_accuracy(model.vanilla_score(test.rte)), "as drawn": accuracy()}
    drawn = {name: value.clone() for name, value in model.attention.state_dict().items()}
    loss_from_drawn, found["as drawn, trained"] = train(), accuracy()
    model.attention.load_state_dict(drawn)
    mean_start(model, [training])
    found["mean start"] = accuracy()
    loss_from_mean, found["mean start, trained"] = train(), accuracy()
    kept = "mean start" if loss_from_mean < loss_from_drawn else "as drawn"
    return found | {"kept": found[f"{kept}, trained"], "mean start kept": float(kept == "mean start")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=Path, required=True, help="where the responses' states are kept")
    file = parser.parse_args().states
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(compute_states()._asdict(), file)
    states = States(**torch.load(file))
    name = str(smollm2())
    model = R2MRewardModel.from_pretrained(
        name, policy=name, dtype=torch.float32, inner_width=256, standardize=True, rte_token="last", suffix=SUFFIX
    )
    for count in PAIRS:
        found = defaultdict[str, list[float]](list)
        for seed in range(SPLITS):
            try:
                measures = split(states, model, count, seed)
            except ValueError as error:  # a head that learns nothing is refused
                print(f"{count} pairs, split {seed} is left out: {error}", flush=True)
                continue
            for reader, value in measures.items():
                found[reader].append(value)
        number, kept = len(found["RTE alone"]), sum(found.pop("mean start kept"))
        print(f"{count} pairs, mean of {number} splits, {kept:.0f} keep the mean start; less the RTE alone, in points")
        for reader, values in found.items():
            change = 100 * (torch.tensor(values) - torch.tensor(found["RTE alone"]))
            half = stats.t.ppf(0.975, number - 1) * change.std().item() / number**0.5
            print(f"{reader:20s} {sum(values) / number:.3f}  {change.mean():+.1f} +- {half:.1f}", flush=True)


if __name__ == "__main__":
    main()
