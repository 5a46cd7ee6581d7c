"""Finds and loads the compiled libraries of csrc. Nothing is compiled here and no process started: build.py does that.

There is one library per device type, because the CUDA one needs symbols that a CPU-only torch lacks. A file is named
`<device type>-<sources>-<settings>.so`, two hashes. The first is computed from what lies beside this file: a library
of other sources is never taken. The second is for build.py, which compiles again for another compiler, other GPU
architectures or other flags. The look-up ignores it: no compiler may be there any more, and an older library is as good
as it was. Of several libraries, the one asked for last is taken. The torch version is in neither hash: the libraries
use torch's stable ABI, which serves every torch from 2.11 on.
"""

import functools
import hashlib
import os
import platform
import struct
from pathlib import Path
from typing import Any

import torch

DEVICE_TYPES = ("cpu", "cuda")
PACKAGE = Path(__file__).parent
CSRC = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"  # installed, or a checkout
AHEAD_OF_TIME = PACKAGE / "lib"  # where setup.py puts what it builds
SUFFIXES = (".h", ".cuh", ".cpp", ".cu")
HOW_TO_BUILD = "python -m r2m_kernels.build"
OLDEST_TORCH = (2, 11)  # whose stable ABI the libraries use


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


_loaded: set[str] = set()  # device types: a process cannot load a second library of the same operators


def torch_too_old() -> str | None:
    """Why the libraries can neither be compiled nor run with this torch, or None."""
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) >= OLDEST_TORCH:
        return None
    return f"needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, and this is {torch.__version__}"


@functools.cache
def reason(device_type: str) -> str | None:
    """Why the extension cannot run on tensors of this device type, or None: then its library is loaded.

    Tried once a process.
    """
    if device_type in _loaded:
        return None
    if device_type not in DEVICE_TYPES:
        return f"has no code for {device_type!r}"
    if device_type == "cuda" and torch.version.hip is not None:
        return "has no code for AMD GPUs"
    too_old = torch_too_old()
    if too_old is not None:
        return too_old
    path = find(device_type)
    if path is not None:
        why_not = _load(path)
        if why_not is None:
            _loaded.add(device_type)
        return why_not
    stale = next(AHEAD_OF_TIME.glob(f"{device_type}-*.so"), None)
    if stale is not None:
        return f"{stale} was built from other sources than these ({HOW_TO_BUILD} builds it anew)"
    return f"not built ({HOW_TO_BUILD} builds it)"


def _load(path: Path) -> str | None:
    """Loads a library; returns the loader's message if it cannot be."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] == b"\x7fELF\x02" and len(header) == 64:
        # The loader maps a truncated file, and reading behind its end kills the process. What ends one is this table.
        (table,), (entry, entries) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        if path.stat().st_size < table + entry * entries:
            return f"cannot load {path}: the file is truncated (delete it, and {HOW_TO_BUILD} builds it anew)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"cannot load {path}: {error.__cause__ or error}"
    return None


@functools.cache
def ops(device_type: str) -> Any:
    """torch.ops.r2m_kernels_cpu or r2m_kernels_cuda, or RuntimeError with the reason why there is none."""
    why_not = reason(device_type)
    if why_not is not None:
        raise RuntimeError(f"the compiled extension cannot run on {device_type!r}: {why_not}")
    return getattr(torch.ops, f"r2m_kernels_{device_type}")
