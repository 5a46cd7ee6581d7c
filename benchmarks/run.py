"""Every benchmark on one device, as data.

    python benchmarks/run.py                        # all suites, into benchmarks/results/<device>/
    python benchmarks/run.py --suite update --device cuda
    python benchmarks/run.py --quick --json /tmp/results.json

Suites: pools, the pool of one query at the shapes of predicted.json; update, one update of the reward model's small
part; ops, every operator beside plain PyTorch; round, a whole training round. `python benchmarks/report.py` makes the
tables and plots of what was committed.
"""

from __future__ import annotations

import argparse
import math
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import predicted
import torch

from r2m_kernels.bench import record, slug, start
from r2m_kernels.bench.ops import MODES, Case, run_cases
from r2m_kernels.bench.results import Results, Row
from r2m_kernels.bench.update import run_updates

SUITES = ("pools", "update", "ops", "round")  # in this order

# D_p and D_rm of the paper's setups; d is 2048 in all of them.
PAPER = {"llama-3-8b": (4096, 4096), "qwen2.5-3b": (2048, 4096), "pythia-2.8b": (2560, 2560)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, action="append", help="may be repeated; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and a few runs: only shows that it works")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further case of ops after that time")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--json", type=Path, metavar="PATH", help="one file for all suites")
    where.add_argument("--output", type=Path, metavar="DIR", help="a file for each; default: benchmarks/results/DEVICE")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: PyTorch sees no GPU")
    folder = arguments.output or Path(__file__).parent / "results" / slug(device)
    first = start(device, command_of(arguments))
    print(f"{first.machine}\nbytes per second: {first.bandwidth}\n", flush=True)
    for suite in [suite for suite in SUITES if suite in (arguments.suite or SUITES)]:
        results = first if arguments.json else Results(first.command, first.machine, first.bandwidth, [])
        batches = measure_suite(suite, device, arguments.quick, max(first.bandwidth.values()), deadline)
        record(results, batches, arguments.json or folder / f"{suite}.json")


def command_of(arguments: argparse.Namespace) -> str:
    """What measures the same again; where its files go does not matter."""
    words = ["python", "benchmarks/run.py", "--device", arguments.device]
    words += [word for suite in arguments.suite or () for word in ("--suite", suite)]
    words += ["--quick"] * arguments.quick
    words += [] if math.isinf(arguments.minutes) else ["--minutes", f"{arguments.minutes:g}"]
    return shlex.join(words)


def measure_suite(
    suite: str, device: torch.device, quick: bool, best_bandwidth: float, deadline: float
) -> Iterator[list[Row]]:
    on_gpu = device.type == "cuda"
    if suite == "pools":
        seconds = 0.005 if quick else 0.2 if on_gpu else 1.0
        cases = pool_cases(quick, on_gpu)
        yield from run_cases(cases, device, best_bandwidth=best_bandwidth, seconds=seconds, deadline=deadline)
    elif suite == "ops":
        cases = quick_cases() if quick else gpu_cases() if on_gpu else cpu_cases()
        seconds = 0.005 if quick else 0.25 if on_gpu else 1.0
        yield from run_cases(cases, device, best_bandwidth=best_bandwidth, seconds=seconds, deadline=deadline)
    elif suite == "update":
        shape = {"n": 64, "K": 8, "S": 1024, "D_p": 4096, "D_rm": 4096, "d": 2048}  # the paper's dialogue round
        if quick:
            shape = {"n": 16, "K": 4, "S": 64, "D_p": 256, "D_rm": 192, "d": 128}
        elif not on_gpu:
            shape["n"] = 16  # a quarter of it: plain PyTorch takes two minutes for the whole
        seconds = 0.005 if quick else 2.0
        yield from run_updates(shape, device, best_bandwidth=best_bandwidth, seconds=seconds)
    else:
        from round import measure_round

        for shape in ["tiny"] if quick else ["demo", "0.5b", "3b"]:
            for feedback in ("none", "trained"):
                yield [measure_round(shape, feedback, device=device, rounds=2 if quick else 3)]


def reward_shape(name: str, batch: int, length: int, heads: int = 1) -> dict[str, int]:
    d_p, d_rm = PAPER[name]
    return {"B": batch, "S": length, "D_p": d_p, "D_rm": d_rm, "d": 2048, "heads": heads}


def pool_shape(shape: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in shape.items() if name in ("B", "S", "D_p")}


def both(name: str, shape: dict[str, int], **options: object) -> list[Case]:
    """Whole reward and the pool alone."""
    return [
        Case("policy_feedback_reward", name, shape, **options),
        Case("attention_pool", name, pool_shape(shape), **options),
    ]


def sweep(name: str, shapes: list[dict[str, int]]) -> list[Case]:
    return [Case("policy_feedback_reward", name, shape, modes=("forward+backward",)) for shape in shapes]


