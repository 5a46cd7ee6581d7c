"""Compiles csrc: `python -m r2m_kernels.build [cpu] [cuda]`.

Without arguments the CPU library, and the CUDA one if nvcc and a CUDA build of torch are there. Needs torch 2.11 or
newer, ninja and a C++20 compiler, such as GCC 11 or newer or Clang 14 or newer (CXX names it; default c++ or g++); the
CUDA library needs nvcc 12.8 or newer, too (CUDA_HOME says where; default: PATH). TORCH_CUDA_ARCH_LIST names the GPUs it
is for, MAX_JOBS limits how many compilers run at a time.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from r2m_kernels import extension

TORCH_TARGET_VERSION = "0x{:02x}{:02x}000000000000ULL".format(*extension.OLDEST_TORCH)

OPTIMIZE = ["-std=c++20", "-O3"]
# Sums may be contracted to FMAs; nothing here reads errno or floating-point exceptions. The ops register themselves
# when the library is loaded, so no symbol needs to be seen from outside.
HOST = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra", "-Werror=return-type"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2, "-mprefer-vector-width=512"]
# GCC warns of its own intrinsics (its bug 105593), and Clang of that option.
AVX512 += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
# A file *_simd.cpp is compiled for each of these; which one runs is chosen at run time. From the least to the most
# demanding: objects are linked in this order, and of an inline function that several have, the linker keeps the first.
INSTRUCTION_SETS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}

DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a;10.0;12.0"
OLDEST_CAPABILITY = (8, 0)
MEMORY = {"cpu": 0.5, "cuda": 1.0}  # GiB that one compiler may need; twice what the largest files took
MEMORY_FILES = ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
TORCH = Path(torch.__file__).parent


class BuildError(RuntimeError):
    """Why nothing could be built, for the user to read."""


class Step(NamedTuple):
    """A command that makes `output`, a path relative to the folder it runs in."""

    output: str
    command: list[str]


class Recipe(NamedTuple):
    """What makes one library: `compiling` in any order, then `linking` one by one, whose last output is the library."""

    compiling: list[Step]
    linking: list[Step]
    threads: int  # what one command uses
    settings: str  # a hash of what the library depends on besides the sources
    tools: str  # to be printed


def build(
    backends: Sequence[str],
    *,
    folder: Path | None = None,
    csrc: Path | None = None,
    extra_flags: Sequence[str] = (),
) -> dict[str, Path]:
    """Compiles the libraries of `backends` ("cpu", "cuda") that are not built yet; returns where each one is.

    `folder` is where they go, by default the user's cache. `extra_flags` are for the backend's compiler, c++ (when it
    links, too) or nvcc; a library made with them, say for a sanitizer, is returned but never loaded by r2m_kernels.
    Raises BuildError.
    """
    built = {backend: _build(backend, folder, csrc or extension.CSRC, extra_flags) for backend in backends}
    extension.reason.cache_clear()
    return built


def _build(backend: str, folder: Path | None, csrc: Path, extra_flags: Sequence[str]) -> Path:
    if backend not in extension.DEVICE_TYPES:
        raise ValueError(f"backends: expected names from {list(extension.DEVICE_TYPES)}, got {backend!r}")
    if sys.platform != "linux":
        raise BuildError(f"the extension is built on Linux only, and this is {sys.platform!r}")
    too_old = extension.torch_too_old()
    if too_old is not None:
        raise BuildError(f"the extension {too_old} (pip install -U torch)")
    parallel = jobs(MEMORY[backend])
    recipe = recipe_for(backend, csrc, extra_flags, parallel)
    key = extension.sources_key(backend, csrc)
    name = f"{'extra-' if extra_flags else ''}{backend}-{key}-{recipe.settings}.so"
    found = extension.find(backend)
    if folder is None and found is not None and found.name == name:
        print(f"{backend}: already built, {found}", flush=True)
        return found
    folder = (folder or extension.cache()).absolute()
    target = folder / name
    with _lock(folder):
        if target.exists():
            target.touch()  # of several, the last one asked for is taken
            print(f"{backend}: already built, {target}", flush=True)
            return target
        for left in folder.glob(".building-*"):  # by a build that was killed: nobody else is at work here
            shutil.rmtree(left, ignore_errors=True)
        start = time.monotonic()
        print(f"{backend}: {recipe.tools}, {parallel} at a time", flush=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as temporary:
            _run_ninja(backend, recipe, Path(temporary), max(1, parallel // recipe.threads))
            if extension.sources_key(backend, csrc) != key:
                raise BuildError(f"{backend}: {csrc} changed while it was compiled; build it again")
            os.replace(Path(temporary, recipe.linking[-1].output), target)
        print(f"{backend}: built in {time.monotonic() - start:.0f} s, {target}", flush=True)
    return target


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds the folder for one process; the system lets go when it ends, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build in {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_ninja(backend: str, recipe: Recipe, folder: Path, parallel: int) -> None:
    ninja = find_ninja()
    lines = ["rule run", "  command = $run", "  description = $out"]
    before: list[str] = []
    for step in recipe.compiling:
        lines += [f"build {step.output}: run", f"  run = {shlex.join(step.command).replace('$', '$$')}"]
        before.append(step.output)
    for step in recipe.linking:
        lines += [f"build {step.output}: run | {' '.join(before)}"]
        lines += [f"  run = {shlex.join(step.command).replace('$', '$$')}"]
        before.append(step.output)
    Path(folder, "build.ninja").write_text("\n".join([*lines, ""]))
    # Its output, compilers' messages included, goes where this process's goes.
    if subprocess.run([ninja, "-j", str(parallel)], cwd=folder).returncode != 0:
        raise BuildError(f"{backend}: could not be compiled; the compiler's message is above")


def recipe_for(
    backend: str,
    csrc: Path | None = None,
    extra_flags: Sequence[str] = (),
    parallel: int = 1,
    architectures: Sequence[str] | None = None,
) -> Recipe:
    """The commands that make a backend's library. Runs compilers for their versions only. Raises BuildError.

    `architectures` are some of cuda_architectures(), by default all.
    """
    csrc = (csrc or extension.CSRC).absolute()
    paths = [path for path in extension.sources(backend, csrc) if path.suffix in (".cpp", ".cu")]
    if not any(path.suffix == (".cu" if backend == "cuda" else ".cpp") for path in paths if path.parent != csrc):
        raise BuildError(f"{backend}: no sources in {csrc / backend}")
    cxx = find_cxx()
    tools, settings = [_version(cxx)], [*extra_flags, platform.machine()]
    common = ["-isystem", str(TORCH / "include"), "-I", str(csrc), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    common += [f"-DR2M_NAMESPACE=r2m_kernels_{backend}", f"-DR2M_DEVICE={backend.upper()}"]
    # Torch is loaded in a way that its symbols are not seen by others, so its libraries have to be named as needed.
    libraries = ["-L", str(TORCH / "lib"), "-L.", "-Wl,--push-state,--no-as-needed", "-ltorch_cpu", "-lc10"]
    compiling, linking, threads = [], [], 1

    cxx_flags = [*OPTIMIZE, *HOST, *WARNINGS, *common, *(extra_flags if backend == "cpu" else ())]
    machine_code = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    for isa, flags in machine_code.items():
        for path in paths:
            simd = path.stem.endswith("_simd")
            if path.suffix == ".cpp" and (simd or isa == "baseline"):
                output = f"{path.relative_to(csrc).as_posix()}{f'.{isa}' if simd else ''}.o"
                special = [f"-DR2M_ISA={isa}", *flags] if simd else []
                compiling.append(Step(output, [cxx, *cxx_flags, *special, "-c", str(path), "-o", output]))

    if backend == "cpu":
        libraries += ["-Wl,--pop-state,-z,defs", *extra_flags]  # an op that nobody wrote: an error now, not at loading
    else:
        nvcc, architectures = find_nvcc(), architectures or cuda_architectures()
        tools += [_version(nvcc)]
        settings += architectures
        threads = min(parallel, len(architectures))  # one file takes longer than all others: its GPUs side by side
        flags = [*OPTIMIZE, "-DUSE_CUDA", f"-ccbin={cxx}", f"-Xcompiler={','.join([*HOST, *WARNINGS])}"]
        flags += [flag for name in architectures for flag in _gencode(name)]
        flags += [f"--threads={threads}", *common, *extra_flags]
        for path in (path for path in paths if path.suffix == ".cu"):
            output = f"{path.relative_to(csrc).as_posix()}.o"
            compiling.append(Step(output, [nvcc, *flags, "-c", str(path), "-o", output]))
        if not _torch_has_cuda():  # an empty library of that name: the real one will be there when ours is loaded
            stub = "libtorch_cuda.so"
            linking.append(Step(stub, [cxx, "-shared", f"-Wl,-soname,{stub}", "-x", "c++", os.devnull, "-o", stub]))
        libraries += ["-ltorch_cuda", "-Wl,--pop-state", *_cuda_folders(nvcc)]
        libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    objects, output = [step.output for step in compiling], f"{backend}.so"
    linking.append(Step(output, [cxx, "-shared", *objects, *libraries, "-o", output]))
    digest = hashlib.sha256("\n".join([*settings, *tools]).encode()).hexdigest()[:8]
    return Recipe(compiling, linking, threads, digest, " and ".join(_first_line(tool) for tool in tools))


def find_ninja() -> str:
    """ninja: where pip puts it, even if the environment is not activated, else on PATH."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("ninja", path=os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise BuildError(f"no ninja: looked in {scripts} and on PATH (pip install ninja)")
    return found


