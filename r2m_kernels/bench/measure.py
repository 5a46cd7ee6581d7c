"""Time, memory and correctness of functions that compute the same thing, on one device."""

from __future__ import annotations

import gc
import logging
import os
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # not in __all__
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r2m_kernels import build
from r2m_kernels.bench.results import Row

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr

logger = logging.getLogger(__name__)

T = TypeVar("T")
Run = Callable[[], Tensor | Sequence[Tensor]]

# Relative Frobenius error allowed, by dtype of hidden: what forms that round every intermediate to it stay under.
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-4}

# More than the L2 cache of any GPU, or a core's share of an L3: whoever has been read since, it is not the input.
_COLD_BYTES = 256 * 2**20
_MOST_RUNS = 25  # a series, of something fast; enough for quantiles

# A GPU waits this long before the first event, 1 ms at 2 GHz: a call takes the host less, so that its kernels are in
# the queue when the time begins. Without it a time would be the host's where that is the slower of the two.
_WAIT_CYCLES = 2_000_000


def bandwidth(device: torch.device) -> dict[str, float]:
    """Bytes per second of a large read (PyTorch's sum of integers) and of a large copy, each the best of 15."""
    x = torch.ones(_COLD_BYTES // 4, dtype=torch.int64, device=device)  # 512 MB
    y = torch.empty_like(x)
    read = min(_seconds(lambda: x.sum(), device)[0] for _ in range(15))
    copy = min(_seconds(lambda: y.copy_(x), device)[0] for _ in range(15))
    return {"read": x.nbytes / read, "copy": 2 * x.nbytes / copy}


def measure(
    entries: Sequence[tuple[Row, Run]],
    exact: Sequence[Tensor],
    tolerance: float,
    *,
    device: torch.device,
    best_bandwidth: float,
    seconds: float,
) -> list[Row]:
    """Fill in the rows of functions that all compute `exact` (float64).

    Each runs once, which compiles what there is to compile. If a result is not within `tolerance` of `exact` (see
    `relative_error`), its row says so and has no times; if it cannot run, why not. The others take turns, each for
    about `seconds`, in two series. Rows whose status is no longer "ok" are left alone.
    """
    able = []
    for row, run in entries:
        if row.status == "ok":
            row.status, row.error = check(run, exact, tolerance)
        if row.status == "ok":
            able.append((row, run))
    for (row, run), (series, host) in zip(able, _take_turns([run for _, run in able], device, seconds), strict=True):
        summarize(row, *series)
        row.host = statistics.median(host) if host else None
        row.peak_bytes, row.launches = _memory_and_launches(run, device)
        if row.ideal_bytes is not None:
            row.ideal = row.ideal_bytes / best_bandwidth
    return [row for row, _ in entries]


def summarize(row: Row, *series: list[float]) -> None:
    """Median and quantiles of all runs, in seconds, and how far the medians of two series are apart."""
    runs = [second for one in series for second in one]
    row.runs, row.median = len(runs), statistics.median(runs)
    ordered = sorted(runs)
    row.p20, row.p80 = (ordered[round(q * (len(runs) - 1))] for q in (0.2, 0.8))
    if len(series) == 2:
        a, b = (statistics.median(one) for one in series)
        row.noise = abs(a - b) / ((a + b) / 2)


def check(run: Run, exact: Sequence[Tensor], tolerance: float) -> tuple[str, float | None]:
    """Row.status and Row.error of what runs once: "ok", "wrong: ...", "out of memory", "cannot run: ..." or, for what
    an implementation does not raise on purpose, such as a compiler's error, "failed: ..."."""
    try:
        results = run()
    except torch.OutOfMemoryError:
        return "out of memory", None
    except (ImportError, RuntimeError) as failure:
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        return f"cannot run: {reason.split('cannot run: ')[-1]}", None
    except Exception as failure:  # one provider's failure must not cost the others their rows
        logger.exception("a provider failed")
        return f"failed: {type(failure).__name__}: {str(failure).strip()[:200]!r}", None
    error = relative_error(results, exact)
    return ("ok" if error <= tolerance else f"wrong: relative error {error:.1e}"), error


def relative_error(results: Tensor | Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Frobenius norm of the difference over that of `exact`, of several results the greatest; inf for NaN."""
    results = [results] if isinstance(results, Tensor) else results
    errors = [
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)
    ]  # a zip of other lengths is a mistake in the benchmark, and raises
    return max(error if error == error else float("inf") for error in errors)


def free_memory(device: torch.device) -> float:
    """Bytes."""
    return build._available_memory() * 2**30 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


class MemoryTracker(TorchDispatchMode):
    """Context manager that counts the bytes of the storages which operations inside it make, while they live.

    live: now; peak: the most since it was last set. Older storages count from `add` on. Scratch memory inside an
    operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def peak_of(self, function: Callable[[], T]) -> tuple[T, int]:
        """What `function` returns, and the most bytes alive meanwhile."""
        self.peak = self.live
        return function(), self.peak

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result


def release(device: torch.device) -> None:
    """Give memory back that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _take_turns(
    runs: Sequence[Run], device: torch.device, seconds: float
) -> list[tuple[list[list[float]], list[float]]]:
    """Two series of times of every function, one after another and in turn, so that all meet the same machine; and, on
    a GPU, the host's times."""
    cold = _cold(device)
    times: list[list[list[float]]] = [[[], []] for _ in runs]
    hosts: list[list[float]] = [[] for _ in runs]
    for series in range(2):
        waiting = list(range(len(runs)))
        while waiting:
            for i in waiting:
                taken, host = _seconds(runs[i], device, cold)
                times[i][series].append(taken)
                hosts[i] += [] if host is None else [host]
            waiting = [i for i in waiting if sum(times[i][series]) < seconds / 2 and len(times[i][series]) < _MOST_RUNS]
    return list(zip(times, hosts, strict=True))


@cache
def _cold(device: torch.device) -> Tensor:
    return torch.ones(_COLD_BYTES // 8, dtype=torch.int64, device=device)


def _seconds(run: Run, device: torch.device, cold: Tensor | None = None) -> tuple[float, float | None]:
    """Of one run, after reading `cold`. On a GPU between two events, and until the host has launched everything."""
    if device.type != "cuda":
        if cold is not None:
            cold.sum()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin, None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if cold is not None:
        cold.sum()
    torch.cuda._sleep(_WAIT_CYCLES)
    start.record()
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, host


def _memory_and_launches(run: Run, device: torch.device) -> tuple[int, int | None]:
    """The most memory that one run takes beyond what is there, and on a GPU the kernels it launches."""
    gc.disable()  # what it frees during the run would be taken for memory that the run gives back
    try:
        return _observe(run, device)
    finally:
        gc.enable()


def _observe(run: Run, device: torch.device) -> tuple[int, int | None]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        peak = torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize(device)
        # The profiler's own records of the device: kernels, and memory sets, which are launched like them.
        return peak, sum(event.device_type is DeviceType.CUDA for event in profiler.events())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # Every allocation of PyTorch's allocator, those inside of operators too.
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, None
