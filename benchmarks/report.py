"""Tables and plots of the committed benchmark results, into README.md, docs/benchmarks.md, docs/kernels.md and
docs/benchmarks/.

python benchmarks/report.py            # after a run of benchmarks/run.py
python benchmarks/report.py --check    # writes nothing; names what does not show what the results say
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's packages, whatever is installed

from benchmarks import predicted
from r2m.plots import PHASES
from r2m_kernels.bench.ops import OURS
from r2m_kernels.bench.plots import format_bytes, format_seconds, memory, plot_growth, plot_update, sweeps
from r2m_kernels.bench.results import Results, Row, format_number, format_percent, format_shape

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
SMALL_OPS = ("time_weighted_fusion", "fused_reward", "grebt_loss")
README_LEGEND = (
    "Forward and backward together; each column has its fastest form, in brackets. A cell: median time, and how many "
    "times this project's it is. How it was measured, and every other figure: [docs/benchmarks.md](docs/benchmarks.md)."
)
DRAWN = {
    "growth": "Time over the number of tokens, sequences and features, and memory over tokens, in four forms",
    "update": "Time and memory of one update of the reward model",
}

Device = dict[str, Results]  # one device's files, by suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    arguments = parser.parse_args()
    try:
        if not arguments.check:
            write(ROOT)
        elif stale := check(ROOT):
            sys.exit("\n".join(f"{path}: not what the results say; run python benchmarks/report.py" for path in stale))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def write(root: Path) -> None:
    """Raises ValueError if there are no results, or, before anything is written, if a text has no markers."""
    for path, text in texts(root).items():
        path.write_text(text)
    for path, (plot, results, source) in plots(root).items():
        plot(results, path, source)


def check(root: Path) -> list[Path]:
    """The files, relative to root, that do not show what the results say: texts by content, plots by their source."""
    stale = [path for path, text in texts(root).items() if path.read_text() != text]
    stale += [path for path, (_, _, source) in plots(root).items() if drawn_from(path) != source]
    return [path.relative_to(root) for path in stale]


def load(root: Path) -> dict[str, Device]:
    """By the name of the device's folder, GPUs first."""
    devices: dict[str, Device] = {}
    for path in sorted((root / "benchmarks" / "results").glob("*/*.json")):
        devices.setdefault(path.parent.name, {})[path.stem] = Results.load(path)
    if not devices:
        raise ValueError(f"{root / 'benchmarks' / 'results'}: no results; run python benchmarks/run.py")
    return dict(sorted(devices.items(), key=lambda item: "cuda" not in any_of(item[1]).machine))


def texts(root: Path) -> dict[Path, str]:
    devices = load(root)
    readme = "\n\n".join([README_LEGEND, *(readme_section(name, device) for name, device in devices.items())])
    full = "\n\n".join(full_section(name, device) for name, device in devices.items())
    shares = predicted.tables(device["pools"] for device in devices.values() if "pools" in device)
    docs = root / "docs"
    bodies = {root / "README.md": readme, docs / "benchmarks.md": full, docs / "kernels.md": shares}
    return {path: between_markers(path, {(BEGIN, END): body}) for path, body in bodies.items()}


def between_markers(path: Path, bodies: Mapping[tuple[str, str], str]) -> str:
    """The file's text with each body between its two markers."""
    text = path.read_text()
    for (begin, end), body in bodies.items():
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{path}: expected the markers {begin} and, below, {end}")
        text = f"{before}{begin}\n\n{body}\n\n{end}{after}"
    return text


def plots(root: Path) -> dict[Path, tuple[Callable[..., None], Results, str]]:
    """Path -> what draws it, the results, and the SHA-256 of their file."""
    found = {}
    for name, device in load(root).items():
        for suite, what, plot in drawings(device):
            data = (root / "benchmarks" / "results" / name / f"{suite}.json").read_bytes()
            path = root / "docs" / "benchmarks" / f"{name}-{what}.png"
            found[path] = (plot, device[suite], hashlib.sha256(data).hexdigest())
    return found


def drawings(device: Device) -> list[tuple[str, str, Callable[..., None]]]:
    """Suite, last part of the file's name, and what draws it."""
    growth = [("ops", "growth", plot_growth)] if "ops" in device and sweeps(device["ops"]) else []
    return growth + ([("update", "update", plot_update)] if "update" in device else [])


