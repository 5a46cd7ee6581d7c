"""Whether a finished run degenerated: thirds of its metrics, and what to do about what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from r2m.runs.monitor import ACCURACY_LOSS, CLIPPED_SHARE, DEGENERATE_SHARE, SPREAD_RATIOS, exploits

# When a finished run's last third is worth a warning, beside the thresholds of r2m.runs.monitor.
LASTING_DEGENERATE_SHARE = DEGENERATE_SHARE / 2  # over many rounds, where half of a single one might be chance
PAIR_FLIPS = 0.5  # more than that, and the labels depend on which hidden states are asked
ENTROPY_LEFT = 0.5  # of the policy's at the start
LENGTH_RATIOS = (0.5, 2.0)  # mean length, as a multiple of what it was


def thirds(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Mean of every metric over the first, the middle and the last third of a run's rounds; None where none has it.

    Raises ValueError for fewer than three rounds.
    """
    if len(rows) < 3:
        raise ValueError(
            f"rows: the run has {len(rows)} rounds; expected at least 3, to compare the first with the last"
        )
    cuts = [round(len(rows) * i / 3) for i in range(4)]
    parts = [rows[start:end] for start, end in pairwise(cuts)]
    metrics = dict.fromkeys(key for row in rows for key in row)
    return {key: [_mean([row[key] for row in part if key in row]) for part in parts] for key in metrics}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def degeneration(table: Mapping[str, Sequence[float | None]], eps: float) -> list[str]:
    """What in a run's `thirds` needs its user: what was seen, and what to do about it, a sentence or two each.

    eps: the config's `r2m.eps`. Empty where there is nothing to warn about.
    """
    warnings = []
    first, last = ({key: v for key, values in table.items() if (v := values[i]) is not None} for i in (0, -1))

    def ends(key: str) -> tuple[float, float] | None:
        return (first[key], last[key]) if key in first and key in last else None

    if {"reward/mean", "reward/initial"} <= first.keys() and exploits(first, last):
        judge = ends("eval/judge") or ends("judge/gold")
        judged = f"; the judge's went from {judge[0]:.3f} to {judge[1]:.3f}" if judge else ""
        warnings.append(
            f"the run's own reward rose from {first['reward/mean']:.3f} to {last['reward/mean']:.3f}, and the initial "
            f"reward model's score went from {first['reward/initial']:.3f} to {last['reward/initial']:.3f}{judged}. "
            "The policy may exploit the reward model; this is the first sign of it. Read samples; raise kl.beta or "
            "r2m.floor, lower learning_rate, or take an earlier checkpoint."
        )
    clipped = ends("policy/clip_share")
    if clipped and max(clipped) > CLIPPED_SHARE:
        warnings.append(
            f"{clipped[0]:.0%} of the importance ratios are clipped over the first third, {clipped[1]:.0%} over the "
            "last: in a round the policy moves further than clip_range allows. Lower learning_rate, or set fewer "
            "epochs or minibatches."
        )
    share = ends("reward/degenerate_share")
    if share and share[1] > LASTING_DEGENERATE_SHARE:
        warnings.append(
            f"group std under eps ({eps:g}) in {share[1]:.0%} of groups over the last third, {share[0]:.0%} over the "
            "first: the responses of such a group get one reward, from which neither policy nor reward model learns. "
            "Choose a higher temperature, longer responses, or prompts that leave a choice."
        )
    spread = ends("reward/group_std")
    if spread and spread[0] > 0 and not SPREAD_RATIOS[0] < spread[1] / spread[0] < SPREAD_RATIOS[1]:
        if spread[1] > spread[0]:
            advice = (
                "the reward model widens its own margins, and the KL penalty weighs less. Set r2m.scale_anchor: true, "
                "or lower r2m.learning_rate."
            )
        else:
            advice = "samples grow alike. Raise kl.beta or the temperature."
        warnings.append(
            f"rewards spread {spread[1] / spread[0]:.2f} times as wide inside groups over the last third as over the "
            f"first: {advice}"
        )
    accuracy = ends("rm/pair_accuracy")
    if accuracy and accuracy[1] < accuracy[0] - ACCURACY_LOSS:
        warnings.append(
            f"accuracy on held-out pairs fell from {accuracy[0]:.3f} to {accuracy[1]:.3f}: the reward model forgets "
            "what people prefer, unless it is chance (the standard error on N pairs is about 0.5 / sqrt(N)). Lower "
            "r2m.learning_rate, or take an earlier checkpoint."
        )
    flips = ends("grebt/pair_flips")
    if flips and flips[1] > PAIR_FLIPS:
        warnings.append(
            f"in {flips[1]:.0%} of groups over the last third the refreshed hidden states pick another best or worst "
            "response than the rewards did: what the reward model learns from is mostly chance. Lower learning_rate, "
            "or raise r2m.floor."
        )
    entropy = ends("policy/entropy")
    if entropy and entropy[1] < ENTROPY_LEFT * entropy[0]:
        warnings.append(
            f"the policy's entropy fell from {entropy[0]:.2f} to {entropy[1]:.2f} nats a token: samples grow alike. "
            "Raise kl.beta, or lower learning_rate."
        )
    length = ends("length/mean")
    if length and not LENGTH_RATIOS[0] < length[1] / length[0] < LENGTH_RATIOS[1]:
        warnings.append(
            f"responses went from {length[0]:.0f} to {length[1]:.0f} tokens: the reward may follow length rather than "
            "content. Read samples of both; raise kl.beta."
        )
    return warnings
