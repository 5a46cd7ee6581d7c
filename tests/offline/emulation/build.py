"""Builds the CUDA C++ kernels for the CPU, to run on CPU tensors as torch.ops.r2m_kernels_emulated.*.

torch.ops.load_library(build(900, folder))
"""

import subprocess
from pathlib import Path

from r2m_kernels.build import TORCH, TORCH_TARGET_VERSION, find_cxx
from r2m_kernels.extension import CSRC

HERE = Path(__file__).parent


def build(arch: int, folder: Path, sources: list[Path] | None = None) -> Path:
    """The library of all kernels as a device of __CUDA_ARCH__ `arch` (800, 900) would compile them, in `folder`."""
    sources = [CSRC / "registration.cpp", *sorted((CSRC / "cuda").glob("*.cu"))] if sources is None else sources
    library = folder / f"r2m_emulated_{arch}.so"
    flags = ["-std=c++20", "-O2", "-march=native", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    flags += [f"-DR2M_EMULATE={arch}", "-DR2M_NAMESPACE=r2m_kernels_emulated", "-DR2M_DEVICE=CPU"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-I{HERE}", f"-I{CSRC}"]
    flags += [f"-isystem{TORCH / 'include'}"]
    objects = [folder / f"{source.stem}_{arch}.o" for source in sources]
    compilers = [
        subprocess.Popen(
            [find_cxx(), *flags, "-c", "-x", "c++", source, "-o", target], stderr=subprocess.PIPE, text=True
        )
        for source, target in zip(sources, objects, strict=True)
    ]
    for compiler in compilers:
        _, errors = compiler.communicate()
        if compiler.returncode:
            raise RuntimeError(errors)
    link = [find_cxx(), "-shared", *objects, "-o", library, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(link, check=True)
    return library
