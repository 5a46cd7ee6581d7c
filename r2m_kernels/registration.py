"""What the ops need around their formulas: full precision, saved tensors, derivatives that raise where none exist."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from r2m_kernels.checks import PLAIN

P = ParamSpec("P")
R = TypeVar("R")


_LIBRARY = torch.library.Library("r2m_kernels", "FRAGMENT")
_derivatives: dict[str, type[torch.autograd.Function]] = {}  # by the names of their ops


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers torch.ops.r2m_kernels.<name>, which `kernel` computes on every device; returns the function to call.

    `fake` makes results of the same shapes, strides and dtypes from tensors without data. Not torch.library.custom_op,
    whose wrappers in Python take three times as long as all of this.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"r2m_kernels::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.r2m_kernels, name).default

    def call(*args: Any) -> Any:
        # The registered op is for compilers and modes. Of plain tensors this is what it would do: the way through
        # PyTorch's dispatcher and back into Python takes longer than the arithmetic of GREBT.
        if torch.compiler.is_compiling() or not _plain(args):
            return op(*args)
        function = _derivatives.get(name)
        if function is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        return kernel(*args)

    return call


def differentiate(name: str, function: type[torch.autograd.Function]) -> None:
    """Gives an op its derivative: that of `function`, whose forward calls the op."""
    op = getattr(torch.ops.r2m_kernels, name).default

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _derivatives[name] = function
    _LIBRARY.impl(name, run, "Autograd")


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether PyTorch's dispatcher would hand the arguments on as they are."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    for t in args:
        if type(t) in PLAIN:
            if t.is_meta or t.is_neg():
                return False
        elif isinstance(t, Tensor):
            return False
    return True


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` with autocast off on the device of its first tensor: an outer autocast changes no result."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next((t for t in kwargs.values() if isinstance(t, Tensor)), None)
        # Most calls: the context costs more than all checks.
        if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def needs_own_backward(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked for, whose formula has to leave autocast itself.

    Autograd runs its own formulas under the autocast that is on during the backward; compiled, under that around the
    compiled function. Not under torch.func, which knows derivatives of plain operations only.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return not torch._C._are_functorch_transforms_active()
    return False


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
    ctx.unseen = kept if uncopied is not None and uncopied.is_inference() else ()
    copies = [t.clone() if t is not None and t.is_inference() else t for t in tensors]
    ctx.save_for_backward(*copies, *(() if ctx.unseen else kept))


def saved(ctx: Any) -> tuple[Any, ...]:
    """What `save` kept, in its order."""
    return *ctx.saved_tensors, *ctx.unseen


def autograd_ready(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made under torch.inference_mode: for small tensors that plain autograd saves.

    torch.compile can neither ask nor save such tensors: there they have to be made under torch.no_grad instead.
    """
    return tensor.clone() if not torch.compiler.is_compiling() and tensor.is_inference() else tensor


def forbid_second_derivative(backward_op: Callable[..., Any], name: str) -> None:
    """Makes it an error to differentiate <name>_backward, which computes the gradient of <name>."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return backward_op(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            raise no_second_derivative(name)

    differentiate(f"{name}_backward", Gradient)


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
