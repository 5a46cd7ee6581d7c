"""Counts what a streaming loop issues for every byte of `hidden`, and which share of a GPU's bandwidth that allows.

    python tests/offline/bandwidth.py [--write]

Needs no GPU: it reads the machine code of the pool's kernel for one query in bfloat16, compiled for sm_90. Prints a row
for each form, width and layout. Exits with 1 if a share is more than 3 points below the one in bandwidth.json, which
--write replaces. The share is a bound: latency, launches and the merge are not in it.

A multiprocessor of sm_90 has four schedulers. Each issues one instruction of a warp a cycle; arithmetic in float32 runs
at that rate, integer and logic instructions at half of it. All four share a pipe to shared memory of 128 bytes a cycle,
which shuffles, loads, stores and asynchronous copies take. H100 and H200 have 132 of them at 1.85 GHz; 3.0 and 4.2 TB/s
of their memory can be reached (nominal: 3.35 and 4.8). Forward branches in the loop are taken: they skip the rare block
that has a new largest score.
"""

import argparse
import json
import multiprocessing
import re
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import compiling
import gate

MULTIPROCESSORS, GIGAHERTZ, SCHEDULERS, SHARED_BYTES = 132, 1.85, 4, 128
BANDWIDTH = {"H100": 3000, "H200": 4200}  # bytes a nanosecond
REGISTERS, SHARED, THREADS = 65536, 228 << 10, 2048  # of a multiprocessor
HALF_RATE = {"LOP3", "SHF", "PRMT", "IADD3", "VIADD", "LEA", "ISETP", "FSETP", "FSEL", "SEL", "FMNMX"}
HALF_RATE |= {"PLOP3", "IMNMX", "VIMNMX", "IMAD", "MOV", "R2UR"}
WIDTHS = (896, 1536, 2048, 2560, 3584, 4096, 5120, 7168, 8192)
FORMS, LAYOUTS = ("dot", "pool", "with_gradient"), ("dense", "masked")
COMMITTED = Path(__file__).with_suffix(".json")
TOLERANCE = 3  # points


class Loop(NamedTuple):
    """Of a tile, and a warp where nothing else is said."""

    instructions: int
    half_rate: int
    shared: int  # bytes that the pipe moves
    tile: int  # bytes of hidden
    warps: int
    registers: int
    blocks: int  # at a time on a multiprocessor
    in_flight: int  # bytes, of all blocks


def loop_of(case: gate.Case) -> Loop:
    launch = next(launch for launch in gate.launches("sm_90", case) if launch.name == "rows_kernel")
    compiled = compiling.compile(launch)
    facts = compiling.inspect(compiled, disassemble=False)
    body = streaming_loop(compiling.disassembled(compiled))
    warps, sizes = launch.options.num_warps, launch.configuration
    tile = sizes["BS"] * case.width * case.dtype.itemsize
    allocated = -(-facts.registers // 8) * 8 * 32 * warps
    blocks = min(REGISTERS // allocated, SHARED // (facts.shared + compiling.RESERVED_SHARED), THREADS // (32 * warps))
    half = sum(name.split(".")[0] in HALF_RATE for name in body)
    in_flight = blocks * tile * (sizes["STAGES"] - 1)
    return Loop(len(body), half, sum(map(_shared, body)), tile, warps, facts.registers, blocks, in_flight)


def streaming_loop(listing: str) -> list[str]:
    """The instructions of an iteration of the innermost loop that copies from global to shared memory."""
    code: list[tuple[str, str | None, bool]] = []  # instruction, where it may branch, whether it has a predicate
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if found := re.match(r"(\.L_\w+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;&?]*)", line):
            target = re.search(r"`\((\.L_\w+)\)", found[3]) if found[2].startswith("BRA") else None
            code.append((found[2], target and target[1], bool(found[1])))
    loops = [(labels[target], end) for end, (_, target, _) in enumerate(code) if target and labels[target] <= end]
    loops = [(a, b) for a, b in loops if any(name.startswith("LDGSTS") for name, _, _ in code[a:b])]
    start, end = min(loops, key=lambda ends: ends[1] - ends[0])
    body, at = [], start
    while at <= end:
        name, target, conditional = code[at]
        body.append(name)
        at = labels[target] if target and conditional and at < labels[target] <= end else at + 1
    return body


def _shared(name: str) -> int:
    """Bytes that an instruction of a warp moves through the pipe to shared memory."""
    kind, *modifiers = name.split(".")
    if kind == "SHFL":
        return 128
    if kind in ("LDS", "STS", "LDGSTS"):
        return next((4 * int(m) for m in modifiers if m in ("64", "128")), 128)
    return 0


def share(loop: Loop, gpu: str) -> float:
    """The percentage of the GPU's bandwidth at which the busiest of the three would be busy throughout."""
    each = loop.warps / SCHEDULERS
    cycles = max(loop.instructions * each, 2 * loop.half_rate * each, loop.shared * loop.warps / SHARED_BYTES)
    return 100 * MULTIPROCESSORS * GIGAHERTZ * loop.tile / cycles / BANDWIDTH[gpu]


CASES = [gate.Case(form, width=width, layout=layout) for form, width, layout in product(FORMS, WIDTHS, LAYOUTS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the committed shares")
    arguments = parser.parse_args()
    with multiprocessing.get_context("fork").Pool(gate.WORKERS) as workers:
        loops = workers.map(loop_of, CASES, chunksize=1)
    shares = {
        f"{case.form} {case.width} {case.layout}": {gpu: round(share(loop, gpu)) for gpu in BANDWIDTH}
        for case, loop in zip(CASES, loops, strict=True)
    }
    if arguments.write:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in shares.items())
        COMMITTED.write_text(f"{{\n{lines}\n}}\n")
    rows = [["kernel", *BANDWIDTH, "instructions/KB", "shared B/B", "warps", "registers", "blocks", "KB in flight"]]
    for (name, found), loop in zip(shares.items(), loops, strict=True):
        kilobyte = loop.warps * 1024 / loop.tile
        counted = [f"{loop.instructions * kilobyte:.0f}", f"{loop.shared * loop.warps / loop.tile:.2f}"]
        places = [loop.warps, loop.registers, loop.blocks, round(loop.in_flight / 1024)]
        rows.append([name, *(f"{percent} %" for percent in found.values()), *counted, *map(str, places)])
    print(gate.table(rows))
    problems = fallen(shares, committed())
    print(f"\n{len(shares)} rows, {len(problems)} problems", *problems, sep="\n")
    return int(bool(problems))


def committed() -> dict[str, dict[str, int]]:
    return json.loads(COMMITTED.read_text())


def fallen(shares: dict[str, dict[str, int]], before: dict[str, dict[str, int]]) -> list[str]:
    """What is worse than it was, or compared with nothing."""
    found = [f"{name}: not in {COMMITTED.name}; run with --write" for name in shares if name not in before]
    found += [f"{name}: compiled no more; run with --write" for name in before if name not in shares]
    for name in shares.keys() & before.keys():
        for gpu, percent in shares[name].items():
            if percent < before[name][gpu] - TOLERANCE:
                found.append(f"{name}: {percent} % of the bandwidth of an {gpu}, {before[name][gpu]} % before")
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
