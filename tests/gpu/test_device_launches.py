"""How the ops run on a device: launches, memory, synchronisation, compilation, CUDA graphs and torch.compile."""

import json

import cases
import pytest
import torch
from cases import OPERATIONS, assert_same_bits
from numerics import ragged
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import r2m_kernels as rk

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
EVERY_OPERATION = OPERATIONS | {"training step": (cases.step, cases.step_inputs)}
HUGE = 64, 1024, 4096  # 537 MB in bfloat16


@pytest.mark.parametrize("name", EVERY_OPERATION)
def test_the_host_never_waits_for_the_device(name):
    function, make = EVERY_OPERATION[name]
    inputs = make()
    function(**inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", EVERY_OPERATION)
def test_cuda_graphs(name):
    """A graph replayed with other values, lengths and masks in its buffers gives what an eager run gives."""
    function, make = EVERY_OPERATION[name]
    buffers, fresh = make(), make()
    graph, outputs = capture(function, buffers)
    for other in (fresh, make()):
        for key, buffer in buffers.items():
            buffer.copy_(other[key])
        graph.replay()
        expected = function(**other)
        if name == "training step":  # of products by BLAS, which takes another workspace in a graph
            torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
        else:
            assert_same_bits(outputs, expected)


def capture(function, buffers):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(**buffers)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(**buffers)
    return graph, outputs


@pytest.fixture
def kernels(tmp_path):
    """The names of the kernels that a call launches, in order."""

    def run(function):
        function()  # compiles
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            results = function()
            torch.cuda.synchronize()
        del results
        recorded.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        found = [event for event in events if event.get("cat") == "kernel"]
        return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]

    return run


def test_the_profiler_sees_every_kernel(kernels):
    x = torch.randn(1000)
    assert len(kernels(lambda: [x + 1, x * 2, x.sqrt()])) == 3


ROWS, MERGE, SCORES, SUMS, OUTER = (f"{name}_kernel" for name in ("rows", "merge", "scores", "sums", "outer"))


@pytest.mark.parametrize(
    ("form", "queries", "length", "expected"),
    [
        ("dot", 1, 1024, [ROWS, MERGE]),
        ("dot", 1, 32, [ROWS]),  # one chunk
        ("dot", 32, 1024, [SCORES, MERGE]),
        ("dot", 32, 32, [SCORES]),
        ("with_gradient", 1, 1024, [ROWS, MERGE]),
        ("with_gradient", 1, 32, [ROWS]),
        ("with_gradient", 32, 16384, [SCORES, SUMS, MERGE]),
        ("with_gradient", 32, 32, [SCORES, SUMS]),
    ],
    ids=str,
)
def test_launches_of_a_pool(form, queries, length, expected, kernels, impl):
    query, hidden = torch.randn(2, queries, cases.WIDTH), torch.randn(2, length, cases.WIDTH).bfloat16()
    query, direction = query.squeeze(1), torch.randn(cases.WIDTH)
    function = getattr(rk, f"attention_pool_{form}")
    names = kernels(lambda: function(query, hidden, direction, scale=1.0))
    if impl == "triton":
        assert names == expected
    else:  # one for the chunks, of 128 rows a query, and one that merges
        assert len(names) == (2 if length > 128 * queries else 1), names


@pytest.mark.parametrize("needs_hidden", [False, True])
def test_launches_of_a_backward(needs_hidden, kernels, triton_alone):
    """Beside small ones of PyTorch: one read of hidden, and one write of its gradient where that is needed."""
    query, hidden = torch.randn(2, cases.WIDTH, requires_grad=True), torch.randn(2, 1024, cases.WIDTH).bfloat16()
    leaves = [query, hidden.requires_grad_()] if needs_hidden else [query]
    pooled, upstream = rk.attention_pool(query, hidden, scale=1.0), torch.randn(2, cases.WIDTH)
    names = kernels(lambda: torch.autograd.grad(pooled, leaves, upstream, retain_graph=True))
    assert [name for name in names if name in (ROWS, MERGE, SCORES, SUMS, OUTER)] == [ROWS, MERGE] + [
        OUTER
    ] * needs_hidden
    assert len(names) <= 10


