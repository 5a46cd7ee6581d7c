"""Policies on a shared trunk sample and compute what they do alone, on a tiny model."""

import copy

import pytest
import torch

from r2m.demo.model import Trunk, sample_together, share
from r2m.demo.model import drawn as drawn_one
from r2m.policy.generate import Sampling
from tests.r2m import tiny

SETTINGS = Sampling(0.7, 9, list(range(2, 40)), [], 5)  # an eighth of what is sampled ends a response
PROMPTS = ["one", "another one"]


@pytest.fixture
def shared():
    """Three policies of four layers, whose upper two differ, on one trunk; and the same without."""
    plain = [tiny.policy(num_hidden_layers=4) for _ in range(3)]
    for seed, policy in enumerate(plain):
        torch.manual_seed(seed)
        for parameter in policy.model.layers[2:].parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    policies = copy.deepcopy(plain)
    trunk = Trunk(policies[0].model.layers[:2])
    for policy in policies:
        share(trunk, policy.model)
    return trunk, policies, plain


def padded(rows):
    width = max(map(len, rows))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {
        "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "use_cache": False,
    }  # fmt: skip


@pytest.fixture
def sampled(shared):
    """The ids of the prompts, of three responses to each by each policy, and of the suffix behind them."""
    trunk, policies, _ = shared
    tokenizer = tiny.tokenizer(pad="</s>")
    prompt_ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    drawn = sample_together(policies, trunk, tokenizer, prompt_ids, 3, SETTINGS, " end")
    return prompt_ids, drawn, tokenizer(" end").input_ids


@torch.no_grad()
def test_policies_sample_what_each_says(shared, sampled):
    (_, _, plain), (prompt_ids, drawn, _) = shared, sampled
    assert len({str(responses) for responses in drawn}) == 3 and [len(responses) for responses in drawn] == [6] * 3
    lengths = {len(row) for responses in drawn for row in responses}
    assert max(lengths) == 9 and len(lengths) > 2
    # The same again from the whole model, a token at a time.
    for twin, responses in zip(plain, drawn, strict=True):
        draws = torch.Generator().manual_seed(SETTINGS.seed)
        rows = [list(ids) for ids in prompt_ids for _ in range(3)]
        for step in range(9):
            chances = (twin(**padded(rows)).logits[:, -1] / SETTINGS.temperature).softmax(-1)
            tokens = drawn_one(chances, torch.rand(6, 1, generator=draws))[:, 0].tolist()
            for row, response, token in zip(rows, responses, tokens, strict=True):
                if step < len(response):
                    assert response[step] == token
                    row.append(token)
    assert all(set(row[:-1]).isdisjoint(SETTINGS.eos_ids) for responses in drawn for row in responses)


@torch.no_grad()
def test_what_is_looked_up_is_what_is_computed(shared, sampled):
    (trunk, policies, plain), (prompt_ids, drawn, behind) = shared, sampled
    for suffix in ([], behind):
        for policy, twin, responses in zip(policies, plain, drawn, strict=True):
            rows = [prompt_ids[i // 3] + response + suffix for i, response in enumerate(responses)]
            inputs, ran = padded([*rows, [50, 60, 70]]), []  # nobody sampled the last one
            hook = trunk.layers[0].register_forward_pre_hook(lambda _, args, ran=ran: ran.append(len(args[0])))
            found, expected = policy(**inputs).logits, twin(**inputs).logits
            hook.remove()
            assert ran == [1]
            m_token = inputs["attention_mask"].bool()
            torch.testing.assert_close(found[m_token], expected[m_token], atol=1e-4, rtol=1e-4)


def test_draws_are_by_inversion():
    chances = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25]).expand(5, -1)
    uniform = torch.tensor([[0.0], [0.2], [0.25], [0.74], [0.999]])
    assert drawn_one(chances, uniform)[:, 0].tolist() == [1, 1, 3, 3, 4]
