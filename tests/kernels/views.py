"""The same values in other layouts of memory, amid values that would show: what a kernel reads that ignores strides."""

import torch
from torch import Tensor

KINDS = (
    "transposed",  # dimensions stored in reverse order
    "every other column",
    "every other row",
    "sliced",  # a part in the middle of a larger tensor
    "offset",  # contiguous, and not aligned to a vector
    "expanded",  # one row for all: values other than those of the tensor
    "expanded columns",
    "negated",  # memory holds the opposite: PyTorch's dispatcher alone knows of the sign
)


def view(kind: str, tensor: Tensor) -> Tensor:
    """A view of this kind with the values of `tensor`, or, where they have to repeat, of its first row or column.

    Compare what a function makes of it and of `copy` of it.
    """
    if tensor.ndim == 0:
        return _amid(tensor, (3,), 1)
    if kind == "transposed":
        return tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))
    if kind == "every other column":
        return _amid(tensor, (*tensor.shape[:-1], 2 * tensor.shape[-1]), (..., slice(None, None, 2)))
    if kind == "every other row":
        return _amid(tensor, (2 * tensor.shape[0], *tensor.shape[1:]), slice(None, None, 2))
    if kind == "sliced":
        return _amid(tensor, [size + 2 for size in tensor.shape], tuple(slice(1, -1) for _ in tensor.shape))
    if kind == "offset":
        return _amid(tensor.flatten(), (tensor.numel() + 1,), slice(1, None)).view(tensor.shape)
    if kind == "expanded":
        return tensor[:1].clone().expand(tensor.shape)
    if kind == "expanded columns":
        return tensor[..., :1].clone().expand(tensor.shape)
    if kind == "negated":
        return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor
    raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")


def copy(tensor: Tensor) -> Tensor:
    """The values of a view in memory of their own."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _amid(tensor: Tensor, shape, part) -> Tensor:
    """`tensor` as a part of a larger one, whose other values are NaN, or far from any that fits."""
    strange = torch.nan if tensor.is_floating_point() else tensor.dtype is torch.bool or -(1 << 30)
    larger = torch.full(tuple(shape), strange, dtype=tensor.dtype, device=tensor.device)
    larger[part] = tensor
    return larger[part]
