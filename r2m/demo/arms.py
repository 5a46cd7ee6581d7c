"""Arms that differ in what becomes of the reward model, and that run together: the demo's three, and the parts that
`benchmarks/overoptimization` makes more of.

Arms of a seed share prompts, first weights, labelled pairs and the random numbers of sampling; and, to save two thirds
of the products, the layers that none of them trains (`r2m.demo.model`). Each has a trainer of its own, whose rounds are
those of `r2m train`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from r2m.config import R2MConfig, load_config
from r2m.data.order import round_seed
from r2m.demo import gold, start
from r2m.demo.model import Drawn, Trunk, sample_together, share
from r2m.demo.movie_reviews import SUFFIX
from r2m.method.hidden_states import causal_lm
from r2m.method.reward_model import R2MRewardModel
from r2m.policy.generate import Sampling
from r2m.policy.load import load_policy, load_tokenizer
from r2m.policy.rollout import Annotations, Rollout
from r2m.preferences.labellers import InThread, Label, Pair
from r2m.presets import preset_path
from r2m.trainer import R2MTrainer

PRESET = "smollm2-demo"
ROUNDS = 16
SETTINGS = (
    f"rounds={ROUNDS}",
    "prompts_per_round=6",
    "num_generations=8",
    "micro_batch_size=48",
    "learning_rate=4e-3",
    "lora.top_layers=4",
    "epochs=1",
    "kl.beta=0",
    "placement.attention=grouped",
    f"generation.max_new_tokens={start.NEW_TOKENS}",
    f"generation.temperature={start.TEMPERATURE}",
    "generation.eos_token_ids=[]",  # all responses are as long: ending early would be one more exploit, of another kind
    "r2m.positions=response",
    f"r2m.inner_width={start.INNER_WIDTH}",
    "evaluation.every=1000000",
)
PAIRS = 256  # labelled before the run
FLIPPED = 0.25  # share of labels that are the wrong way round
LABELS = 24  # fresh pairs a round, all of its samples
LABELS_RATE = 1e-3  # learning rate of the reward model where labels teach it


@dataclass(frozen=True)
class Arm:
    """reads_states: the attention starts as the fitted reader of the mean state, else as it is drawn.
    labels: what says which response of a pair of the run is better; before: as many labels of start samples are given
    before the run in their place.
    refits: the head is fitted anew, by the ridge of the first fit: every round to all labels so far, or every second
    round to a bootstrap sample of the pairs before the run.
    oracle: gold is the reward.
    whole: the reward model is fitted backbone and all, through an adapter."""

    overrides: tuple[str, ...]
    reads_states: bool = False
    labels: Literal["", "gold", "clean gold", "initial model"] = ""
    before: bool = False
    refits: Literal["", "labels", "bootstrap"] = ""
    oracle: bool = False
    whole: bool = False


def labelled(*overrides: str, per_round: int = LABELS, rate: float = LABELS_RATE, grebt: float = 0) -> tuple[str, ...]:
    return (
        *overrides,
        f"r2m.learning_rate={rate}",
        f"preferences.per_round={per_round}",
        "preferences.reservoir=1000",  # no label is forgotten
        f"preferences.noise={FLIPPED}",
        f"preferences.grebt={grebt}",
        "preferences.labeller=r2m.demo.arms:labels_of_a_run",
    )


FIXED, HEAD = "r2m.feedback=none", "r2m.feedback=head"
ARMS = {
    "fixed": Arm((FIXED,)),
    "labels": Arm(labelled(HEAD, rate=0), labels="gold", refits="labels"),
    "r2m": Arm(()),
}


@dataclass
class Member:
    """An arm as it runs: its trainer, and what each round has shown."""

    trainer: R2MTrainer
    generator: Drawn
    before_round: Callable[[int], None]
    record: list[dict[str, Any]] = field(default_factory=list)

    def round(self, t: int) -> None:
        self.before_round(t)
        row, rollout, batch = self.trainer.round(t)
        self.record.append(
            {
                "row": row,
                "prompts": list(map(str, rollout.prompts)),
                "texts": rollout.completions,
                "kl": batch.kl.tolist(),
                "proxy": batch.initial.tolist(),
                "reward": batch.rewards.tolist(),
            }
        )


class Group:
    """Arms of one seed on one trunk."""

    def __init__(
        self,
        arms: Mapping[str, Arm],
        shared: start.Start,
        output: str | Path,
        *,
        seed: int,
        pairs: int = PAIRS,
        backbone: str = "same",
        overrides: Sequence[str] = (),
    ):
        """pairs: labelled before the run; backbone: the reward model's, a name of `shared`; overrides: of all arms'
        configs, above their own."""
        self.tokenizer = load_tokenizer(str(shared.model))
        trunk: Trunk | None = None
        self.members: dict[str, Member] = {}
        for name, arm in arms.items():
            config = config_of(arm, shared, f"{output}/{name}", seed, overrides)
            torch.manual_seed(seed)  # the same adapter for every arm
            policy: Any = load_policy(config)
            decoder = policy.get_base_model().model
            assert config.lora is not None and config.lora.top_layers is not None
            trunk = trunk or Trunk(decoder.layers[: -config.lora.top_layers])
            share(trunk, decoder)
            self.members[name] = _member(arm, config, shared, policy, trunk, pairs, backbone)
        assert trunk is not None
        self.trunk, self.config = trunk, config

    def round(self, t: int) -> None:
        config, members = self.config, list(self.members.values())
        settings = Sampling(
            config.generation.temperature,
            config.generation.max_new_tokens,
            config.generation.eos_token_ids or [],
            [],
            round_seed(config.seed, t) % 2**32,
        )
        ids = self.tokenizer(list(map(str, members[0].trainer.prompts_of_round(t))), add_special_tokens=False).input_ids
        self.trunk.known.clear()

        def sample(members: Sequence[Member], count: int, settings: Sampling) -> list[list[list[int]]]:
            policies = [causal_lm(member.trainer.policy) for member in members]
            return sample_together(policies, self.trunk, self.tokenizer, ids, count, settings, SUFFIX)

        compared = [member for member in members if member.trainer.algorithm.needs_greedy]
        if compared:
            greedy = dataclasses.replace(settings, greedy=True)
            for member, responses in zip(compared, sample(compared, 1, greedy), strict=True):
                member.generator.greedy = responses
        for member, responses in zip(members, sample(members, config.num_generations, settings), strict=True):
            member.generator.responses = responses
            member.round(t)


def config_of(arm: Arm, shared: start.Start, output: str, seed: int, changed: Sequence[str]) -> R2MConfig:
    names = [f"policy={shared.model}", f"reward_model={shared.model}", f"output_dir={output}", f"seed={seed}"]
    overrides = [*names, *SETTINGS, f"precision={shared.precision}", *arm.overrides, *changed]
    return load_config(preset_path(PRESET), overrides)


def _member(
    arm: Arm, config: R2MConfig, shared: start.Start, policy: Any, trunk: Trunk, count: int, backbone: str
) -> Member:
    pairs = start.draw_pairs(shared, count + (ROUNDS * LABELS if arm.before else 0), config.seed, FLIPPED)
    torch.manual_seed(config.seed)
    fitted = start.fit(shared, pairs, backbone=backbone, reads_states=arm.reads_states, floor=config.r2m.floor)
    reward_model = fitted.model
    if arm.whole:
        start.fit_whole(fitted, shared, pairs)
    elif shared.backbones[backbone] == shared.model:
        share(trunk, reward_model.backbone)
    generator = Drawn()
    trainer = R2MTrainer(
        policy,
        reward_model,
        load_tokenizer(config.policy),
        list(shared.splits.prompts),
        config,
        generator=generator,
    )
    if arm.oracle:
        trainer.scorer.prepare = partial(_rewarded_by_gold, prepare=trainer.scorer.prepare, shared=shared)  # type: ignore[method-assign]
    if trainer.labels is not None:
        trainer.labels.labeller = InThread(
            partial(_label, arm=arm, seed=config.seed, shared=shared, scorer=trainer.scorer)
        )
        trainer.labels.kept = start.kept(reward_model, shared, pairs, backbone, config.r2m)
        trainer.labels.labels = torch.ones(len(pairs.chosen))
    before = partial(
        _refit, arm=arm, trainer=trainer, shared=shared, pairs=pairs, backbone=backbone, strength=fitted.strength
    )
    return Member(trainer, generator, before)


def _rewarded_by_gold(
    rollout: Rollout, t: int, minibatches: Any, *, prepare: Callable[..., Annotations], shared: start.Start
) -> Annotations:
    """`Scorer.prepare`, with gold in place of the reward model's score."""
    batch = prepare(rollout, t, minibatches)
    parts = shared.judges.parts(list(map(str, rollout.prompts)), rollout.completions)
    batch.rewards.copy_(torch.tensor(gold.gold(shared.standard(parts, gold.CLIP_OF_LABELS))))
    return batch


