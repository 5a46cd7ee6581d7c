"""What the paper claims and what it leaves unasked, as differences between arms with a sign."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.science.estimates import BASE, R2M, Estimate, Results, against, against_at_equal_kl, student
from benchmarks.science.testbed import SCENARIOS

ENOUGH_SEEDS = 5  # for a verdict: the interval that a bootstrap makes of three is too short


class Claim(NamedTuple):
    """That `arm` less `base` is positive (sign 1) or negative (-1): `measure` of the evaluation, or, with `measure`
    "accuracy", how many of the held-out pairs two states of one arm's reward model rank right."""

    text: str
    arm: str
    base: str
    sign: int
    measure: str = "judge"


CLAIMS = (
    Claim("R2M on RLOO gives better responses than RLOO", R2M, BASE, 1),
    Claim("R2M on GRPO gives better responses than GRPO", "grpo-r2m", "grpo", 1),
    Claim("feedback through attention as it was drawn (w/o Train) does harm", "untrained", BASE, -1),
    Claim("and R2M does better than that", R2M, "untrained", 1),
    Claim("R2M does better than a reward model that was fitted as a whole", R2M, "pretrained", 1),
    Claim("R2M does better than an iterative head", R2M, "head", 1),
    Claim("R2M needs the hidden states: w/ Noise is worse", R2M, "noise", 1),
    Claim("R2M needs BT: w/o BT is worse", R2M, "no-bt", 1),
    Claim("R2M needs GRE: w/o GRE is worse", R2M, "no-gre", 1),
    Claim("R2M exploits less: fewer samples with the cue", R2M, BASE, -1, "cue"),
    Claim("untrained, attention costs the reward model accuracy", "untrained first_round", "shared", -1, "accuracy"),
    Claim("training raises its accuracy", "r2m last_round", "first_round", 1, "accuracy"),
    Claim("above that of the model without feedback", "r2m last_round", "shared", 1, "accuracy"),
)
CONTROL_CLAIMS = (
    Claim("training along matters: better than the warm start, frozen", R2M, "frozen", 1),
    Claim("the *policy's* states matter: better than those of the frozen start", R2M, "reference", 1),
)
ANCHOR_CLAIMS = (
    Claim("with its scale held, R2M gives better responses than RLOO", "scale-anchor", BASE, 1),
    Claim("with its scale held, R2M exploits less", "scale-anchor", BASE, -1, "cue"),
)
DURING_TRAINING = {"judge": "judge/logit", "cue": "cue/rate"}  # a measure of the evaluation -> the same of a round


def evidence(claim: Claim, name: str, results: Results) -> list[Estimate | None]:
    """At the end of training, and at equal KL; None where a scenario cannot say."""
    if claim.measure == "accuracy":
        arm, after = claim.arm.split()
        accuracy = [
            {"shared": run["fit"]["test_accuracy_vanilla"], **run["rm_accuracy"]}
            for run in results.get(arm, {}).values()
        ]
        return [student([of[after] - of[claim.base] for of in accuracy]) if accuracy else None, None]
    if claim.arm not in results or (claim.measure == "cue" and SCENARIOS[name].cue_rates is None):
        return [None, None]
    end = against(results, claim.arm, claim.measure, base=claim.base)
    return [end, against_at_equal_kl(results, claim.arm, DURING_TRAINING[claim.measure], base=claim.base)]


def verdict(claim: Claim, estimate: Estimate) -> str:
    if estimate.seeds < ENOUGH_SEEDS:
        return f"{estimate.seeds} seed{'s' * (estimate.seeds > 1)}"
    if estimate.low > 0 or estimate.high < 0:
        return "**for**" if estimate.mean * claim.sign > 0 else "**against**"
    return "not tested"
