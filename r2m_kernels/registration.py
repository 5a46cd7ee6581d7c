"""What the ops need around their formulas: full precision, saved tensors, derivatives that raise where none exist."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` with autocast off on the device of its tensors: an outer autocast changes no result."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next((t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), "cpu")
        # Most calls: the context costs more than all checks.
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return function(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return run


def needs_own_backward(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked for, whose formula has to leave autocast itself.

    Autograd runs its own formulas under the autocast that is on during the backward; compiled, under that around the
    compiled function. Not under torch.func, which knows derivatives of plain operations only.
    """
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return needed and not torch._C._are_functorch_transforms_active()


def matrix_vector(a: Tensor, b: Tensor) -> Tensor:
    """a [B, D] @ b [D], whose gradients no autocast rounds."""
    return _MatrixVector.apply(a, b) if needs_own_backward(a, b) else a @ b


class _MatrixVector(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (a, b), (needs_a, needs_b) = grads, ctx.saved_tensors, ctx.needs_input_grad
        with autocast_off(grad.device.type):
            grad_b = a.mT @ grad if needs_b else None
        return grad[:, None] * b if needs_a else None, grad_b


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """The context in which a backward computes, outside of any autocast."""
    # A backward is traced where its forward is: what is on there says nothing about where it will run.
    if torch.compiler.is_compiling() or (device_type != "meta" and torch.is_autocast_enabled(device_type)):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def save(ctx: Any, *tensors: Tensor | None, uncopied: Tensor | None = None) -> None:
    """`ctx.save_for_backward` that also takes tensors made under torch.inference_mode.

    Autograd refuses those because it cannot see them change, so a copy is saved. `uncopied`, the last in `saved`, is
    too large to copy and stays as it is: an attribute of `ctx` serves, since inputs of a node make no reference cycle.
    If it changes before the backward the gradients are wrong: say so where a user reads it.
    """
    kept = () if uncopied is None else (uncopied,)
    ctx.unseen = kept if any(t.is_inference() for t in kept) else ()
    copies = (t if t is None else autograd_ready(t) for t in tensors)
    ctx.save_for_backward(*copies, *(() if ctx.unseen else kept))


def saved(ctx: Any) -> list[Any]:
    """What `save` kept, in its order."""
    return [*ctx.saved_tensors, *ctx.unseen]


def autograd_ready(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made under torch.inference_mode: for small tensors that plain autograd saves.

    torch.compile can neither ask nor save such tensors: there they have to be made under torch.no_grad instead.
    """
    return tensor.clone() if not torch.compiler.is_compiling() and tensor.is_inference() else tensor


def forbid_second_derivative(backward_op: Any, name: str) -> None:
    """Makes it an error to differentiate the op that computes a gradient."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise no_second_derivative(name)

    backward_op.register_autograd(backward)


def no_second_derivative(name: str) -> RuntimeError:
    return RuntimeError(f"{name}: second derivatives are not available (it was differentiated with create_graph=True)")


def forbid_transforms(name: str, *tensors: Tensor | None) -> None:
    """RuntimeError under torch.func, and if a tensor carries a forward-mode tangent, which the ops would drop."""
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    if torch._C._are_functorch_transforms_active() or any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(
            f"{name}: torch.func transforms and forward-mode derivatives are not available: expected gradients from "
            "torch.autograd.grad or backward()"
        )