def drawn_from(path: Path) -> str | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("Source")


# ---- README.md ----


def readme_section(name: str, device: Device) -> str:
    shown = drawings(device)[:1]
    sections = [
        f"**{any_of(device).machine['device']}**: {made_by(device)}",
        main_table(device),
        " ".join(filter(None, [own_share(device), noise(device)])),
        *(f"![{DRAWN[what]}](docs/benchmarks/{name}-{what}.png)" for _, what, _ in shown),
    ]
    return "\n\n".join(filter(None, sections))


def main_table(device: Device) -> str:
    """Up to four rows: an update of the reward model, then forward and backward of a reward, of a pool and of GREBT."""
    update, ops = rows_of(device, "update"), rows_of(device, "ops")
    last = update[-1].case if update else ""  # streamed, as the trainer does it
    named = {
        f"one update of the reward model, {last}": [row for row in update if row.case == last],
        "`policy_feedback_reward`": main_shape(ops, "policy_feedback_reward"),
        "`attention_pool_with_gradient`": main_shape(ops, "attention_pool"),
        "`grebt_loss`": largest_shape(ops, "grebt_loss"),
    }
    lines = []
    for name, rows in named.items():
        rows = sorted(
            (row for row in timed(rows) if row.mode in ("update", "forward+backward")), key=attrgetter("median")
        )
        ours = next((row for row in rows if row.provider.startswith(OURS)), None)
        if ours is not None:
            others = [row for row in rows if not row.provider.startswith(OURS)]
            projected = next((row for row in others if "projected" in row.provider), None)
            plain = next((row for row in others if "projected" not in row.provider), None)
            cells = [show(row, partial(beside, ours=ours)) for row in (projected, plain)]
            lines.append([name, shape_of(ours), *cells, f"{format_seconds(ours.median)} ({ours.provider})"])
    return table(["", "", "keys and values projected", "other plain PyTorch", "this project"], lines) if lines else ""


def beside(row: Row, ours: Row) -> str:
    form = row.provider.removeprefix("plain PyTorch, ").removeprefix("projected, ")
    return f"{format_seconds(row.median)}, {times(row.median / ours.median)} ({form})"


def own_share(device: Device) -> str:
    """R2M's own part of every training round that ran."""
    ran = [row for row in timed(rows_of(device, "round")) if row.own_seconds]
    told = [f"{format_seconds(row.own_seconds)} of {format_seconds(row.median)} ({row.case})" for row in ran]
    return f"R2M's own work in a training round: {', '.join(told)}." if told else ""


def made_by(device: Device) -> str:
    commands: dict[str, list[str]] = {}
    for results in device.values():
        machine, commit = results.machine, results.machine["commit"] or "unknown"
        versions = [f"{name} {machine[name]}" for name in ("torch", "triton") if machine.get(name)]
        versions += [f"commit {commit[:12]}{'+' if commit.endswith('+') else ''}"]  # "+": with changes
        commands.setdefault(", ".join(versions), []).append(f"`{results.command}`")
    return "; ".join(f"{versions}: {', '.join(unique(made))}" for versions, made in commands.items())


# ---- docs/benchmarks.md ----

COMPARED = (
    "Side by side: a cell holds the median time; how many times as long as ours it takes (`triton` or `extension`, the "
    "faster); and the ideal time's share of it. Memory is what comes and goes beyond the inputs, results included."
)
COLUMNS: dict[str, Callable[[Row, float | None], str]] = {
    "median": lambda row, reference: format_seconds(row.median),
    "p20": lambda row, reference: show(row.p20, format_seconds),
    "p80": lambda row, reference: show(row.p80, format_seconds),
    "times ours": lambda row, reference: show(ratio(row, reference), times),
    "spread": lambda row, reference: show(row.spread, lambda share: f"{100 * share:.1f} %"),
    "error": lambda row, reference: show(row.error, lambda error: f"{error:.1e}"),
    "memory": lambda row, reference: show(row.peak_bytes, format_bytes),
    "held": lambda row, reference: show(row.held_bytes, format_bytes),
    "host": lambda row, reference: show(row.host, format_seconds),
    "launches": lambda row, reference: show(row.launches, str),
    "GB/s": lambda row, reference: show(row.bandwidth, lambda bandwidth: format_number(bandwidth / 1e9)),
    "of ideal": lambda row, reference: show(row.fraction_of_ideal, format_percent),
}


