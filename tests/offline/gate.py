"""Compiles every shipped configuration of the Triton kernels for every architecture and judges the machine code.

    python tests/offline/gate.py [--target sm_90] [--kernel rows] [--all] [--full]

Needs no GPU. Prints a row per target, kernel and configuration, and last the problems; exits with 1 if there are any.
The first run takes minutes; Triton keeps what it compiled. Where record.py knows these sources as judged, it compiles
a sample of the configurations, without --full.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import compiling
import record
import torch
import triton
from compiling import Facts, Launch
from torch import Tensor

from r2m_kernels.attention_pool import triton_impl as pool
from r2m_kernels.fusion import triton_impl as fusion
from r2m_kernels.grebt import triton_impl as grebt

WORKERS = 2
SAMPLE = 16  # one configuration in so many
STREAMED = "hidden"  # a kernel with an argument of this name reads its rows in a loop
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# GPUs that run the machine code of another: where they are launched in the same way, it is compiled once.
SAME_CODE = {"sm_86": "sm_80", "sm_89": "sm_80"}


class Case(NamedTuple):
    """A call of a launcher."""

    form: str
    dtype: torch.dtype = torch.bfloat16
    width: int = 4096  # D; K for GREBT
    heads: int = 1
    layout: str = "dense"  # or packed, masked
    batch: int = 8
    length: int = 4096

    def __str__(self) -> str:
        size = "" if (self.batch, self.length) == (8, 4096) else f" {self.batch}x{self.length}"
        return f"{self.form} {SHORT[self.dtype]} {self.width} H={self.heads} {self.layout}{size}"


class Work(NamedTuple):
    """What a row of the table is about: a launch, and the cases that make it."""

    target: str
    launch: Launch
    cases: list[Case]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _pool(case: Case, form: str) -> Any:
    B, S, H, D = case.batch, case.length, case.heads, case.width
    query = _empty(B, H, D)
    shared = _empty(H, D).expand(B, H, D)  # direction, one for all sequences
    hidden = _empty(B * S, D, dtype=case.dtype) if case.layout == "packed" else _empty(B, S, D, dtype=case.dtype)
    sequences = (
        _empty(B + 1, dtype=torch.int32) if case.layout == "packed" else None,
        _empty(B, S, dtype=torch.bool) if case.layout == "masked" else None,
    )
    match form:
        case "pool":
            return pool.pool(query, hidden, None, *sequences)
        case "dot":
            return pool.pool(query, hidden, shared, *sequences, vectors=False)
        case "with_gradient":
            return pool.pool(query, hidden, shared, *sequences)
        case "backward":
            grad_pooled, grad_lse = _empty(B, H, D), _empty(B, H)
            *_, kept = pool.pool(query, hidden, grad_pooled, *sequences, keep=True)
            return pool.grad_hidden(query, hidden, grad_pooled, *sequences, grad_lse, kept)


def _fused(case: Case, form: str) -> Any:
    B, D = case.batch, case.width
    rows = _empty(B, D, dtype=case.dtype), _empty(B, D, dtype=case.dtype)
    weight, head, bias = _empty(), _empty(D, dtype=case.dtype), _empty(dtype=case.dtype)
    match form:
        case "fusion":
            return fusion.time_weighted_fusion(*rows, weight)
        case "fusion_backward":
            return fusion.time_weighted_fusion_backward(rows[0], weight, case.dtype, case.dtype)
        case "reward":
            return fusion.fused_reward(*rows, weight, head, bias)
        case "reward_backward":
            return fusion.fused_reward_backward(_empty(B), *rows, weight, head, bias, True, True)


def _grebt(case: Case, form: str) -> Any:
    rewards = _empty(case.batch, case.width, dtype=case.dtype)
    return grebt.grebt_loss(rewards, rewards, 0.3, 1e-4, 1.0 / case.batch)


FORMS: dict[str, Callable[[Case, str], Any]] = {
    **dict.fromkeys(("pool", "dot", "with_gradient", "backward"), _pool),
    **dict.fromkeys(("fusion", "fusion_backward", "reward", "reward_backward"), _fused),
    "grebt": _grebt,
}
POOLS = [form for form, call in FORMS.items() if call is _pool]
FUSIONS = [form for form, call in FORMS.items() if call is _fused]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# On every target: each way in which the launchers choose.
CASES = [
    *(Case(f, BF16, D) for f, D in product(POOLS, (1024, 2048, 4096, 8192))),
    *(Case(f, FP32, D) for f, D in product(POOLS, (1024, 4096, 8192))),
    *(Case(f, BF16, 4096, 1, layout) for f, layout in product(POOLS, ("packed", "masked"))),
    *(Case(f, BF16, 1024, H) for f, H in product(POOLS, (2, 4))),
    *(Case(f, BF16, 4096, H) for f, H in product(POOLS, (2, 4, 8, 32))),
    *(Case(f, FP32, 4096, H) for f, H in product(POOLS, (8, 32))),
    *(Case(f, BF16, D) for f, D in product(FUSIONS, (1000, 4096))),
    *(Case("grebt", FP32, K) for K in (2, 4, 8, 16, 64, 1024)),
]
# And on one: what differs from these in the width of a row or the dtype, but not in the choice.
MORE_ON = "sm_90"
MORE_CASES = [
    *(Case(f, BF16, D) for f, D in product(POOLS, (896, 2560, 3584, 5120))),
    *(Case(f, BF16, D) for f, D in product(POOLS, (1000, 4104))),  # multiples of 16 bytes, not of 16 numbers
    *(Case(f, BF16, 4096, 32, layout) for f, layout in product(POOLS, ("packed", "masked"))),
    *(Case(f, FP16, D) for f, D in product(POOLS, (1024, 4096, 8192))),
    *(Case(f, BF16, 896, 1, layout) for f, layout in product(POOLS, ("packed", "masked"))),
    *(Case(f, BF16, 1024, H) for f, H in product(POOLS, (8, 32))),
    *(Case(f, FP16, 4096, H) for f, H in product(POOLS, (8, 32))),
    *(Case(f, BF16, 4096, H, batch=1, length=1 << 20) for f, H in product(POOLS, (1, 32))),  # strides beyond 32 bits
    *(Case(f, t, D) for f, t, D in product(FUSIONS, (FP16, FP32), (1000, 4096))),
    *(Case("grebt", t, K) for t, K in product((BF16, FP16), (8, 64))),
]
# None of these may compile anything that the case with the usual lengths did not.
LENGTHS = [(1, 4096), (3, 37), (16, 1000), (8, 1), (5, 4099)]


def launches(target: str, case: Case) -> list[Launch]:
    return compiling.launches(compiling.TARGETS[target], lambda: FORMS[case.form](case, case.form))


def plan(targets: Iterable[str], kernel: str) -> list[Work]:
    """Every different launch on every target, with the cases that make it."""
    work: dict[tuple[str, str], Work] = {}
    for target in targets:
        for case in CASES + MORE_CASES * (target == MORE_ON):
            for launch in launches(target, case):
                if kernel in launch.name:
                    work.setdefault((target, launch.key), Work(target, launch, [])).cases.append(case)
    return list(work.values())


def recompiled(target: str) -> list[str]:
    """The cases in which other sequence lengths or batch sizes compile a kernel anew."""
    found = []
    for form, layout, H in product(POOLS, ("dense", "packed", "masked"), (1, 32)):
        case = Case(form, heads=H, layout=layout, width=1024, length=1 << 15)  # enough for every launch
        known = {launch.key for launch in launches(target, case)}
        for batch, length in LENGTHS:
            other = case._replace(batch=batch, length=length)
            new = sorted({launch.name for launch in launches(target, other) if launch.key not in known})
            found += [f"{target} {other}: compiles {', '.join(new)} anew for this size"] if new else []
    return found


def streams(work: Work) -> frozenset[str]:
    """The places that load `hidden`, if the kernel takes it and its rows are multiples of 16 bytes."""
    case = work.cases[0]
    if STREAMED not in work.launch.signature or case.width * case.dtype.itemsize % 16:
        return frozenset()
    return compiling.places(work.launch.kernel, STREAMED)


def examine(launch: Launch) -> Facts | str:
    """The facts, or why it does not compile."""
    try:
        return compiling.inspect(compiling.compile(launch), disassemble=STREAMED in launch.signature)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:500]}"


def gate(
    targets: Iterable[str], kernel: str = "", share: bool = True, one_in: int = 1
) -> tuple[list[list[str]], list[str]]:
    """The rows of the table, and the problems; of one configuration in `one_in`."""
    todo = plan(targets, kernel)[::one_in]
    # To be compiled: each launch once, for GPUs with the same code the first one's.
    code: dict[tuple[str, str], Launch] = {}
    source: list[tuple[str, str]] = []
    for work in todo:
        target = SAME_CODE.get(work.target, work.target) if share else work.target
        source.append((target, work.launch.key))
        code.setdefault(source[-1], work.launch)
    global _launches
    _launches = list(code.values())
    with multiprocessing.get_context("fork").Pool(WORKERS) as workers:  # a forked worker has kernels and launches
        examined = workers.map(_examine_one, range(len(_launches)), chunksize=1)
    facts = dict(zip(code, examined, strict=True))
    rows, problems = [], []
    for work, key in zip(todo, source, strict=True):
        fact = facts[key]
        wrong = [fact] if isinstance(fact, str) else compiling.problems(fact, work.target, streams(work))
        rows.append(_row(work, fact, "ok" if not wrong else "BAD"))
        problems += [f"{work.target} {work.launch.name} ({work.cases[0]}): {text}" for text in wrong]
    return rows, problems


_launches: list[Launch] = []


def _examine_one(index: int) -> Facts | str:
    return examine(_launches[index])


HEAD = ["target", "kernel", "case", "more", "constants", "warps", "stages", "registers", "shared KB", "spill B"]
HEAD += ["loads in loops", "verdict"]


def _row(work: Work, facts: Facts | str, verdict: str) -> list[str]:
    launch, (case, *more) = work.launch, work.cases
    constants = " ".join(f"{k}={v}" for k, v in launch.configuration.items() if k not in ("H", "D"))
    options = [launch.options.num_warps, launch.configuration.get("STAGES", launch.options.num_stages)]
    known = ["-"] * 4
    if isinstance(facts, Facts):
        loads = compiling.show(load for load in facts.loads if load.in_loop)
        known = [facts.registers, f"{facts.shared / 1024:.1f}", facts.stack, loads]
    row = [work.target, launch.name, case, f"+{len(more)}" if more else "", constants, *options, *known, verdict]
    return [str(cell) for cell in row]


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=compiling.TARGETS, help="default: all; may be repeated")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--all", action="store_true", help="compile for sm_86 and sm_89 even what is equal to sm_80")
    parser.add_argument("--full", action="store_true", help="compile all, on record or not")
    arguments = parser.parse_args()
    targets = arguments.target or list(compiling.TARGETS)
    sources = [*(record.ROOT / "r2m_kernels").rglob("*.py"), *map(Path, (__file__, compiling.__file__))]
    found = record.fingerprint(sources, f"triton {triton.__version__}")
    is_whole = not (arguments.target or arguments.kernel)
    samples = is_whole and not arguments.full and record.is_judged("triton", found)
    rows, problems = gate(targets, arguments.kernel, share=not arguments.all, one_in=SAMPLE if samples else 1)
    problems += recompiled(targets[0])
    print(table([HEAD, *rows]))
    of = f", one in {SAMPLE} (all are on record as judged; --full compiles them)" if samples else ""
    print(f"\n{len(rows)} rows{of}, {len(problems)} problems", *problems, sep="\n")
    if is_whole and not samples and not problems:
        record.write("triton", found)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