def find_cxx() -> str:
    """The C++ compiler: $CXX, else c++ or g++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise BuildError(f"no C++ compiler: looked for {' and '.join(names)} on PATH (the variable CXX names another)")
    return found


def find_nvcc() -> str:
    """nvcc: that of $CUDA_HOME, else on PATH, else in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    names = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise BuildError(f"no nvcc: looked for {' and '.join(names)} (CUDA_HOME says where the CUDA toolkit is)")
    return found


def cuda_architectures() -> list[str]:
    """The GPUs of $TORCH_CUDA_ARCH_LIST, or those that the kernels are made for: "9.0a", "8.0+PTX" and so on.

    GPUs older than 8.0, which images of others like to list, have no bfloat16 and are left out.
    """
    given = (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES).strip(" ;,")
    expected = f"TORCH_CUDA_ARCH_LIST: expected compute capabilities such as {DEFAULT_ARCHITECTURES!r}, 8.0 or newer"
    names = []
    for name in re.split(r"[;,\s]+", given):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if match is None:
            raise BuildError(f"{expected}, got {name!r}")
        if (int(match[1]), int(match[2])) >= OLDEST_CAPABILITY:
            names.append(name)
    if not names:
        raise BuildError(f"{expected}, got {given!r}")
    return names


