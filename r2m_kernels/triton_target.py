"""What the launchers of Triton kernels share: where they launch, and for which architecture."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

OLDEST = (3, 6)
if tuple(int(number) for number in triton.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"expected Triton {'.'.join(map(str, OLDEST))} or newer, got {triton.__version__}")

P = ParamSpec("P")
R = TypeVar("R")

# Products and sums contract to fused multiply-adds. Explicit, because Triton's default differs between releases.
OPTIONS = {"enable_fp_fusion": True}


def architecture() -> str:
    """The current device's: "sm_90", "gfx942", or "interpreter" for kernels interpreted on CPU tensors."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def on_device_of_arguments(launcher: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current device: runs `launcher` with that of its first tensor."""

    @functools.wraps(launcher)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(t.device for t in args if isinstance(t, Tensor))
        with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: stays where it is
            return launcher(*args, **kwargs)

    return run
