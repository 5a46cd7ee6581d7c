"""A generator of one's own: what it is asked, when it gets the weights, and what becomes of what it returns."""

import copy
import math
import os
import re
import signal

import pytest
import tiny
import torch
from test_trainer import make, poison, with_adapter, without_costs  # noqa: F401  `make` is a fixture

from r2m.config import Generation
from r2m.policy.generate import GeneratorFailed, generate
from r2m.policy.loss import token_log_probs
from r2m.policy.rollout import sample
from r2m.runs.folder import checkpoints
from r2m.runs.monitor import describe_samples


class Copy:
    """Samples as transformers does, from its own copy of the weights: with them the run has the bits of one without."""

    def __init__(self):
        self.updates, self.asked = 0, []

    def update(self, policy):
        self.updates, self.policy = self.updates + 1, copy.deepcopy(policy)

    def generate(self, prompt_ids, num_generations, settings):
        self.asked.append(settings)
        return generate(self.policy, tiny.tokenizer(pad="</s>"), prompt_ids, num_generations, settings), None


class Fixed:
    def __init__(self, rows, log_probs=None):
        self.returned = rows, log_probs

    def update(self, policy):
        pass

    def generate(self, prompt_ids, num_generations, settings):
        return self.returned


@pytest.mark.parametrize(
    ("algorithm", "policy"), [("rloo", lambda: None), ("remax", with_adapter)], ids=["rloo", "remax, adapter"]
)
def test_a_run_with_it_has_the_bits_of_one_with_transformers(make, algorithm, policy):  # noqa: F811
    settings = {"algorithm": algorithm, "learning_rate": 1e-2, "eval_prompts": ["why "]}
    settings["generation"] = {"stop_strings": ["q"]}
    own, theirs = make(policy=policy(), generator=Copy(), **settings), make(policy=policy(), **settings)
    assert without_costs(own.train()) == without_costs(theirs.train())


def test_it_gets_the_weights_once_for_each_state_of_them(make):  # noqa: F811
    generator = Copy()
    trainer = make(generator=generator, eval_prompts=["why "], evaluation={"every": 1}, epochs=1)
    trainer.evaluate(["a"])
    trainer.sample(1)
    assert generator.updates == 1
    trainer.train()  # two rounds of one step each
    assert generator.updates == 3
    trainer.evaluate_held_out()
    assert generator.updates == 3


def test_a_resumed_run_hands_over_what_it_has_loaded(make):  # noqa: F811
    generator = Copy()
    make(folder="run", checkpoints={"every": 1}).train()
    trainer = make(folder="run", checkpoints={"every": 1}, generator=generator)
    trainer.sample(1)  # before the checkpoint is loaded
    trainer.train(trainer.run.folder / "checkpoint-1")
    assert generator.updates == 2  # round 2 has the weights that the check before it had


def test_it_is_told_how_to_sample(make):  # noqa: F811
    settings = {"temperature": 0.5, "max_new_tokens": 4, "eos_token_ids": [1, 2], "stop_strings": ["x", "yz"]}
    generators = Copy(), Copy()
    for generator in generators:
        trainer = make(generator=generator, algorithm="remax", generation=settings)
        trainer.train()
    seen = generators[0].asked[1:]  # the first was the check before the run
    assert {(s.temperature, s.max_new_tokens, tuple(s.eos_ids), tuple(s.stop_strings)) for s in seen} == {
        (0.5, 4, (1, 2), ("x", "yz"))
    }
    assert [s.greedy for s in seen] == [False, True] * 2
    seeds = [s.seed for s in seen if not s.greedy]
    assert seeds == [s.seed for s in generators[1].asked[1:] if not s.greedy] and len(set(seeds)) == 2


def test_what_it_has_behind_the_end_of_a_response_is_cut(policy, tokenizer):
    log_probs = [[-1.0, -2.0, -3.0], [-4.0, -5.0], [-6.0, -7.0, -8.0, -9.0]]
    rows = [[70, 1, 71], [70, 71], [*tokenizer.encode("axb"), 1]]
    generator = Fixed(rows, log_probs)
    r = sample(policy, tokenizer, ["a"], 3, Generation(stop_strings=["x"]), generator=generator)
    assert r.completion_mask.sum(-1).tolist() == [2, 2, 2]
    assert r.finished.tolist() == [True, False, True]
    assert r.sampled_log_probs.tolist() == [[-1.0, -2.0], [-4.0, -5.0], [-6.0, -7.0]]


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        ([[-1.0], [-1.0]], "log-probabilities of other lengths than its responses; expected one a token"),
        ([[-1.0, float("nan")], [-1.0]], "a log-probability that is not finite"),
    ],
)
def test_log_probs_that_are_none_are_named(policy, tokenizer, log_probs, message):
    with pytest.raises(ValueError, match=f"generator returned {message}"):
        sample(policy, tokenizer, ["a"], 2, Generation(), generator=Fixed([[70, 71], [70]], log_probs))


