"""The demo: a small language model learns to exploit a fixed reward model; and the same with fresh labels, and R2M."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from r2m.config import config_to_yaml, load_config
from r2m.demo import gold, start
from r2m.demo.arms import ARMS, FLIPPED, LABELS, PAIRS, PRESET, ROUNDS, Group, Member
from r2m.demo.movie_reviews import vader
from r2m.devices import resolve_precision
from r2m.plots import plot_comparison, plot_run
from r2m.presets import preset_path
from r2m.progress import phase, waiting

WHAT = {
    "fixed": "RLOO, fixed reward model",
    "labels": f"RLOO, {LABELS} fresh labels a round",
    "r2m": "RLOO + R2M",
}
PROMPTS = 130  # whose start samples are enough for 256 pairs of different texts
SCORE, KL = "score of the first reward model", "KL to the start (nats)"
LAST = 4  # rounds that the table is about
STORY = "story.json"  # what the arms did over all seeds; written by benchmarks/overoptimization/report.py


def run_demo(*, rounds: int = ROUNDS, seed: int = 0, output: Path = Path("runs/demo")) -> dict[str, dict[str, float]]:
    """Train the arms and write table, plots, metrics, weights and samples to `output`. Returns the table, {arm:
    {measure: value}}, means over the last rounds."""
    began = time.perf_counter()
    transformers.logging.set_verbosity_error()  # models are loaded six times, and no head is in the file
    transformers.logging.disable_progress_bar()
    precision = resolve_precision(load_config(preset_path(PRESET)), "cpu").precision
    assert precision != "auto"
    shared = start.load(precision, prompts=PROMPTS)
    for name in ARMS:
        shutil.rmtree(output / name, ignore_errors=True)  # of the demo before
    with waiting("fitting the reward models"):
        group = Group(ARMS, shared, output, seed=seed, overrides=[f"rounds={rounds}"])
    print(
        f"The reward model knows {PAIRS} labelled pairs, {FLIPPED:.0%} of them labelled wrongly. {len(ARMS)} arms of "
        f"{rounds} rounds, {len(group.members['fixed'].trainer.prompts_of_round(1))} prompts x "
        f"{group.config.num_generations} responses each:",
        flush=True,
    )
    history: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for t in range(1, rounds + 1):
        round_began = time.perf_counter()
        with phase(f"round {t} of {rounds}"):
            group.round(t)
        if t == 1:
            minutes = (time.perf_counter() - round_began) * (rounds - 1) / 60
            print(f"about {minutes:.0f} minutes to go", flush=True)
        for name, member in group.members.items():
            history[name].append(measures(member, shared, t))
        print(f"round {t}: " + "; ".join(_line(name, rows[-1]) for name, rows in history.items()), flush=True)
    table = {name: mean_of_last(rows) for name, rows in history.items()}
    for name, member in group.members.items():
        _save(member, history[name], output / name)
    paths = {WHAT[name]: output / name / "metrics.jsonl" for name in ARMS}
    plot_comparison(paths, output / "comparison.png")
    minutes = (time.perf_counter() - began) / 60
    text = report(table, samples(group.members), rounds=rounds, seed=seed, minutes=minutes)
    (output / "report.md").write_text(text)
    (output / "results.json").write_text(json.dumps(table, indent=2) + "\n")
    print("\n" + text + f"\nReport, plots, metrics and weights are in {output}/")
    return table


def measures(member: Member, shared: start.Start, t: int) -> dict[str, float]:
    """Of the samples of round t: gold and its parts less those of start samples to the same prompts."""
    of_round = member.record[t - 1]
    numbers = {prompt: i for i, prompt in enumerate(shared.splits.prompts)}
    began = shared.start_means[[numbers[prompt] for prompt in of_round["prompts"]]].mean(0)
    parts = shared.standard(shared.judges.parts(of_round["prompts"], of_round["texts"]))
    reached = np.concatenate([[gold.gold(parts).mean()], parts.mean(0)]) - began
    texts = [f"{prompt}{text}" for prompt, text in zip(of_round["prompts"], of_round["texts"], strict=True)]
    return {
        SCORE: float(np.mean(of_round["proxy"])),
        **{name: float(value) for name, value in zip(("gold", *gold.PARTS), reached, strict=True)},
        "VADER": float(vader(texts).mean()),
        KL: float(np.mean(of_round["kl"])),
    }


def mean_of_last(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows[-LAST:]])) for name in rows[0]}


def samples(members: Mapping[str, Member]) -> dict[str, dict[str, str]]:
    """Of two prompts of the last round the first response of each arm: {prompt: {arm: text}}."""
    found: dict[str, dict[str, str]] = {}
    for name, member in members.items():
        last = member.record[-1]
        for prompt, texts in itertools.islice(
            itertools.groupby(zip(last["prompts"], last["texts"], strict=True), key=lambda pair: pair[0]), 2
        ):
            found.setdefault(prompt, {})[name] = next(texts)[1]
    return found


def report(
    table: Mapping[str, Mapping[str, float]],
    texts: Mapping[str, Mapping[str, str]],
    *,
    rounds: int,
    seed: int,
    minutes: float,
) -> str:
    names = list(next(iter(table.values())))
    cells = [
        ["", *(WHAT[arm] for arm in table)],
        *([name, *(f"{row[name]:.2f}" for row in table.values())] for name in names),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    quotes = [
        line
        for prompt, of_prompt in texts.items()
        for line in (
            f"- **{prompt}** ...",
            *(f"  - {WHAT[arm]}: {' '.join(t.split())}" for arm, t in of_prompt.items()),
        )
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"Means over the last {min(LAST, rounds)} of {rounds} rounds, seed {seed}, {minutes:.1f} minutes in all. "
            "Gold is sentiment, fluency and variety, by judges that no training sees. It and its parts are changes "
            "from the start, in deviations of its samples. A score that rises while gold does not is exploitation.",
            "",
            *story(),
            "",
            "Samples of the last round:",
            *quotes,
            "",
        ]
    )


def story() -> list[str]:
    """What all seeds say, since one says little."""
    known: dict[str, Any] = json.loads((files(__package__) / STORY).read_text())
    return [
        "One seed shows that the loop trains, not which arm is better: arms differ from seed to seed. Over "
        f"{known['seeds']} seeds, with pairs of more prompts (gold is the mean of the second half; 95 % intervals; "
        "docs/results.md):",
        *(f"- {line}" for line in known["lines"]),
    ]


def _line(name: str, row: Mapping[str, float]) -> str:
    return f"{name}: score {row[SCORE]:+.2f}, gold {row['gold']:+.2f}, KL {row[KL]:.1f}"


def _save(member: Member, rows: Sequence[Mapping[str, float]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_to_yaml(member.trainer.config))
    with (folder / "metrics.jsonl").open("w") as file:
        for of_round, row in zip(member.record, rows, strict=True):
            judged = {f"judge/{name}": row[name] for name in ("gold", *gold.PARTS)} | {"judge/vader": row["VADER"]}
            file.write(json.dumps(of_round["row"] | judged) + "\n")
    plot_run(folder / "metrics.jsonl", folder / "metrics.png")
    member.trainer.save_pretrained(folder)
