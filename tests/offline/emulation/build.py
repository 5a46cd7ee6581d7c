"""Builds the CUDA C++ kernels for the CPU, to run on CPU tensors as torch.ops.r2m_kernels_emulated.*.

torch.ops.load_library(build(900, folder))
"""

import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "r2m_kernels" / "csrc"
STABLE_ABI = 0x020B000000000000  # torch 2.11


def build(arch: int, folder: Path, sources: list[Path] | None = None) -> Path:
    """The library of all kernels as a device of __CUDA_ARCH__ `arch` (800, 900) would compile them, in `folder`."""
    sources = [CSRC / "registration.cpp", *sorted((CSRC / "cuda").glob("*.cu"))] if sources is None else sources
    library = folder / f"r2m_emulated_{arch}.so"
    flags = ["-std=c++20", "-O2", "-march=native", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    flags += [f"-DR2M_EMULATE={arch}", "-DR2M_NAMESPACE=r2m_kernels_emulated", "-DR2M_DEVICE=CPU"]
    flags += [f"-DTORCH_TARGET_VERSION={STABLE_ABI:#018x}ULL", f"-I{HERE}", f"-I{CSRC}"]
    flags += [f"-isystem{include}" for include in cpp_extension.include_paths()]
    objects = [folder / f"{source.stem}_{arch}.o" for source in sources]
    compilers = [
        subprocess.Popen(["g++", *flags, "-c", "-x", "c++", source, "-o", target], stderr=subprocess.PIPE, text=True)
        for source, target in zip(sources, objects, strict=True)
    ]
    for compiler in compilers:
        _, errors = compiler.communicate()
        if compiler.returncode:
            raise RuntimeError(errors)
    libraries = Path(torch.__file__).parent / "lib"
    link = ["g++", "-shared", *objects, "-o", library, f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    subprocess.run([*link, "-ltorch_cpu", "-lc10"], check=True)
    return library