def test_what_is_no_generator_is_an_error(make):  # noqa: F811
    with pytest.raises(TypeError, match=r"generator is 'vllm'; expected `update` and `generate`, or a function"):
        make(generator="vllm")


class Scoring(Copy):
    """With log-probabilities of its own copy, which gets no weights after the first."""

    def update(self, policy):
        if not self.updates:
            super().update(policy)

    def generate(self, prompt_ids, num_generations, settings):
        rows, _ = super().generate(prompt_ids, num_generations, settings)
        log_probs = []
        for i, row in enumerate(rows):
            prompt = prompt_ids[i // num_generations]
            logits = self.policy(torch.tensor([prompt + row])).logits[:, len(prompt) - 1 : -1]
            log_probs.append(token_log_probs(logits, torch.tensor([row]), settings.temperature)[0].tolist())
        return rows, log_probs


def test_one_with_other_weights_is_found_before_the_run(make):  # noqa: F811
    right, wrong = make(generator=Scoring()), make(generator=Scoring())
    right.train()
    wrong.sample(1)
    with torch.no_grad():
        for p in wrong.policy.parameters():
            p += 0.1 * torch.randn_like(p)
    with pytest.raises(ValueError, match=r"gives the same tokens other values, by up to: in generation \(nats\)"):
        wrong.train()


@pytest.mark.parametrize(("factor", "weight"), [(0.5, 0.5), (1.5, 1.5), (3.0, 2.0)])
def test_a_token_counts_by_what_the_policy_makes_of_it_up_to_the_cap(make, factor, weight):  # noqa: F811
    """factor: the policy's probability over the engine's."""
    trainer, gradients, row = make(kl={"beta": 0.0}, generation={"importance_cap": 2.0}), [], {}
    rollout = trainer.sample(1)
    batch = tiny.apart(trainer).annotate(rollout, 1, {})
    for sampled in (None, batch.log_probs - math.log(factor)):
        rollout.sampled_log_probs = sampled
        row |= describe_samples(rollout, batch, trainer.config)
        part = rollout.part(list(range(len(rollout.prompts))))
        log_probs = trainer.learner.log_probs(trainer.learner.logits(part), part)
        trainer.learner.backward(log_probs, rollout, batch, part.rows)
        gradients.append([p.grad for p in trainer.learner.parameters])
        trainer.learner.optimizer.zero_grad()
    for plain, weighted in zip(*gradients, strict=True):
        torch.testing.assert_close(weighted, weight * plain, rtol=1e-4, atol=1e-6)
    assert row["generation/importance_ratio"] == pytest.approx(factor, rel=1e-5)
    assert row["generation/truncated_share"] == float(factor > 2)


def test_only_a_generator_that_gives_log_probs_has_their_metrics(make):  # noqa: F811
    with_them, without = make(generator=Scoring(), rounds=1).train()[0], make(generator=Copy(), rounds=1).train()[0]
    assert with_them.pop("generation/importance_ratio") == pytest.approx(1, abs=1e-4)
    assert with_them.pop("generation/truncated_share") == 0
    assert with_them.keys() == without.keys()


class Failing(Copy):
    def __init__(self, calls, how):
        super().__init__()
        self.calls, self.how = calls, how

    def generate(self, *args):
        if len(self.asked) == self.calls:
            self.how()
        return super().generate(*args)


def break_down():
    raise RuntimeError("the engine is gone")


def test_one_that_fails_ends_the_run_which_goes_on(make, tmp_path):  # noqa: F811
    settings = {"checkpoints": {"every": 1}, "learning_rate": 1e-2}
    expected = make(**settings).train()
    failing = make(folder="run", generator=Failing(2, break_down), **settings)
    message = "round 2: generator Failing: RuntimeError: the engine is gone; the last checkpoint is "
    with pytest.raises(GeneratorFailed, match=f"{message}{re.escape(str(tmp_path / 'run'))}/checkpoint-1; to go on"):
        failing.train()
    resumed = make(folder="run", generator=Copy(), **settings).train("last")
    assert without_costs(resumed) == without_costs(expected)


def test_sigterm_while_it_generates_saves_the_round_before(make):  # noqa: F811
    trainer = make(generator=Failing(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit):
        trainer.train()
    assert list(checkpoints(trainer.run.folder)) == [1]
