"""Prints what the benchmarks of a run measured, side by side."""

import statistics

import pytest
import torch

rows: pytest.StashKey[list[tuple[str, ...]]] = pytest.StashKey()


@pytest.fixture
def take_turns(request, benchmark):
    """measure(providers, bytes_read): times functions in turn, the first through pytest-benchmark.

    In turn, so that all of them meet the same machine. Prints for each the median, how many times as long as the first
    it took, and with `bytes_read` the bandwidth.
    """

    def measure(providers, bytes_read=None, rounds=15):
        (first, run_first), *others = providers.items()
        seconds = {name: [] for name in providers}

        def run_others():
            for name, run in others:
                start = benchmark._timer()
                run()
                seconds[name].append(benchmark._timer() - start)

        benchmark.pedantic(run_first, setup=run_others, rounds=rounds, warmup_rounds=2)
        medians = {first: benchmark.stats.stats.median}
        medians |= {name: statistics.median(seconds[name][2:]) for name, _ in others}
        benchmark.extra_info["median seconds"] = medians
        table = request.config.stash.setdefault(rows, [])
        for name, median in medians.items():
            bandwidth = "" if bytes_read is None else f"{bytes_read / median / 1e9:.1f}"
            case = request.node.callspec.id if name == first else ""
            operator = request.node.originalname.removeprefix("test_") if name == first else ""
            table.append((operator, case, name, f"{1e3 * median:.3f}", f"{median / medians[first]:.2f}", bandwidth))

    return measure


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash.get(rows, [])
    if table:
        head = ("operator", "dtype", "what", "median ms", "ratio", "GB/s")
        widths = [max(len(row[i]) for row in [head, *table]) for i in range(len(head))]
        terminalreporter.write_line(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}")
        for row in [head, *table]:
            cells = [
                text.rjust(width) if i > 2 else text.ljust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            terminalreporter.write_line("  ".join(cells))