def full_section(name: str, device: Device) -> str:
    sections = [f"## {any_of(device).machine['device']}"]
    for suite, results in device.items():
        machine = ", ".join(f"{key} {value}" for key, value in results.machine.items() if value is not None)
        bandwidth = ", ".join(f"{key} {format_number(value / 1e9)} GB/s" for key, value in results.bandwidth.items())
        sections.append(f"{suite}: `{results.command}`; {machine}; bandwidth: {bandwidth}.")
    sections += side_by_side(device)
    sections += [f"![{what}](benchmarks/{name}-{what}.png)" for _, what, _ in drawings(device)]
    for results in device.values():
        for (op, mode), rows in grouped(results.rows, attrgetter("op", "mode")).items():
            sections += [f"### {op}, {mode}", full_table(timed(rows)), without_time(rows)]
            if any(row.parts for row in rows):
                sections.append(parts_table([row for row in rows if row.parts]))
    return "\n\n".join(filter(None, [*sections, noise(device)]))


def side_by_side(device: Device) -> list[str]:
    """What matters most, a column a form or a mode: the update, reward and pool at one shape, the small ops, rounds."""
    update, ops, rounds = (rows_of(device, suite) for suite in ("update", "ops", "round"))
    reward, pool = main_shape(ops, "policy_feedback_reward"), main_shape(ops, "attention_pool")
    small = [row for op in SMALL_OPS for row in largest_shape(ops, op)]
    sections = [COMPARED]
    if update:
        title = f"**One update of the reward model**, {shape_of(update[0])}; times the fastest; memory beyond h"
        sections += [title, comparison(update, "case", "")]
    if reward:
        title = f"**`policy_feedback_reward`**, {reward[0].case}: {shape_of(reward[0])}"
        sections += [title, comparison(reward, "mode")]
    if pool:
        title = f"**`attention_pool`**, {pool[0].case}: {shape_of(pool[0])}; score is `attention_pool_dot`, "
        sections += [f"{title}forward+backward `attention_pool_with_gradient`", comparison(pool, "mode")]
    if small:
        sections += ["**Fusion and GREBT**, times as long as eager PyTorch", beside_eager(small)]
    if rounds:
        # Their names say how many weights they have.
        sizes = [{key: row.shape[key] for key in ("n", "K", "S_prompt", "S_response")} for row in rounds]
        shapes = unique(f"{row.case}: {format_shape(size)}" for row, size in zip(rounds, sizes, strict=True))
        sections += [f"**A training round**, {'; '.join(shapes)}", round_table(rounds)]
    return sections


def comparison(rows: Sequence[Row], key: str, names: str | tuple[str, ...] = OURS) -> str:
    """A line a provider that has a time; time, ratio to the fastest of `names`, and memory for every value of `key`."""
    columns = grouped(rows, attrgetter(key))
    lines = []
    for provider in unique(row.provider for row in timed(rows)):
        cells = [provider]
        for of_column in columns.values():
            row = next((row for row in of_column if row.provider == provider), None)
            cells += [time_cell(row, fastest(of_column, names)), show(memory(row), format_bytes)] if row else ["", ""]
        lines.append(cells)
    return table(["", *(cell for name in columns for cell in (name, "memory"))], lines)


def time_cell(row: Row, reference: float | None) -> str:
    if row.status != "ok":
        return row.status.split(":")[0]
    cells = [
        format_seconds(row.median),
        show(ratio(row, reference), times),
        show(row.fraction_of_ideal, format_percent),
    ]
    return ", ".join(filter(None, cells))


def beside_eager(rows: Sequence[Row]) -> str:
    providers = [name for name in unique(row.provider for row in timed(rows)) if name != "eager"]
    lines = []
    for (op, mode), of_line in grouped(rows, attrgetter("op", "mode")).items():
        ratios = {row.provider: show(ratio(row, fastest(of_line, "eager")), times) for row in of_line}
        lines.append([f"`{op}`", mode, shape_of(of_line[0]), *(ratios.get(name, "") for name in providers)])
    return table(["", "", "", *providers], lines)


