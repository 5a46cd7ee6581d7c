"""The search that R2M_KERNELS_AUTOTUNE=1 turns on: a tool for finding configurations, not a way to run."""

import os
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import triton

from r2m_kernels.attention_pool.triton_config import Config

_found: dict[tuple[Any, ...], Config] = {}


def enabled() -> bool:
    return os.environ.get("R2M_KERNELS_AUTOTUNE") == "1"


def tuned(key: tuple[Any, ...], config: Config, run: Callable[[Config], Any]) -> Config:
    """The fastest of `config` and its neighbours by the times of `run`, searched and printed once for every key.

    The key is what rows_config decides by, so that what is printed can be compared with what it returns.
    """
    if key not in _found:
        candidates = list(_neighbours(config))
        times = [_milliseconds(run, candidate) for candidate in candidates]
        best = min(times)
        _found[key] = candidates[times.index(best)]
        print(f"{key}: {_found[key]}  # {best:.4f} ms, the default {times[0]:.4f} ms", flush=True)
    return _found[key]


def _neighbours(config: Config) -> Iterator[Config]:
    """`config` itself, then others with half or twice as many rows, warps and rows of a chunk, and 2 to 5 stages."""
    yield config
    for rows, warps, chunk, stages in product((1, 0.5, 2), (1, 0.5, 2), (1, 0.5, 2), (3, 2, 4, 5)):
        other = dict(config, BS=int(config["BS"] * rows), num_warps=int(config["num_warps"] * warps))
        other |= {"CHUNK": int(config["CHUNK"] * chunk), "STAGES": stages}
        if other != config and other["BS"] >= 1 and 1 <= other["num_warps"] <= 16 and other["CHUNK"] >= other["BS"]:
            yield other


def _milliseconds(run: Callable[[Config], Any], config: Config) -> float:
    try:
        return float(triton.testing.do_bench(lambda: run(config), return_mode="median"))
    except triton.runtime.errors.OutOfResources:  # too much shared memory
        return float("inf")