def _label(pairs: list[Pair], *, arm: Arm, seed: int, shared: start.Start, scorer: Any) -> list[Label]:
    prompts = [str(pair.prompt) for pair in pairs]
    if arm.labels == "initial model":
        model: R2MRewardModel = scorer.reward_model
        with torch.no_grad():
            rte = model.standardized(model.embed([*prompts] * 2, [p.first for p in pairs] + [p.second for p in pairs]))
            first, second = scorer.initial_head(rte).view(2, -1).numpy()
    else:
        first, second = (
            gold.gold(shared.standard(shared.judges.parts(prompts, texts), gold.CLIP_OF_LABELS))
            for texts in ([p.first for p in pairs], [p.second for p in pairs])
        )
    rng = np.random.default_rng([seed, pairs[0].round])
    flips = rng.random(len(pairs)) < (FLIPPED if arm.labels == "gold" else 0)
    return [float(better != flip) for better, flip in zip(first > second, flips, strict=True)]


def labels_of_a_run(pairs: list[Pair]) -> list[Label]:
    raise AssertionError("a run's own labeller takes its place")


def _refit(
    t: int,
    *,
    arm: Arm,
    trainer: R2MTrainer,
    shared: start.Start,
    pairs: start.Pairs,
    backbone: str,
    strength: float,
) -> None:
    """Before round t."""
    model = trainer.reward_model
    if arm.refits == "labels" and t > 1:
        labels = trainer.labels
        assert labels is not None and labels.kept is not None
        signs = 2 * labels.labels[:, None] - 1
        start.refit(model, shared, backbone, signs * (labels.kept.rte[:, 0] - labels.kept.rte[:, 1]), strength)
    if arm.refits == "bootstrap" and t % 2:
        drawn = np.random.default_rng([trainer.config.seed, t]).integers(len(pairs.chosen), size=len(pairs.chosen))
        rte = model.standardized(shared.train.rte[backbone])
        differences = rte[pairs.chosen][drawn] - rte[pairs.rejected][drawn]
        start.refit(model, shared, backbone, differences, strength)