def round_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row.status != "ok":
            lines.append([row.case, row.provider, row.status.split(":")[0], *[""] * (len(PHASES) + 2)])
            continue
        plain = next((r for r in timed(rows) if r.case == row.case and r.provider == "RLOO"), row)
        own = row.own_seconds
        more = "" if row is plain else f" ({100 * (row.peak_bytes / plain.peak_bytes - 1):+.1f} %)"
        phases = [format_seconds(row.parts[phase]) for phase in PHASES]
        share = f"{format_seconds(own)} ({100 * own / row.median:.2g} %)" if own else ""
        lines.append([row.case, row.provider, format_seconds(row.median), *phases, share,
                      format_bytes(row.peak_bytes) + more])  # fmt: skip
    names = [phase.replace("_", " ") for phase in PHASES]
    return table(["", "", "the round", *names, "of which R2M's own", "peak memory"], lines)


def full_table(rows: Sequence[Row]) -> str:
    lines = []
    for (case, shape), same in grouped(rows, lambda row: (row.case, shape_of(row))).items():
        for row in same:
            cells = [column(row, fastest(same)) for column in COLUMNS.values()]
            lines.append([case, shape, row.provider, *cells])
    head = ["case", "shape", "provider", *COLUMNS]
    used = [i for i in range(len(head)) if any(line[i] for line in lines)]
    return table([head[i] for i in used], [[line[i] for i in used] for line in lines])


def parts_table(rows: Sequence[Row]) -> str:
    names = unique(name for row in rows for name in row.parts)
    head = ["seconds", *(f"{row.case}, {row.provider}" for row in rows)]
    return table(head, [[name, *(show(row.parts.get(name), format_number) for row in rows)] for name in names])


# ---- of both ----


def any_of(device: Device) -> Results:
    return next(iter(device.values()))


def rows_of(device: Device, suite: str) -> list[Row]:
    return device[suite].rows if suite in device else []


def main_shape(rows: Sequence[Row], op: str) -> list[Row]:
    """The rows of `op` that share case, dtype and sizes with the first row of policy_feedback_reward."""
    main = next((row for row in rows if row.op == "policy_feedback_reward"), None)

    def same(row: Row) -> bool:
        return (row.case, row.dtype) == (main.case, main.dtype) and row.shape.items() <= main.shape.items()

    return [row for row in rows if row.op == op and same(row)] if main else []


def largest_shape(rows: Sequence[Row], op: str) -> list[Row]:
    """The rows of `op` at its largest shape, of those where the most providers have times: not all compile."""
    shapes = grouped((row for row in rows if row.op == op), shape_of)
    return max(shapes.values(), key=lambda same: (len(timed(same)), math.prod(same[0].shape.values())), default=[])


def without_time(rows: Sequence[Row]) -> str:
    """A line for every reason: providers, and where they have times elsewhere, on which shapes they have none."""
    able = {"all", *(row.provider for row in timed(rows))}

    def who(row: Row) -> str:
        return f"{row.provider} ({row.case}: {shape_of(row)})" if row.provider in able else row.provider

    reasons = grouped((row for row in rows if row.status != "ok"), attrgetter("status"))
    return "\n".join(f"- {'; '.join(unique(map(who, of)))}: {status}" for status, of in reasons.items())


def noise(device: Device) -> str:
    found = [row.noise for results in device.values() for row in timed(results.rows) if row.noise is not None]
    if not found:
        return ""
    middle, most = 100 * statistics.median(found), 100 * max(found)
    return f"Two series of the same version differ by {middle:.1f} % in the median, {most:.1f} % at most."


def timed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.status == "ok"]


def fastest(rows: Iterable[Row], names: str | tuple[str, ...] = OURS) -> float | None:
    """The least median of the providers whose names begin with one of `names`."""
    return min((row.median for row in timed(rows) if row.provider.startswith(names)), default=None)


def ratio(row: Row, reference: float | None) -> float | None:
    return row.median / reference if reference and row.status == "ok" else None


def times(value: float) -> str:
    return f"{format_number(value)} x"


def shape_of(row: Row) -> str:
    return f"{format_shape(row.shape)}, {row.dtype}"


def show(value: Any, form: Callable[[Any], str]) -> str:
    return "" if value is None else form(value)


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


if __name__ == "__main__":
    main()
