"""Which implementation of an op runs. Adding one: a module `<op>/<name>_impl.py` in each op's folder, a row here."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from r2m_kernels import extension

IMPLEMENTATIONS = ("extension", "torch", "triton")

# What "auto" tries, fastest first. Triton's interpreter, which runs kernels on CPU tensors, is for checking them.
FASTEST_FIRST = {
    "cuda": ("triton", "extension", "torch"),
    # From sm_90 on the extension, where it is built, reads hidden once for many queries, Triton twice; and in wide rows
    # it is predicted to reach up to 8 points more of the bandwidth, in narrow ones up to 10 less (docs/kernels.md).
    "cuda, large pool": ("extension", "triton", "torch"),
    "cpu": ("extension", "torch"),
}
MANY_QUERIES, WIDE_ROWS = 5, 3584  # where pools are large


def available_implementations() -> dict[str, str | None]:
    """Every implementation's name -> None if it can run on this machine, else the reason it cannot.

    To find out, the extension's library is loaded and, on a GPU, Triton is imported, once a process.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: _reason(name, device) for name in IMPLEMENTATIONS}


def choose(impl: str, *tensors: Tensor, op: str | None = None, queries: int = 1, **limits: str | None) -> str:
    """The implementation to run on these tensors: the fastest that can for "auto", else the one named or an error.

    `op` is the operator's folder, whose implementations these are; without it, the question is what the machine can.
    `queries` is how many a pool has of a sequence. `limits` gives for an implementation the reason why it cannot take
    these shapes, or None.
    """
    if impl == "torch":
        return impl
    if impl == "auto":
        for name in FASTEST_FIRST.get(_kind(tensors[0], op, queries), ()):
            if _why_not(name, tensors, op, limits) is None:
                return name
        return "torch"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected 'auto' or one of {list(IMPLEMENTATIONS)}, got {impl!r}")
    why_not = _why_not(impl, tensors, op, limits)
    if why_not is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {why_not}")
    return impl


def _kind(tensor: Tensor, op: str | None, queries: int) -> str:
    """The key of FASTEST_FIRST for an operator whose rows are the tensor's."""
    kind = tensor.device.type
    if kind != "cuda" or op != "attention_pool" or (queries < MANY_QUERIES and tensor.shape[-1] < WIDE_ROWS):
        return kind
    return "cuda, large pool" if _has_clusters(str(tensor.device)) else kind


def _why_not(name: str, tensors: tuple[Tensor, ...], op: str | None, limits: dict[str, str | None]) -> str | None:
    """Why an implementation cannot run on these tensors, or None."""
    if name == "torch":
        return None
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return "float64 runs in 'torch' only"
    return limits.get(name) or _reason(name, str(tensors[0].device)) or (_lacks(op, name) if op else None)


def _reason(name: str, device: str) -> str | None:
    """Why an implementation cannot run on a device, or None: then it is loaded. Nothing is compiled to find out."""
    if name == "torch":
        return None
    kind = device.partition(":")[0]
    if name == "extension":
        return extension.reason(kind) or (_too_old(device) if kind == "cuda" else None)
    if kind != "cuda" and not _interpreted():
        return f"Triton needs a GPU, or TRITON_INTERPRET=1 to interpret its kernels slowly, and this is {device!r}"
    if kind == "cuda" and torch.version.hip is None:
        too_old = _too_old(device)
        if too_old is not None and not _interpreted():
            return too_old
    return _triton_error()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_error() -> str | None:
    """Why Triton cannot be used, or None: then it is imported and has found its driver. Tried once a process."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module("r2m_kernels.triton_target").architecture()
    except Exception as error:  # whatever an installation that is broken raises
        return f"Triton cannot be loaded: {type(error).__name__}: {error}"
    return None


_new_enough: set[str] = set()  # devices: asking for their capability takes longer than all checks of a call


def _too_old(device: str) -> str | None:
    """Why an NVIDIA GPU lacks the instructions that the kernels use, or None."""
    if device in _new_enough:
        return None
    if torch.cuda.get_device_capability(device) >= (8, 0):
        _new_enough.add(device)
        return None
    return f"needs compute capability 8.0 or newer, and {torch.cuda.get_device_name(device)} is older"


@functools.cache
def _has_clusters(device: str) -> bool:
    """Whether it is an NVIDIA GPU of sm_90 or newer."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _lacks(op: str, name: str) -> str | None:
    """Why an operator cannot run an implementation that this machine can, or None."""
    return None if _has(op, name) else f"r2m_kernels/{op} has no {name}_impl.py"


@functools.cache
def _has(op: str, name: str) -> bool:
    return importlib.util.find_spec(f"r2m_kernels.{op}.{name}_impl") is not None


# What torch.compiler.assume_constant_result sets, without importing the compiler: torch.compile runs them as they are.
for _function in (_reason, _lacks, _has_clusters):
    _function.__dict__["_dynamo_marked_constant"] = True


@functools.cache
def implementation(op: str, name: str) -> ModuleType:
    """The module that implements `op`, imported on first use so that importing r2m_kernels needs torch only."""
    return importlib.import_module(f"r2m_kernels.{op}.{name}_impl")