def _gencode(architecture: str) -> list[str]:
    number = architecture.removesuffix("+PTX").replace(".", "")
    kinds = ["sm", "compute"] if architecture.endswith("+PTX") else ["sm"]
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]


def jobs(memory: float) -> int:
    """How many compilers run at a time, each of which needs `memory` GiB: $MAX_JOBS, else what the machine has."""
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise BuildError(f"MAX_JOBS: expected a number of compilers, 1 or more, got {wanted!r}")
        return int(wanted)
    return max(1, min(len(os.sched_getaffinity(0)), int(_available_memory() / memory)))


def _available_memory() -> float:
    """GiB that can be had without swapping; a container may be allowed less than the machine has."""
    meminfo, limit, used = (Path(name) for name in MEMORY_FILES)
    available = [int(match) / 2**20 for match in re.findall(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())]
    with contextlib.suppress(OSError, ValueError):  # not in a container, or "max": no limit
        available.append((int(limit.read_text()) - int(used.read_text())) / 2**30)
    return min(available, default=0)


def _torch_has_cuda() -> bool:
    return (TORCH / "lib" / "libtorch_cuda.so").exists()


@functools.cache
def _version(compiler: str) -> str:
    """What a compiler says of itself; its path, or what lies there, may be a wrapper that stays as it is."""
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    if answer.returncode != 0:
        raise BuildError(f"{compiler} --version failed: {answer.stderr.strip()}")
    return answer.stdout


def _first_line(version: str) -> str:
    lines = version.splitlines() or ["?"]
    return next((line for line in lines if "release" in line), lines[0])  # nvcc's is the fourth


def _cuda_folders(nvcc: str) -> list[str]:
    """-L for the libraries of nvcc's toolkit. nvcc may be a wrapper somewhere else; a dry run says where it looks."""
    answer = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    match = re.search(r"^#\$ LIBRARIES=(.*)$", answer.stderr + answer.stdout, re.MULTILINE)
    if match is None:
        raise BuildError(f"{nvcc} --dryrun does not say where its libraries are: {answer.stderr.strip()}")
    return shlex.split(match[1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m r2m_kernels.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", nargs="*", help="cpu, cuda; default: those that this machine has the tools for")
    backends = parser.parse_args(arguments).backend
    for name in backends:
        if name not in extension.DEVICE_TYPES:
            parser.error(f"expected cpu or cuda, got {name!r}")
    try:
        build(backends or _default_backends())
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _default_backends() -> list[str]:
    if not _torch_has_cuda():
        print(f"cuda: left out, torch {torch.__version__} has no CUDA (an argument `cuda` builds it all the same)")
        return ["cpu"]
    try:
        find_nvcc()
    except BuildError as error:
        print(f"cuda: left out, {error}")
        return ["cpu"]
    return ["cpu", "cuda"]


if __name__ == "__main__":
    sys.exit(main())
