"""What every registered op needs around its formula: full precision, saved tensors, no second derivative."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` with autocast off on the device of its tensors: an outer autocast changes no result."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next((t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), "cpu")
        if not torch.is_autocast_enabled(device_type):  # most calls: the context costs more than all checks
            return function(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return run


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward` that also takes tensors made under torch.inference_mode.

    Autograd refuses those because it cannot see them change; as plain attributes of `ctx` they serve as well, since
    inputs of a node make no reference cycle.
    """
    ctx.inference_tensors = [t if t is not None and t.is_inference() else None for t in tensors]
    ctx.save_for_backward(*(t if t is None or not t.is_inference() else None for t in tensors))


def saved(ctx: Any) -> list[Any]:
    """What `save` kept, in its order."""
    return [b if a is None else a for a, b in zip(ctx.inference_tensors, ctx.saved_tensors, strict=True)]


def autograd_ready(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made under torch.inference_mode: for small tensors that plain autograd saves.

    torch.compile can neither ask nor save such tensors: there they have to be made under torch.no_grad instead.
    """
    return tensor.clone() if not torch.compiler.is_compiling() and tensor.is_inference() else tensor


def forbid_second_derivative(backward_op: Any, name: str) -> None:
    """Makes it an error to differentiate the op that computes a gradient."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name}: second derivatives are not available (it was differentiated with create_graph=True)"
        )

    backward_op.register_autograd(backward)
