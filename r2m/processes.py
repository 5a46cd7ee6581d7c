"""Several processes, each with its share of every round. With one process these functions return what they are given.

Whole groups are dealt: process p of P has the items p, p + P, p + 2 P, ...; so the P shares of a minibatch make up the
minibatch that one process would have.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def start(timeout_minutes: float) -> PartialState:
    """Join the processes that `accelerate launch` or torchrun started, if any; only the first of them logs.

    timeout_minutes: how long a process waits for another before it stops with an error. Raises ValueError where
    accelerate was told to shard the policy itself.
    """
    others = ("DEEPSPEED", "FSDP", "MEGATRON_LM")
    asked = [name for name in others if os.environ.get(f"ACCELERATE_USE_{name}") == "true"]
    if asked:
        raise ValueError(
            f"accelerate is configured for {asked[0]}; expected a launch for several GPUs without it, and "
            "placement.shard_policy=true where the policy is to be sharded (FSDP2)"
        )
    state = PartialState(timeout=timedelta(minutes=timeout_minutes))
    if state.process_index:
        logging.getLogger("r2m").setLevel(logging.ERROR)
    return state


def stop() -> None:
    if number() > 1:
        dist.destroy_process_group()


def number() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    return dist.get_rank() if number() > 1 else 0


_FAILED, _TOLD = "r2m/failed", "r2m/told"  # keys of the store that the processes share
_LOOK = 1.0  # seconds between two looks at it


@contextmanager
def ends_all() -> Iterator[None]:
    """If the block fails in one of several processes, it ends in all of them, within seconds and with the reason.

    A process that waits for others in a collective cannot be interrupted, so a thread of it looks into the store of the
    process group. It ends its process where another has failed, or where the process that has the store is gone. What
    fails only because another has, raises ConnectionAbortedError with that one's reason.
    """
    if number() == 1:
        yield
        return
    store, over = distributed_c10d._get_default_store(), threading.Event()
    thread = threading.Thread(target=_end_with_others, args=(store, over), daemon=True)
    thread.start()
    try:
        yield
        wait()  # the process that has the store stays until all are done
    except Exception as error:
        over.set()
        atexit.register(_leave)
        own = f"process {index()} failed: {type(error).__name__}: {error}"
        try:
            first = store.compare_set(_FAILED, "", own).decode()
            if first == own:
                _wait_until_told(store)
        except RuntimeError:  # the process that had the store is gone
            first = f"process {index()} lost process 0: {error}"
        if first != own:
            with suppress(RuntimeError):
                store.add(_TOLD, 1)
            raise ConnectionAbortedError(first) from error
        raise
    finally:
        over.set()


def _end_with_others(store: distributed_c10d.Store, over: threading.Event) -> None:
    while not over.wait(_LOOK):
        try:
            failed = store.check([_FAILED])
            reason = store.get(_FAILED).decode() if failed else ""
        except RuntimeError:
            failed, reason = True, "process 0 is gone"
        if failed and not over.is_set():
            sys.stderr.write(f"error: process {index()} ends, since {reason}\n")
            sys.stderr.flush()
            with suppress(RuntimeError):
                store.add(_TOLD, 1)
            os._exit(1)


def _leave() -> None:
    """Ends a process that failed, once the interpreter has reported its error.

    A sharded policy leaves a process group with work that nobody finishes. It is never torn down, and the other
    processes would wait with this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _wait_until_told(store: distributed_c10d.Store) -> None:
    """The others look every second; one that is gone cannot be told."""
    for _ in range(5):
        if store.add(_TOLD, 0) >= number() - 1:
            return
        time.sleep(_LOOK)


def seed(value: int) -> None:
    """Every process draws random numbers of its own."""
    set_seed((value * number() + index()) % 2**32)


# ---- shares ----


