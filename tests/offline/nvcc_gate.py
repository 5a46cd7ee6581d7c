"""Compiles every CUDA C++ kernel for every GPU, with the commands of build.py, and judges what ptxas says of it.

    python tests/offline/nvcc_gate.py [--kernel rows] [--full]

Needs nvcc and no GPU. Prints a row per GPU and kernel, and last the problems: a kernel that spills or has a stack
frame, a file without kernels, a symbol that nothing supplies when the library is loaded; exits with 1 if there are any.
TORCH_CUDA_ARCH_LIST="9.0a" takes fewer GPUs, MAX_JOBS says how many compilers run at a time. Where record.py knows
these sources as judged, it compiles them for one GPU, without --full.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import record
import torch

from r2m_kernels import build

TORCH_C_API = build.TORCH / "include" / "torch" / "csrc"


SAMPLE = "9.0a"


class Kernel(NamedTuple):
    """What ptxas says of a kernel, or of a function that was not inlined: that has no registers of its own."""

    target: str
    name: str
    registers: int | None
    shared: int  # bytes, without what a launch asks for
    stack: int
    spill_stores: int
    spill_loads: int


def parse(text: str) -> list[Kernel]:
    """The kernels and functions in the output of `ptxas -v`, by their mangled names."""
    found: dict[tuple[str, str], Kernel] = {}
    target, key = "?", ("?", "?")
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            target = match[2]
        elif match := re.search(r"Function properties for (\S+)", line):
            key = target, match[1]
            found[key] = Kernel(*key, None, 0, 0, 0, 0)
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            found[key] = found[key]._replace(stack=stack, spill_stores=stores, spill_loads=loads)
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[key] = found[key]._replace(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return list(found.values())


def problems(kernel: Kernel) -> list[str]:
    wrong = []
    if kernel.spill_stores or kernel.spill_loads:
        wrong.append(f"spills, {kernel.spill_stores} bytes of stores and {kernel.spill_loads} of loads")
    if kernel.stack:
        wrong.append(f"has a stack frame of {kernel.stack} bytes")
    return wrong


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """Names as in the source: template arguments, but neither arguments nor r2m's namespaces."""
    names = list(mangled)
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: _short(line) for name, line in zip(names, lines.splitlines(), strict=True)}


def _short(name: str) -> str:
    name = re.sub(r"^void |\(anonymous namespace\)::|r2m::", "", name)
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def unknown_symbols(library: Path) -> list[str]:
    """Symbols that a library needs and nobody has promised to supply: not the C library, not C++'s, not torch's C API.

    So nothing of torch's C++ libraries, which change from version to version. libtorch_cuda need not be there: its part
    of the C API is declared in the same headers.
    """
    headers = [h for part in ("inductor/aoti_torch/c", "stable/c") for h in (TORCH_C_API / part).glob("*.h")]
    declared = set(re.findall(r"\b\w*torch_\w+", "\n".join(h.read_text() for h in headers)))
    lines = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    wrong = []
    for line in lines.splitlines():
        kind, name = line.split()[-2:]
        base, _, version = name.partition("@")
        system = re.match(r"@?(GLIBC|GLIBCXX|CXXABI|GCC)_", version)
        standard = re.match(r"_Z(T[ISTV])?(N[KRO]*)?S[abdiost]", base)  # std::, which torch's libraries have as well
        if not (kind in "wv" or system or standard or base in declared):
            wrong.append(base)
    return wrong


def gate(
    csrc: Path | None = None, kernel: str = "", architectures: Sequence[str] | None = None
) -> tuple[list[list[str]], list[str]]:
    """The rows of the table, and the problems. architectures: None: build.py's."""
    architectures = architectures or build.cuda_architectures()
    # A recipe per GPU, all of which can run at a time; host code, the same in each, is linked from the first.
    recipes = [
        build.recipe_for("cuda", csrc, extra_flags=["-Xptxas=-v"], architectures=[name]) for name in architectures
    ]
    steps = [(i, step) for i, recipe in enumerate(recipes) for step in recipe.compiling if i == 0 or _is_cuda(step)]
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as temporary:

        def run(folder: str, step: build.Step) -> str:
            output = Path(temporary, folder, step.output)
            output.parent.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(step.command, cwd=Path(temporary, folder), capture_output=True, text=True)
            if done.returncode != 0:
                wrong.append(f"{step.output} could not be made:\n{done.stdout}{done.stderr}")
            return done.stdout + done.stderr

        with ThreadPoolExecutor(build.jobs(build.MEMORY["cuda"])) as workers:
            outputs = list(workers.map(lambda item: run(str(item[0]), item[1]), steps))
        if wrong:
            return rows, wrong
        for step in recipes[0].linking:
            run("0", step)
        if not wrong:
            library = Path(temporary, "0", recipes[0].linking[-1].output)
            unknown = short_names(unknown_symbols(library)).values()
            wrong += [f"{library.name} needs {name}, which nothing supplies" for name in unknown]

    for (i, step), output in zip(steps, outputs, strict=True):
        if _is_cuda(step):
            kernels = parse(output)
            if not any(k.registers for k in kernels):
                wrong.append(f"{step.output}: no kernel for {architectures[i]}")
            names = short_names(k.name for k in kernels)
            for k in kernels:
                if kernel in names[k.name]:
                    bad = [f"{k.target} {names[k.name]} {text}" for text in problems(k)]
                    rows.append(_row(k, names[k.name], "BAD" if bad else "ok"))
                    wrong += bad
    return sorted(rows), wrong


def _is_cuda(step: build.Step) -> bool:
    return step.output.endswith(".cu.o")


HEAD = ["target", "kernel", "registers", "shared B", "stack B", "spill stores B", "spill loads B", "verdict"]


def _row(kernel: Kernel, name: str, verdict: str) -> list[str]:
    return [kernel.target, name, *("-" if fact is None else str(fact) for fact in kernel[2:]), verdict]


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--full", action="store_true", help="compile for all GPUs, on record or not")
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        nvcc = build.find_nvcc()
    except build.BuildError as error:
        print(f"the CUDA kernels were not compiled: {error}")
        return 0
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [*(record.ROOT / "csrc").rglob("*"), Path(build.__file__), Path(__file__)]
    found = record.fingerprint(sources, f"{version} torch {torch.__version__} {build.cuda_architectures()}")
    is_whole = not arguments.kernel
    samples = is_whole and not arguments.full and record.is_judged("nvcc", found)
    try:
        rows, wrong = gate(kernel=arguments.kernel, architectures=[SAMPLE] if samples else None)
    except build.BuildError as error:
        print(f"error: {error}")
        return 1
    print(table([HEAD, *rows]))
    of = f" for {SAMPLE} alone (all are on record as judged; --full compiles them)" if samples else ""
    print(f"\n{len(rows)} rows{of}, {len(wrong)} problems, {time.monotonic() - start:.0f} s", *wrong, sep="\n")
    if is_whole and not samples and not wrong:
        record.write("nvcc", found)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