def test_launches_of_fusion_and_grebt(kernels):
    inputs = cases.fusion_inputs()
    weight = inputs.pop("weight")
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    fused = rk.time_weighted_fusion(leaves["aggregated"], leaves["rte"], weight)
    reward = rk.fused_reward(weight=weight, **leaves)
    rewards = torch.randn(64, 8, requires_grad=True)
    groups, mean = (rk.grebt_loss(rewards, reduction=reduction) for reduction in ("none", "mean"))

    def backward(output, inputs):
        upstream = torch.ones_like(output)
        return lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True)

    for launches, function in (
        (1, lambda: rk.time_weighted_fusion(leaves["aggregated"], leaves["rte"], weight)),
        (1, backward(fused, [leaves["aggregated"], leaves["rte"]])),
        (1, lambda: rk.fused_reward(weight=weight, **leaves)),
        (2, backward(reward, list(leaves.values()))),
        (1, lambda: rk.grebt_loss(rewards, reduction="none")),
        (2, lambda: rk.grebt_loss(rewards)),
        (1, backward(groups, rewards)),
        (1, backward(mean, rewards)),
    ):
        assert len(names := kernels(function)) == launches, names


@pytest.mark.parametrize("queries", [1, 2, 32])
@pytest.mark.parametrize("packed", [False, True])
def test_a_pool_takes_a_sixteenth_of_hidden_as_workspace(packed, queries, free_memory):
    """Beyond inputs and outputs; on top come a few scalars of every chunk, and of 32 queries the scores."""
    free_memory(2e9)
    batch, length, width = HUGE
    hidden, where = torch.empty(HUGE, dtype=BF16).normal_(), {}
    if packed:
        hidden, where["cu_seqlens"] = hidden.flatten(0, 1), ragged([length - 24, length + 24] * (batch // 2))
    query, direction = torch.randn(batch, queries, width), torch.randn(width)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = rk.attention_pool_with_gradient(query, hidden, direction, scale=1.0, **where)
    workspace = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results)
    scores = 2 * 4 * queries * batch * length if queries > 4 else 0
    assert workspace <= hidden.nbytes / 16 + scores + (1 << 20)


@pytest.fixture
def compiled(monkeypatch, triton_alone):
    """The kernels that Triton makes ready for new kinds of arguments, from now on."""
    import triton

    names = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **facts: names.append(str(facts["fn"].name))
    )
    return names


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_no_length_or_batch_size_compiles_anything_anew(layout, monkeypatch, compiled):
    """Not even 1 or a multiple of 16, of which Triton would make constants and kinds of their own."""

    def run(lengths):
        monkeypatch.setattr(cases, "LENGTHS", lengths)
        cases.pool(**cases.pool_inputs(layout))

    monkeypatch.setattr(cases, "WIDTH", 256)  # which no other test uses
    run([20000, 1])
    assert compiled
    compiled.clear()
    for lengths in ([1], [2000], [16] * 16, [37, 0, 1023, 5], [2048] * 3, [1, 1, 1]):
        run(lengths)
        assert not compiled, f"lengths {lengths}"


def test_no_number_of_rows_or_groups_compiles_anything_anew(compiled):
    def run(rows):
        embeddings, head = torch.randn(2, rows, 1000).bfloat16(), torch.randn(1000)
        weight = torch.tensor(0.6)
        cases.fusion(weight, aggregated=embeddings[0], rte=embeddings[1], head_weight=head, head_bias=torch.randn(()))
        cases.grebt(torch.randn(rows, 6), torch.randn(rows, 6))

    run(3)
    assert compiled
    compiled.clear()
    for rows in (2, 1, 16, 37, 500):
        run(rows)
        assert not compiled, f"{rows} rows"


def test_a_training_step_compiles_whole_and_once():
    """torch.compile with its code generator, for any batch size and length: the eager step's values and gradients."""
    steps = [cases.step_inputs(batch, length) for batch, length in ((8, 40), (16, 37), (12, 300), (20, 128))]
    torch.set_default_device(None)
    torch._dynamo.reset()
    counters.clear()
    loss = torch.compile(cases.step_loss, fullgraph=True, dynamic=True)
    for inputs in steps:
        trained = [t.requires_grad_() for name, t in inputs.items() if name not in ("hidden", "mask", "weight")]
        one, other = loss(**inputs), cases.step_loss(**inputs)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(value, trained) for value in (one, other)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
