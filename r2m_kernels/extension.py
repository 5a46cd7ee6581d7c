"""Finds and loads the compiled libraries of csrc. Nothing is compiled here and no process started: build.py does that.

There is one library per device type, because the CUDA one needs symbols that a CPU-only torch lacks. A file is named
`<device type>-<sources>-<settings>.so`, two hashes. The first is computed from what lies beside this file, so a library
of other sources is never taken. The second is for build.py alone, which compiles again when the compiler, the GPU
architectures or the flags are others: looking a library up must not depend on them, for it runs no compiler, there may
be none any more, and a library of an older one is as good as it was. Of several, the one asked for last is taken.
The torch version is in neither: the libraries use torch's stable ABI, and the same one serves every torch from 2.11 on.
"""

import functools
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

DEVICE_TYPES = ("cpu", "cuda")
PACKAGE = Path(__file__).parent
CSRC = PACKAGE / "csrc"
AHEAD_OF_TIME = PACKAGE / "lib"  # where setup.py puts what it builds
SUFFIXES = (".h", ".cuh", ".cpp", ".cu")
HOW_TO_BUILD = "python -m r2m_kernels.build"


def cache() -> Path:
    """The user's folder for what `python -m r2m_kernels.build` makes; homes can be shared between kinds of machines."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "r2m_kernels" / platform.machine()


def sources(device_type: str, csrc: Path | None = None) -> list[Path]:
    """The files of csrc that a library is made of: all but those in another device type's folder."""
    csrc = csrc or CSRC
    others = {other for other in DEVICE_TYPES if other != device_type}
    files = (path for path in csrc.rglob("*") if path.suffix in SUFFIXES)
    return sorted(path for path in files if path.relative_to(csrc).parts[0] not in others)


def sources_key(device_type: str, csrc: Path | None = None) -> str:
    """A hash of the sources and of build.py, which has the flags."""
    csrc = csrc or CSRC
    digest = hashlib.sha256((PACKAGE / "build.py").read_bytes())
    for path in sources(device_type, csrc):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def find(device_type: str) -> Path | None:
    """The library built from exactly these sources, ahead of time or in the user's cache; the last of several."""
    pattern = f"{device_type}-{sources_key(device_type)}-*.so"
    built = [path for folder in (AHEAD_OF_TIME, cache()) for path in folder.glob(pattern)]
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


@functools.cache
def reason(device_type: str) -> str | None:
    """Why the extension cannot run on tensors of this device type, or None. Looked up once a process."""
    if device_type not in DEVICE_TYPES:
        return f"has no code for {device_type!r}"
    if device_type == "cuda" and torch.version.hip is not None:
        return "has no code for AMD GPUs"
    if find(device_type) is not None:
        return None
    stale = next(AHEAD_OF_TIME.glob(f"{device_type}-*.so"), None)
    if stale is not None:
        return f"{stale} was built from other sources than these ({HOW_TO_BUILD} builds it anew)"
    return f"not built ({HOW_TO_BUILD} builds it)"


@functools.cache
def ops(device_type: str) -> Any:
    """torch.ops.r2m_kernels_cpu or r2m_kernels_cuda; the first call loads the library.

    Raises RuntimeError if there is none, or with the loader's message if it cannot be loaded.
    """
    path = find(device_type) if reason(device_type) is None else None
    if path is None:
        raise RuntimeError(f"the compiled extension cannot run on {device_type!r}: {reason(device_type)}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise RuntimeError(f"cannot load {path}: {error.__cause__ or error}") from error
    return getattr(torch.ops, f"r2m_kernels_{device_type}")
