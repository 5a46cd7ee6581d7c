import shutil

import numpy as np
import pytest
import torch
from numerics import ragged
from torch._dynamo.utils import counters
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode
from views import KINDS, view

import r2m_kernels as rk
from r2m_kernels.registration import full_precision

OPS = torch.ops.r2m_kernels
B, H, S, D, D_RM, D_INNER = 3, 2, 19, 10, 12, 8


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function):
    """Captured whole, forward and backward, and run by PyTorch's own kernels: no code generation to wait for."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def graphs():
    return counters["stats"]["unique_graphs"]


def op_samples(impl):
    def leaf(*shape):
        return torch.randn(shape, requires_grad=True)

    query, direction = torch.randn(B, H, D), torch.randn(B, H, D)
    dense, packed, weight = torch.randn(B, S, D), torch.randn(B * S, D), torch.tensor(0.4)
    mask, cu_seqlens, rewards = torch.rand(B, S) > 0.4, ragged([30, 0, 20]), torch.randn(5, 4)
    pooled, lse = query.clone(), torch.randn(B, H)
    pools = (query, dense, None, mask, pooled, lse, direction, lse, True, impl)
    return [
        (OPS.attention_pool, (leaf(B, H, D), leaf(B, S, D), None, None, impl)),
        (OPS.attention_pool, (leaf(B, H, D), leaf(B, S, D), None, mask, impl)),
        (OPS.attention_pool, (leaf(B, H, D), leaf(B * S, D), cu_seqlens, None, impl)),
        (OPS.attention_pool, (leaf(B, H, D), dense.bfloat16(), None, None, impl)),
        (OPS.attention_pool_backward, pools),
        (OPS.attention_pool_backward, (*pools[:8], False, impl)),
        (OPS.attention_pool_backward, (query, packed, cu_seqlens, None, *pools[4:])),
        (OPS.attention_pool_dot, (query, dense, direction, None, mask, impl)),
        (OPS.attention_pool_dot, (query, packed, direction[:1].expand(B, H, D), cu_seqlens, None, impl)),
        (OPS.attention_pool_with_gradient, (query, dense, direction, None, mask, impl)),
        (OPS.attention_pool_with_gradient, (query, packed, direction, cu_seqlens, None, impl)),
        (OPS.time_weighted_fusion, (leaf(B, D), leaf(B, D), weight, impl)),
        (OPS.time_weighted_fusion, (leaf(B, D), torch.randn(B, D).bfloat16(), weight, impl)),
        (OPS.time_weighted_fusion_backward, (torch.randn(B, D), weight, torch.bfloat16, None, impl)),
        (OPS.fused_reward, (leaf(B, D), leaf(B, D), weight, leaf(D), leaf(), impl)),
        (OPS.fused_reward, (leaf(B, D), torch.randn(B, D).half(), weight, leaf(D), None, impl)),
        (
            OPS.fused_reward_backward,
            (torch.randn(B), *torch.randn(2, B, D), weight, torch.randn(D), torch.randn(()), False, True, impl),
        ),
        (OPS.grebt_loss, (leaf(5, 4), rewards, 0.3, 0.1, "none", impl)),
        (OPS.grebt_loss_backward, (torch.randn(5), torch.randn(5, 4), rewards)),
    ]


@pytest.mark.parametrize("index", range(19))
def test_opcheck(index, impl):
    pytest.importorskip("expecttest", reason="opcheck imports it")
    samples = op_samples(impl)
    assert len(samples) == 19
    op, arguments = samples[index]
    results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def strided(kind, op, arguments):
    """Views of all tensors, but of hidden only where the extension takes it, whose last stride is 1."""
    kept = (
        arguments[1] if "pool" in str(op) and kind in ("transposed", "every other column", "expanded columns") else None
    )
    for value in arguments:
        if isinstance(value, torch.Tensor) and value is not kept:
            value = view(kind, value.detach()).requires_grad_(value.requires_grad)
        yield value


@pytest.mark.parametrize("kind", KINDS)
def test_fakes_have_the_strides_that_results_of_views_have(kind, impl):
    pytest.importorskip("expecttest", reason="opcheck imports it")
    for op, arguments in op_samples(impl):
        torch.library.opcheck(op, tuple(strided(kind, op, arguments)), test_utils="test_faketensor")


def test_modes_see_the_registered_op():
    seen = []

    class Listing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            seen.append(function)
            return function(*arguments, **(named or {}))

    with Listing():
        rk.attention_pool_dot(torch.randn(B, D), torch.randn(B, S, D), torch.randn(D))
    assert OPS.attention_pool_dot.default in seen


def reward_inputs(batch=B, length=S):
    shapes = {"rte": (batch, D_RM), "hidden": (batch, length, D), "w_q": (D_INNER, D_RM), "w_k": (D_INNER, D)}
    shapes |= {"w_v": (D_INNER, D), "w_o": (D_RM, D_INNER), "head_weight": (D_RM,), "head_bias": ()}
    inputs = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return {name: t.requires_grad_(name not in ("rte", "hidden")) for name, t in inputs.items()}


def step(inputs, weight, **where):
    """Rewards, GREBT, and the gradients of every weight."""
    rewards = rk.policy_feedback_reward(**inputs, weight=weight, num_heads=2, **where)
    return rk.grebt_loss(rewards[None], eps=0.1)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, [t for t in inputs.values() if t.requires_grad])


def assert_same_step(function, inputs, weight, **where):
    loss, expected = function(inputs, weight, **where), step(inputs, weight, **where)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_twenty_tensor_weights_compile_once():
    function, inputs = compiled(step), reward_inputs()
    for t in range(1, 21):
        assert_same_step(function, inputs, torch.tensor(rk.time_weight(t, 20, 0.1)))
        assert graphs() == 1


@pytest.mark.slow
def test_twenty_float_weights_compile_once_more_and_never_again():
    """PyTorch takes the first float for a constant and the second one as the sign that it varies."""
    function, inputs = compiled(step), reward_inputs()
    for t in range(1, 21):
        assert_same_step(function, inputs, 1 - t / 30)
        assert graphs() <= 2


@pytest.mark.slow
def test_float_weights_compile_once_where_dynamic():
    function = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = reward_inputs()
    for t in range(1, 6):
        assert_same_step(function, inputs, 1 - t / 30)
    assert graphs() == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.slow
def test_lengths_and_batch_sizes_compile_once_where_dynamic(packed):
    function = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in ((3, 19), (4, 37), (2, 300), (5, 7)):
        inputs, where = reward_inputs(batch, length), {}
        if packed:
            inputs["hidden"] = inputs["hidden"].flatten(0, 1)
            where["cu_seqlens"] = torch.arange(batch + 1, dtype=torch.int32) * length
        else:
            where["mask"] = torch.rand(batch, length) > 0.3
        assert_same_step(function, inputs, torch.tensor(0.4), **where)
    assert graphs() == 1


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_through_the_code_generator():
    function = torch.compile(rk.policy_feedback_reward, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (19, 33, 47):
            inputs = reward_inputs(length=length) | {"weight": torch.tensor(0.5)}
            torch.testing.assert_close(function(**inputs), rk.policy_feedback_reward(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden_needs_gradient", [False, True])
@pytest.mark.parametrize("heads", [(), (2,)])
def test_pool_compiles_whole(heads, hidden_needs_gradient):
    def run(query, hidden, mask):
        pooled, lse = rk.attention_pool(query, hidden, mask=mask, return_lse=True)
        merged, merged_lse = rk.merge_pools(torch.stack([pooled, 2 * pooled]), torch.stack([lse, lse - 1]))
        return (merged * merged_lse[..., None]).sum()

    query = torch.randn(B, *heads, D, requires_grad=True)
    hidden = torch.randn(B, S, D, requires_grad=hidden_needs_gradient)
    mask = torch.rand(B, S) > 0.3
    leaves = (query, hidden) if hidden_needs_gradient else (query,)
    results = []
    for function in (compiled(run), run):
        value = function(query, hidden, mask)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_every_other_function_compiles_whole():
    module, head = rk.SequenceToTokenAttention(D_RM, D, D_INNER), rk.RewardHead(D_RM)

    def run(rte, hidden, weight):
        aggregated = module(rte, hidden)
        fused = head(rk.time_weighted_fusion(aggregated, rte, weight))
        direct = rk.fused_reward(aggregated, rte, weight, head.weight, head.bias)
        parts = rk.attention_pool_with_gradient(torch.ones(B, D), hidden, torch.ones(D), scale=0.5)
        value, _ = rk.attention_pool_dot(torch.ones(B, D), hidden, torch.ones(D), scale=0.5)
        merged = rk.merge_pools_with_gradient(*(p[None] for p in parts), torch.ones(D), scale=0.5)
        loss, stats = rk.grebt_loss(fused[None], reduction="none", return_stats=True)
        return fused, direct, value, *merged, loss, stats["std"], stats["winner"]

    arguments = torch.randn(B, D_RM), torch.randn(B, S, D), torch.tensor(0.3)
    for one, other in zip(compiled(run)(*arguments), run(*arguments), strict=True):
        torch.testing.assert_close(one, other)
    assert graphs() == 1


def test_an_outer_autocast_changes_nothing_in_a_compiled_step():
    inputs = reward_inputs()
    expected = step(inputs, 0.5)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert torch.equal(compiled(step)(inputs, 0.5), expected)


def test_an_outer_autocast_rounds_no_gradient_of_a_compiled_step():
    inputs = reward_inputs()

    def scaled(inputs):
        return 2.0**13 * step(inputs, 0.5)

    expected = gradients(scaled(inputs), inputs)
    with torch.autocast(torch.get_default_device().type, dtype=torch.float16):
        loss = compiled(scaled)(inputs)
        inside = torch.autograd.grad(loss, [t for t in inputs.values() if t.requires_grad], retain_graph=True)
    for actual in (inside, gradients(loss, inputs)):
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_pools_that_are_kept_by_head_compile():
    pooled, gradient = torch.randn(2, H, B, D).transpose(1, 2)
    assert not pooled.is_contiguous()

    def run(u, g):
        return rk.reward_from_pools(u, g, pooled, gradient, torch.ones(B, 4), torch.ones(4), weight=0.3).sum()

    leaves = torch.randn(B, H, D, requires_grad=True), torch.randn(H, D, requires_grad=True)
    for one, other in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled(run), run)), strict=True):
        assert torch.equal(one, other)


def test_numpy_numbers_are_named_where_a_compiled_function_has_them():
    rte, weight = torch.randn(B, D), np.float64(0.5)
    with pytest.raises(Exception, match=r"weight: expected a number, got ndarray .* pass float\(weight\)"):
        compiled(lambda rte: rk.time_weighted_fusion(rte, rte, weight))(rte)


class Pool(torch.nn.Module):
    def forward(self, query, hidden):
        return rk.attention_pool(query, hidden), rk.attention_pool(query, hidden, scale=hidden.shape[1] ** -0.5)


class Loss(torch.nn.Module):
    def forward(self, rewards):
        return rk.grebt_loss(rewards)


def test_export_keeps_sizes_symbolic(impl):
    length, width, k = Dim("length", min=2), Dim("width", min=2), Dim("k", min=2)
    sample, other = (torch.randn(3, 8), torch.randn(3, 9, 8)), (torch.randn(3, 6), torch.randn(3, 70, 6))
    sizes = {"query": {1: width}, "hidden": {1: length, 2: width}}
    for one, expected in zip(
        export(Pool(), sample, dynamic_shapes=sizes).module()(*other), Pool()(*other), strict=True
    ):
        torch.testing.assert_close(one, expected)
    if impl == "triton":
        pytest.skip("its kernel takes groups of at most 1024")
    program, rewards = export(Loss(), (torch.randn(4, 5),), dynamic_shapes={"rewards": {1: k}}), torch.randn(4, 1500)
    torch.testing.assert_close(program.module()(rewards), rk.grebt_loss(rewards))


def test_hidden_made_under_inference_mode_in_a_compiled_step():
    inputs = reward_inputs()
    expected = gradients(step(inputs, 0.5), inputs)
    with torch.inference_mode():
        inputs["hidden"] = inputs["hidden"].clone()
    for one, other in zip(gradients(compiled(step)(inputs, 0.5), inputs), expected, strict=True):
        assert torch.equal(one, other)


def test_wrong_arguments_raise_the_same_error_when_compiled():
    def run(query, hidden):
        return rk.attention_pool(query, hidden)

    with pytest.raises(Exception, match=r"hidden: expected shape \[B, S, D\]"):
        compiled(run)(torch.randn(B, D), torch.randn(B, S, D + 1))


def test_schema_of_a_decorated_function_is_that_of_the_function():
    @full_precision
    def plain(x: torch.Tensor, flag: bool) -> torch.Tensor:
        return x

    assert torch.library.infer_schema(plain, mutates_args=()) == "(Tensor x, bool flag) -> Tensor"
