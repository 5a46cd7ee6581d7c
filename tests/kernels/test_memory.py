import gc
import weakref

import pytest
import torch
from numerics import ragged
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r2m_kernels import attention_pool, dispatch, policy_feedback_reward
from r2m_kernels.attention_pool.torch_impl import TILE_CPU

B, S, D = 4, 1200, 1024


class Allocations(TorchDispatchMode):
    """Records the bytes of every new tensor that operations make, except inside custom operators: these hide theirs."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result) if "aten::set_" not in func.name() else []:  # takes a storage that is there
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.sizes.append(t.untyped_storage().nbytes())
        return result


def layout(name, dtype):
    hidden = torch.randn(B, S, D, dtype=dtype)
    if name == "packed":
        return hidden.flatten(0, 1), {"cu_seqlens": ragged([2000, 0, 1, 2799])}
    return hidden, {"mask": torch.rand(B, S) > 0.1} if name == "masked" else {}


def forms(impl, heads, hidden, cu_seqlens=None, mask=None):
    """The forms of the implementation's pool and their arguments; the gradient of hidden is of its size."""
    batch = B if cu_seqlens is None else cu_seqlens.numel() - 1
    shape = batch, heads, hidden.shape[-1]
    query, direction = torch.randn(shape), torch.randn(shape)
    pool, where = dispatch.implementation("attention_pool", impl).pool, (cu_seqlens, mask)
    return [
        (pool, (query, hidden, None, *where)),
        (pool, (query, hidden, direction, *where, False)),
        (pool, (query, hidden, direction, *where)),
        (pool, (query, hidden, direction, *where, True, True)),
    ]


@pytest.mark.parametrize("name", ["dense", "masked", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_hidden_is_made(impl, name, dtype):
    hidden, where = layout(name, dtype)
    for function, arguments in forms(impl, 1, hidden, **where):
        with Allocations() as seen:
            function(*arguments)
        assert 0 < max(seen.sizes) <= 4 * TILE_CPU  # one tile in float32
        assert max(seen.sizes) < hidden.nbytes / 4


@pytest.mark.parametrize("lengths", [[500, 0, 1, 199], [3] * 20 + [130] * 4], ids=["long", "short"])
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_the_workspace_has_at_most_a_sixteenth_of_the_bytes_of_hidden(impl, heads, lengths):
    if impl == "torch":
        pytest.skip("the torch implementation works in tiles")
    hidden, cu_seqlens = torch.randn(sum(lengths), 128).bfloat16(), ragged(lengths)
    for function, arguments in forms(impl, heads, hidden, cu_seqlens):
        with Allocations() as seen:
            results = function(*arguments)
        # Beside it: results, and a few numbers a row or a sequence.
        made = sum(t.nbytes for t in results if isinstance(t, torch.Tensor))
        beside = made + 4 * (2 * heads + 1) * (hidden.shape[0] + 8 * len(lengths))
        assert sum(seen.sizes) <= hidden.nbytes / 16 + beside


def test_the_recorder_sees_a_copy_of_hidden():
    hidden = torch.randn(B, S, D).bfloat16()
    with Allocations() as seen:
        (hidden.float() + 1).sum()
    assert max(seen.sizes) == 2 * hidden.nbytes


def reward_inputs(hidden):
    shapes = {"w_q": (8, 16), "w_k": (8, D), "w_v": (8, D), "w_o": (16, 8), "head_weight": (16,)}
    weights = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    return {"rte": torch.randn(B, 16), "hidden": hidden, **weights}


@pytest.mark.parametrize("name", ["dense", "masked", "packed"])
def test_training_keeps_nothing_of_hidden(name):
    hidden, where = layout(name, torch.bfloat16)
    inputs, kept = reward_inputs(hidden), []
    storage = hidden.untyped_storage().data_ptr()

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reward = policy_feedback_reward(**inputs, weight=0.5, **where)
    assert kept
    assert all(tensor.untyped_storage().data_ptr() != storage for tensor in kept)
    assert max(tensor.untyped_storage().nbytes() for tensor in kept) <= 4 * max(B, 8) * D  # a weight, or u or c
    gone = weakref.ref(hidden)
    del hidden, inputs["hidden"]
    gc.collect()
    assert gone() is None
    reward.sum().backward()
    assert inputs["w_k"].grad.abs().sum() > 0


def test_hidden_made_under_inference_mode_is_not_kept_either():
    with torch.inference_mode():
        hidden = torch.randn(B, 50, D)
    inputs = reward_inputs(hidden)
    reward = policy_feedback_reward(**inputs, weight=0.5)
    gone = weakref.ref(hidden)
    del hidden, inputs["hidden"]
    gc.collect()
    assert gone() is None
    reward.sum().backward()


def test_the_pool_under_autograd_lets_hidden_go_with_its_graph():
    with torch.inference_mode():
        hidden = torch.randn(B, 50, D)
    query = torch.randn(B, D, requires_grad=True)
    pooled = attention_pool(query, hidden)
    gone = weakref.ref(hidden)
    del hidden
    gc.collect()
    assert gone() is not None
    del pooled
    gc.collect()
    assert gone() is None
