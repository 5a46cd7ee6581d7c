"""Argument checks shared by the public functions. They look at shapes, dtypes and devices, and never at values, except
those of cu_seqlens on a CPU."""

import numbers
import os
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Checks cu_seqlens on GPUs, too: every call waits for the device, and none can be captured in a CUDA graph.
DEBUG = os.environ.get("R2M_KERNELS_DEBUG") == "1"
PLAIN = (Tensor, torch.nn.Parameter)  # told apart at once: most tensors are no subclass


def floating(**tensors: Any) -> None:
    """TypeError unless each is a floating tensor, and all or none are float64; ValueError unless on one device."""
    double = device = None
    mixed = apart = False
    for name, t in tensors.items():
        if type(t) not in PLAIN:
            _whole(name, t)
        dtype = t.dtype
        if dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {dtype}")
        if double is None:
            double, device = dtype is torch.float64, t.device
        else:
            mixed = mixed or (dtype is torch.float64) is not double
            apart = apart or t.device != device
    if mixed:
        got = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise TypeError(
            f"{', '.join(tensors)}: float64 does not mix with other dtypes, expected all or none, got {got}"
        )
    if apart:
        raise _several_devices(tensors)


def _whole(name: str, t: Any) -> None:
    """TypeError for what is no tensor, and for a shard of one."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if hasattr(t, "full_tensor"):
        raise TypeError(
            f"{name}: expected a whole tensor, got a DTensor, as fully_shard makes of weights: call the module "
            f"that it was given, whose forward has whole weights, or pass {name}.full_tensor()"
        )


def given(name: str, argument: Any) -> dict[str, Any]:
    """An optional argument by its name, if it is not None."""
    return {} if argument is None else {name: argument}


def same_device(**tensors: Tensor) -> None:
    """ValueError unless all tensors live on one device."""
    if len({t.device for t in tensors.values()}) > 1:
        raise _several_devices(tensors)


def _several_devices(tensors: dict[str, Tensor]) -> ValueError:
    got = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
    return ValueError(f"{', '.join(tensors)}: expected one device, got {got}")


def shape(name: str, tensor: Tensor, *expected: tuple[tuple[int | str, ...], str]) -> None:
    """ValueError unless the tensor has one of the expected shapes, each given with its meaning in words.

    A size that is a name, such as "d", may be any but 0.
    """
    have = tuple(tensor.shape)
    for sizes, _ in expected:
        if have == sizes or (
            len(have) == len(sizes)
            and all(a != 0 if isinstance(b, str) else a == b for a, b in zip(have, sizes, strict=True))
        ):
            return
    wanted = " or ".join(f"{words} = [{', '.join(map(str, sizes))}]" for sizes, words in expected)
    raise ValueError(f"{name}: expected shape {wanted}, got {list(tensor.shape)}")


def dimensions(name: str, tensor: Tensor, *expected: str) -> None:
    """ValueError unless the tensor has as many dimensions as one of the layouts, such as "[B, D]", the last not 0."""
    if tensor.ndim not in [layout.count(",") + 1 for layout in expected] or tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape {' or '.join(expected)}, got {list(tensor.shape)}")


def sequences(batch: int, batch_of: str, width: int, hidden: Tensor, cu_seqlens: Any, mask: Any) -> bool:
    """Errors unless `hidden` holds `batch` sequences of rows of `width`, dense or packed, with a fitting mask.

    Returns whether the rows that cu_seqlens names were checked, too: not where it has no values yet.
    """
    if cu_seqlens is None:
        if hidden.ndim != 3 or width == 0 or hidden.shape[0] != batch or hidden.shape[2] != width:
            dimensions("hidden", hidden, "[B, S, D]")
            shape("hidden", hidden, ((batch, hidden.shape[1], width), f"[B, S, D] to go with {batch_of}"))
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"mask: expected a torch.bool tensor, True = attend, got {got}")
            shape("mask", mask, (tuple(hidden.shape[:2]), "[B, S]"))
            if mask.device != hidden.device:
                raise _several_devices({"hidden": hidden, "mask": mask})
        return True
    if mask is not None:
        raise ValueError(
            "mask: expected None together with cu_seqlens (leave rows out of the packed layout), got a mask"
        )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype is not torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected a torch.int32 tensor, got {got}")
    dimensions("hidden", hidden, "[total, D]")
    shape("hidden", hidden, ((hidden.shape[0], width), f"[total, D] to go with {batch_of}"))
    shape("cu_seqlens", cu_seqlens, ((batch + 1,), "[B + 1]"))
    if cu_seqlens.device != hidden.device:
        raise _several_devices({"hidden": hidden, "cu_seqlens": cu_seqlens})
    # Tensors without values: of a compiler, of FakeTensorMode. Ops check those that they run on.
    if type(cu_seqlens) is not Tensor or torch.compiler.is_compiling():
        return False
    rows_in_order(cu_seqlens, hidden.shape[0])
    return True


def packed_rows(cu_seqlens: Tensor, total: int) -> Tensor:
    """cu_seqlens as kernels read it, contiguous. On CPUs, and with DEBUG everywhere: ValueError unless it is rows of
    `total`, none before the last. Elsewhere wrong values make kernels read and write what is not theirs."""
    rows_in_order(cu_seqlens, total)
    return cu_seqlens.contiguous()


def rows_in_order(cu_seqlens: Tensor, total: int) -> None:
    if cu_seqlens.device.type == "cpu" or (DEBUG and not cu_seqlens.is_meta):
        rows = cu_seqlens.tolist()
        if rows[0] < 0 or rows[-1] > total or rows != sorted(rows):
            wrong = next((b for b, row in enumerate(rows) if row < (rows[b - 1] if b else 0)), len(rows) - 1)
            raise ValueError(
                f"cu_seqlens: expected 0 <= cu_seqlens[0] <= ... <= cu_seqlens[{len(rows) - 1}] <= {total} rows of "
                f"hidden, got cu_seqlens[{wrong}] = {rows[wrong]}{f' after {rows[wrong - 1]}' if wrong else ''}"
            )


def number(name: str, value: Any) -> None:
    """TypeError unless the value is an int or a float, of Python, NumPy or a symbolic size that PyTorch exports."""
    if isinstance(value, (int, float, numbers.Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        return
    kind = type(value).__name__
    why = f" (torch.compile takes a NumPy number for one: pass float({name}))" if kind == "ndarray" else ""
    raise TypeError(f"{name}: expected a number, got {kind}{why}")


def heads(num_heads: Any, d: int) -> None:
    """Errors unless d splits into num_heads equal heads."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    if num_heads < 1 or d % num_heads != 0:
        raise ValueError(f"num_heads: expected a positive divisor of the width d = {d}, got {num_heads}")


