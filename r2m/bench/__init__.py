"""Benchmarks: the operators, and an update of the reward model, beside what a user would otherwise run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from r2m.bench.measure import TOLERANCE, bandwidth
from r2m.bench.ops import Case, run_cases
from r2m.bench.plots import plot_providers
from r2m.bench.results import Results, Row, describe, device_name, dtype_name, format_table
from r2m.bench.update import run_updates
from r2m.method.backbone import hidden_width
from r2m.method.reward_model import saved_config
from r2m.models import shown
from r2m.names import check_model, named

PAPER_WIDTH = 4096  # of Llama-3-8B and of Skywork-Reward-V2-Llama-3.1-8B


def bench_shape(
    policy: str | None,
    reward_model: str | None,
    *,
    batch: int,
    seq: int,
    inner_width: int,
    heads: int,
    responses: int,
    dtype: str,
    device: str | None,
    seconds: float,
    compiled: bool,
    output: str | Path,
    command: str,
) -> None:
    """Reward, pool and update of the reward model for one shape: prints tables, writes bench.json, .csv and .png.

    policy, reward_model: hub ids or folders, whose hidden sizes are D_p and D_rm; PAPER_WIDTH where there is none.
    batch: sequences of `seq` tokens, in groups of `responses` for the update, which is left out for several heads.
    device: None is cuda if there, else cpu. seconds: for each provider and mode. compiled: torch.compile's providers,
    too. output: a folder. command: for Results.command.
    Raises ValueError for an argument that does not fit, OSError for a model that cannot be found.
    """
    if batch % responses:
        raise ValueError(f"batch is {batch}; expected a multiple of responses, which is {responses}")
    if inner_width % heads:
        raise ValueError(f"heads is {heads}; expected a divisor of inner_width, which is {inner_width}")
    dtypes = {dtype_name(known): known for known in TOLERANCE}
    if dtype not in dtypes:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(dtypes)}")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
    if device is not None and device not in devices:
        raise ValueError(f"device is {device!r}; expected one of this machine: {', '.join(devices)}")
    widths = {"D_p": _hidden_size("policy", policy), "D_rm": _hidden_size("reward_model", reward_model)}

    place, path = torch.device(device or devices[0]), Path(output) / "bench.json"
    results = start(place, command)
    for name, value in results.machine.items():
        print(f"{name}: {value}")
    for name, rate in results.bandwidth.items():
        print(f"{name}: {rate / 1e9:.3g} GB/s")
    print(flush=True)

    name, best = str(shown(policy or "default widths")), max(results.bandwidth.values())
    shapes = {
        "policy_feedback_reward": {"B": batch, "S": seq, **widths, "d": inner_width, "heads": heads},
        "attention_pool": {"B": batch, "S": seq, "D_p": widths["D_p"], "heads": heads},
    }
    cases = [Case(op, name, shape, dtypes[dtype], compiled=compiled) for op, shape in shapes.items()]
    record(results, run_cases(cases, place, best_bandwidth=best, seconds=seconds), path)
    if heads == 1:
        update = {"n": batch // responses, "K": responses, "S": seq, **widths, "d": inner_width}
        rows = run_updates(update, place, best_bandwidth=best, seconds=seconds, dtype=dtypes[dtype])
        record(results, rows, path)
    else:
        print("reward_model_update: left out, it is measured with one head only\n")
    plot_providers(results, path.with_suffix(".png"))
    print(f"results are in {path}, {path.with_suffix('.csv')} and {path.with_suffix('.png')}")


def _hidden_size(argument: str, name: str | None) -> int:
    """Of a model's config; of a saved R2M reward model, its backbone's."""
    if name is None:
        return PAPER_WIDTH
    named(argument, check_model, name)
    saved = saved_config(name)
    if saved is not None:
        return hidden_width(saved.backbone, saved.backbone_revision, trust_remote_code=False)
    return hidden_width(name, None, trust_remote_code=False)


def start(device: torch.device, command: str) -> Results:
    """Results without rows: the machine, and the bandwidths that ideal times come from."""
    if device.index is not None:
        torch.cuda.set_device(device)  # where Triton launches, and events are recorded
    return Results(command, describe(device), bandwidth(device), [])


def record(results: Results, batches: Iterable[list[Row]], path: Path) -> None:
    """Print rows and save the file as they come, so that a run that is cut short leaves what it has measured."""
    for rows in batches:
        print(format_table(rows), end="\n\n", flush=True)
        results.rows += rows
        results.save(path)


def slug(device: torch.device) -> str:
    """The device's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