def small_ops(batches: list[int], groups: list[int], sizes: list[int]) -> list[Case]:
    """Fusion over batches of D_rm = 4096, GREBT over numbers of groups n and their sizes K."""
    fusion = [
        Case(op, "D_rm 4096", {"B": batch, "D_rm": 4096}, modes=MODES[1:], compiled=batch == batches[-1])
        for op in ("time_weighted_fusion", "fused_reward")
        for batch in batches
    ]
    grebt = [
        Case(
            "grebt_loss",
            f"K = {k}",
            {"n": n, "K": k},
            torch.float32,
            MODES[1:],
            compiled=(n, k) == (groups[-1], 8),
        )
        for k in sizes
        for n in groups
    ]
    return fusion + grebt


def shared_prefix(n: int, width: int, name: str) -> Case:
    shape = {"n": n, "K": 8, "S_prompt": 512, "S_response": 512, "D_p": width}
    return Case("shared_prefix", name, shape, modes=("forward+backward",))


def pool_cases(quick: bool, on_gpu: bool) -> list[Case]:
    """The shapes of the predictions, wherever they can be compared with them; else the first ones, at B=16."""
    predictions = predicted.load()
    shapes = predictions["shapes"] if on_gpu else [[16, 1024]]
    widths = list(dict.fromkeys(row["D_p"] for row in predictions["rows"]))
    if quick:
        shapes, widths = [[2, 40]], [64]
    sizes = [{"B": batch, "S": length, "D_p": width} for batch, length in shapes for width in widths]
    return [Case("attention_pool", "predicted", size) for size in sizes]


def gpu_cases() -> list[Case]:
    base = reward_shape("llama-3-8b", 64, 1024)
    return [
        *both("llama-3-8b", reward_shape("llama-3-8b", 512, 1024), compiled=True),
        *sweep("over S", [base | {"S": 2**i} for i in range(7, 16)]),
        *both("llama-3-8b", base),
        *small_ops([64, 512, 8192], [64, 2048, 8192], [4, 8, 16, 64]),
        shared_prefix(64, 4096, "llama-3-8b"),
        *both("llama-3-8b, ragged", base, lengths="ragged"),
        *both("llama-3-8b, packed", base, lengths="packed"),
        *(Case("policy_feedback_reward", f"llama-3-8b, {heads} heads", base | {"heads": heads}) for heads in (8, 32)),
        *sweep("over B", [base | {"B": 2**i} for i in range(10)]),
        *sweep("over D", [base | {"D_p": d} for d in (576, 896, 1024, 1536, 2048, 3072, 4096, 5120, 8192)]),
        *(
            case
            for name in ("qwen2.5-3b", "pythia-2.8b")
            for n in (512, 64)
            for case in both(name, reward_shape(name, n, 1024))
        ),
        *both("llama-3-8b", base, dtype=torch.float16),
        *both("llama-3-8b", base, dtype=torch.float32),
    ]


def cpu_cases() -> list[Case]:
    base = reward_shape("qwen2.5-3b", 16, 1024)
    small = base | {"B": 4}
    return [
        *both("qwen2.5-3b", base, compiled=True),
        *both("qwen2.5-3b", base, dtype=torch.float32),
        *sweep("over S", [small | {"S": 2**i} for i in range(7, 14)]),
        *small_ops([64, 512, 8192], [64, 2048, 8192], [4, 8, 16, 64]),
        shared_prefix(4, 2048, "qwen2.5-3b"),
        *both("qwen2.5-3b, ragged", base, lengths="ragged"),
        *both("qwen2.5-3b, packed", base, lengths="packed"),
        *(
            Case("policy_feedback_reward", f"qwen2.5-3b, {heads} heads", base | {"heads": heads}, modes=MODES[::2])
            for heads in (8, 32)
        ),
        *sweep("over B", [base | {"B": 2**i} for i in range(7)]),
        *sweep("over D", [small | {"D_p": d} for d in (576, 896, 1024, 2048, 4096, 8192)]),
        *both("llama-3-8b", reward_shape("llama-3-8b", 16, 1024)),
        *both("pythia-2.8b", reward_shape("pythia-2.8b", 16, 1024)),
    ]


def quick_cases() -> list[Case]:
    """Each operator, each way to give lengths, several heads, a sweep."""
    shape = {"B": 6, "S": 40, "D_p": 64, "D_rm": 48, "d": 32, "heads": 1}
    return [
        *both("tiny", shape),
        *both("tiny, ragged", shape, lengths="ragged"),
        *both("tiny, packed", shape, lengths="packed"),
        Case("policy_feedback_reward", "tiny, 4 heads", shape | {"heads": 4}, torch.float32),
        *(sweep("over S", [shape | {"S": 16}, shape | {"S": 32}])),
        Case("shared_prefix", "tiny", {"n": 2, "K": 4, "S_prompt": 8, "S_response": 5, "D_p": 64}, modes=MODES[2:]),
        *(Case(op, "tiny", {"B": 8, "D_rm": 48}, modes=MODES[1:]) for op in ("time_weighted_fusion", "fused_reward")),
        Case("grebt_loss", "tiny", {"n": 4, "K": 4}, torch.float32, MODES[1:], compiled=True),
    ]


if __name__ == "__main__":
    main()