def head(width: int, head_weight: Tensor, head_bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A linear scoring head for embeddings of this width as weight [D_rm] and 0-dim bias; ValueError if it is none."""
    shape("head_weight", head_weight, ((width,), "[D_rm]"), ((1, width), "[1, D_rm]"))
    if head_bias is not None and head_bias.ndim != 0:
        shape("head_bias", head_bias, ((), "0-dim"), ((1,), "[1]"))
        head_bias = head_bias.reshape(())
    return head_weight if head_weight.ndim == 1 else head_weight.reshape(width), head_bias


def constant(tensor: Tensor) -> Tensor:
    """Without autograd history. Where there is none, `detach` would make another tensor for nothing."""
    return tensor.detach() if tensor.requires_grad else tensor


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 tensors, else float32."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def accumulated(tensor: Tensor) -> Tensor:
    """The tensor in that dtype. Where it has it, `to` would take longer than this."""
    dtype = accumulate_dtype(tensor)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def fusion_weight(weight: Any, like: Tensor) -> Tensor:
    """The fusion weight w as a 0-dim tensor beside `like`: a tensor in every op, or each round would recompile."""
    dtype = accumulate_dtype(like)
    if isinstance(weight, Tensor):
        if not weight.is_floating_point():
            raise TypeError(f"weight: expected a float or a 0-dim floating tensor, got {weight.dtype}")
        if weight.ndim != 0:
            shape("weight", weight, ((), "0-dim"))
        if weight.device != like.device:
            raise ValueError(f"weight: expected a float or a tensor on {like.device}, got one on {weight.device}")
        if weight.requires_grad:
            raise ValueError("weight: expected a constant (a schedule's value), got a tensor that requires grad")
        return weight if weight.dtype is dtype else weight.to(dtype)
    number("weight", weight)
    # A fill and a product, not a copy from the host: nothing synchronises, and torch.compile keeps the float symbolic.
    return torch.ones((), dtype=dtype, device=like.device) * weight
