"""Benchmarks: the operators, and an update of the reward model, beside what a user would otherwise run.

`python -m r2m_kernels.bench` times one shape; torch alone is needed, and matplotlib for the figure. Whole rounds are
timed in benchmarks/.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from r2m_kernels.bench.measure import TOLERANCE, bandwidth
from r2m_kernels.bench.ops import Case, run_cases
from r2m_kernels.bench.results import Results, Row, describe, device_name, dtype_name, format_table
from r2m_kernels.bench.update import run_updates


def check_shape(
    *, batch: int, inner_width: int, heads: int, responses: int, dtype: str, device: str | None
) -> tuple[torch.dtype, torch.device]:
    """dtype and device, None being cuda if there, else cpu; ValueError for an argument that does not fit."""
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
    return dtypes[dtype], torch.device(device or devices[0])


def bench_shape(
    name: str,
    policy_width: int,
    reward_model_width: int,
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

    name: of the shape, in tables. batch: sequences of `seq` tokens, in groups of `responses` for the update, which is
    left out for several heads. seconds: for each provider and mode. compiled: torch.compile's providers, too.
    output: a folder. command: for Results.command. Raises ValueError as check_shape.
    """
    precision, place = check_shape(
        batch=batch, inner_width=inner_width, heads=heads, responses=responses, dtype=dtype, device=device
    )
    widths = {"D_p": policy_width, "D_rm": reward_model_width}
    path = Path(output) / "bench.json"
    results = start(place, command)
    for key, value in results.machine.items():
        print(f"{key}: {value}")
    for key, rate in results.bandwidth.items():
        print(f"{key}: {rate / 1e9:.3g} GB/s")
    print(flush=True)

    best = max(results.bandwidth.values())
    shapes = {
        "policy_feedback_reward": {"B": batch, "S": seq, **widths, "d": inner_width, "heads": heads},
        "attention_pool": {"B": batch, "S": seq, "D_p": policy_width, "heads": heads},
    }
    cases = [Case(op, name, shape, precision, compiled=compiled) for op, shape in shapes.items()]
    record(results, run_cases(cases, place, best_bandwidth=best, seconds=seconds), path)
    if heads == 1:
        update = {"n": batch // responses, "K": responses, "S": seq, **widths, "d": inner_width}
        record(results, run_updates(update, place, best_bandwidth=best, seconds=seconds, dtype=precision), path)
    else:
        print("reward_model_update: left out, it is measured with one head only\n")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"results are in {path} and {path.with_suffix('.csv')}; no figure, matplotlib is not installed")
        return
    from r2m_kernels.bench.plots import plot_providers

    plot_providers(results, path.with_suffix(".png"))
    print(f"results are in {path}, {path.with_suffix('.csv')} and {path.with_suffix('.png')}")


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