def share(items: Sequence[T]) -> list[T]:
    """This process's items. All get the same number: where it does not come out even, the first items come again at the
    end, and `gather(...)[: len(items)]` is without them."""
    size, rank = number(), index()
    return [items[(i * size + rank) % len(items)] for i in range(-(-len(items) // size))]


def gather(rows: Tensor, group: int = 1) -> Tensor:
    """The rows [b, ...] of all processes in the order that one process would have; `group` rows belong to an item."""
    if number() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(number())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack([part.unflatten(0, (-1, group)) for part in parts], 1).flatten(0, 2)


def gather_items(items: list[T], group: int = 1) -> list[T]:
    """The items of all processes, ordered as `gather` orders rows."""
    parts = _all(items)
    return [x for i in range(0, len(items), group) for part in parts for x in part[i : i + group]]


def mean(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each value over processes."""
    parts = _all(dict(values))
    return {name: sum(part[name] for part in parts) / len(parts) for name in values}


def total(value: Tensor) -> Tensor:
    """The sum over processes."""
    if number() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def greatest(values: list[int]) -> list[int]:
    """Each value's maximum over processes; all have equally many."""
    return [max(column) for column in zip(*_all(values), strict=True)]


def anywhere(flag: bool) -> bool:
    return any(_all(flag))


def wait() -> None:
    if number() > 1:
        dist.barrier()


def from_first(value: T) -> T:
    """What the first process has."""
    if number() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _all(value: T) -> list[T]:
    if number() == 1:
        return [value]
    values: list[Any] = [None] * number()
    dist.all_gather_object(values, value)
    return values


# ---- weights ----


def keep_equal(module: nn.Module) -> None:
    """Copies that start as the first process's and average their gradients: after equal steps they are still equal."""
    if number() == 1:
        return
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, src=0)
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(_average_gradient)


def _average_gradient(p: Tensor) -> None:
    assert p.grad is not None
    dist.all_reduce(p.grad)
    p.grad /= dist.get_world_size()


def replicate(model: nn.Module) -> nn.Module:
    """`model` where it is sharded, else a wrapper around it whose backward passes average gradients over processes
    (DDP)."""
    if number() == 1 or isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)  # no second copy of the gradients


def shard(model: Any, device: torch.device, *, narrow: bool = False) -> None:
    """Shard a transformers model in place (FSDP2): between uses a process holds its part of every weight, on `device`.

    Blocks go to the device and are cut one after the other. Of weights that are mapped from a file, a process on the
    CPU reads its part alone. narrow: passes gather weights as bfloat16 and compute in it; the parts and the gradients,
    summed over processes, keep their dtype, which is float32. Does nothing for a model that is sharded already.
    """
    if isinstance(model, FSDPModule):
        return
    mesh = init_device_mesh(device.type, (number(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if narrow else MixedPrecisionPolicy()
    blocks = set(model._no_split_modules or ())  # names of the classes that transformers keeps whole on a device
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    for module in reversed(list(model.modules())):  # a block inside another comes first
        tied = any(uses[p] > 1 for p in module.parameters())  # such a weight is gathered with the rest of the model
        if type(module).__name__ in blocks and not tied:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of a model that may be sharded, as they are between uses: a pass leaves the outermost weights gathered, and
    in mixed precision narrow."""
    if isinstance(model, FSDPModule):
        model.reshard()
    return model.named_parameters()


def averages_gradients(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a forward and a backward pass of `replicate`'s result: only with the `last` before a step the gradients
    summed so far are averaged. A sharded model, which has room for its part of them alone, does so in every pass."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def full(value: Tensor) -> Tensor:
    """A tensor that may be sharded, as a whole. All processes take part."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part(value: Tensor) -> Tensor:
    """Of a tensor that may be sharded, what this process holds."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without sharding. All processes take part; sharded ones come to the host, and only in the first."""
    gathered = {}
    for name, value in weights.items():
        gathered[name] = full(value)
        if isinstance(value, DTensor):
            gathered[name] = gathered[name].cpu() if index() == 0 else gathered[name].new_empty(0)
    return gathered


def like(value: Tensor, p: Tensor) -> Tensor:
    """A copy of `value`, whole and the same in all processes, where `p` lies, and, with its shape, sharded as it is.
    Only the part of this process is copied: of a tensor that is mapped from a file, no more is read."""
    if not isinstance(p, DTensor) or value.shape != p.shape:
        return value.to(p.device, copy=True)
    shape, start = compute_local_shape_and_global_offset(value.shape, p.device_mesh, p.placements)
    own = value[tuple(slice(i, i + n) for i, n in zip(start, shape, strict=True))].to(p.device, copy=True)
    return DTensor.from_local(
        own, p.device_mesh, p.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def optimizer_state_like(state: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's state of whole tensors for `load_state_dict`: copies, those of a parameter's shape sharded as it
    is."""
    of_parameters = {
        i: {name: like(value, parameters[i]) if isinstance(value, Tensor) else value for name, value in values.items()}
        for i, values in state["state"].items()
    }
    return state | {"state": of_parameters}
