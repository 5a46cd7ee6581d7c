"""Runs the operators' tests on the compiled extension, in all its forms:

    python tests/offline/builds.py cpu          C++ as users get it, with every instruction set that this CPU has
    python tests/offline/builds.py sanitized    C++ under AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/offline/builds.py emulated     CUDA C++ on CPU tensors, as a GPU of sm_80 and one of sm_90 would run it

Further arguments are for pytest. Where there is no C++ compiler it says so and does nothing.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from emulation.build import build as build_emulated

from r2m_kernels.build import BuildError, build, find_cxx

ROOT = Path(__file__).parents[2]
OPERATORS = ("tests/kernels",)
NOT_COMPILED = (*OPERATORS, "--ignore", "tests/kernels/test_compile.py")  # torch.compile sees no kernel
# What depends on instruction sets, and on architectures of GPUs.
VARIES = ("tests/kernels/test_attention_pool.py", "tests/kernels/test_pool_fuzz.py", "tests/kernels/test_fusion.py")
# Slower CPUs, for PyTorch and its matrix products alike: with more lanes it would round less than the kernels may.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
BASELINE = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]


def sanitizer_environment() -> dict[str, str]:
    """What a Python that was not built for AddressSanitizer needs to load a library that was."""
    names = ("libasan.so", "libstdc++.so")  # the second, or exceptions do not find their way
    found = [subprocess.check_output([find_cxx(), f"-print-file-name={name}"], text=True).strip() for name in names]
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}  # what Python never frees


def run_pytest(
    arguments: list[str],
    paths: tuple[str, ...],
    library: Path | None = None,
    impl: str = "extension",
    **environment: str,
) -> None:
    command = [sys.executable, "-m", "pytest", "-q", *paths, "--impl", impl, *arguments]
    command += [] if library is None else ["--library", str(library)]
    print(" ".join(f"{name}={value}" for name, value in environment.items()), *command[2:], flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}).returncode
    if status != 0:
        raise SystemExit(status)


def main(form: str, *arguments: str) -> None:
    try:
        find_cxx()
    except BuildError as error:
        print(f"skipped: {error}")
        return
    given = list(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if form == "cpu":
            build(["cpu"])
            run_pytest(given, OPERATORS)
            for environment in (AVX2, BASELINE):
                run_pytest(given, VARIES, **environment)
        elif form == "sanitized":
            library = build(["cpu"], folder=folder, extra_flags=SANITIZE)["cpu"]
            run_pytest(given, NOT_COMPILED, library, **sanitizer_environment())
        elif form == "emulated":
            newer = build_emulated(900, folder)
            run_pytest(given, NOT_COMPILED, newer)
            run_pytest([*given, "-k", "many_queries"], VARIES[:1], newer, R2M_EMULATE_SLICE="1")
            run_pytest(given, VARIES, build_emulated(800, folder))
        else:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["?"]))
