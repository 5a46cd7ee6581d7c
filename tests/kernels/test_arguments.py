"""Every argument that does not fit raises ValueError or TypeError that says which, what was given, what is expected."""

import contextlib
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import r2m_kernels as rk
from r2m_kernels import checks, dispatch, extension

B, S, D, D_RM, D_IN, K = 3, 7, 8, 12, 6, 4
META = torch.device("meta")
FASTEST_FIRST = dict(dispatch.FASTEST_FIRST)  # as it is before fixtures name one implementation


@pytest.fixture(autouse=True)
def _on_the_cpu(_same_random_numbers_every_run):
    """The checks look at shapes, dtypes and whether devices are the same: what they say is the same everywhere."""
    torch.set_default_device("cpu")


class NothingRuns(TorchDispatchMode):
    """Fails if any tensor operation runs inside but the random numbers of the arguments themselves."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.randn.default:
            return func(*args, **kwargs)
        raise AssertionError(f"{func} ran before the arguments were checked")


@contextlib.contextmanager
def refuses(error, message):
    """The call inside raises this error, before any tensor operation."""
    with pytest.raises(error, match=message), NothingRuns():
        yield


def pool(**changes):
    return {"query": torch.randn(B, D), "hidden": torch.randn(B, S, D)} | changes


def packed(**changes):
    hidden, cu_seqlens = torch.randn(B * S, D), torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    return {"query": torch.randn(B, D), "hidden": hidden, "cu_seqlens": cu_seqlens} | changes


POOL_ERRORS = [
    (pool(query=[1.0]), TypeError, r"query: expected a torch.Tensor, got list"),
    (pool(hidden=None), TypeError, r"hidden: expected a torch.Tensor, got NoneType"),
    (pool(query=torch.ones(B, D, dtype=torch.int64)), TypeError, r"query: expected float32, .* got torch.int64"),
    (pool(hidden=torch.ones(B, S, D, dtype=torch.int8)), TypeError, r"hidden: expected float32, .* got torch.int8"),
    (pool(hidden=torch.randn(B, S, D).double()), TypeError, r"float64 does not mix .* query torch.float32, hidden"),
    (pool(query=torch.randn(D)), ValueError, r"query: expected shape \[B, D\] or \[B, H, D\], got \[8\]"),
    (pool(query=torch.randn(B, 0)), ValueError, r"query: expected shape \[B, D\] or \[B, H, D\], got \[3, 0\]"),
    (pool(hidden=torch.randn(B, D)), ValueError, r"hidden: expected shape \[B, S, D\], got \[3, 8\]"),
    (
        pool(hidden=torch.randn(B, S, D + 1)),
        ValueError,
        r"hidden: expected shape \[B, S, D\] to go with query = \[3, 7, 8\], got \[3, 7, 9\]",
    ),
    (pool(hidden=torch.randn(B + 1, S, D)), ValueError, r"hidden: .* = \[3, 7, 8\], got \[4, 7, 8\]"),
    (pool(hidden=torch.randn(B, S, D, device=META)), ValueError, r"one device, got query on cpu, hidden on meta"),
    (pool(mask=[True]), TypeError, r"mask: expected a torch.bool tensor, True = attend, got list"),
    (pool(mask=torch.ones(B, S)), TypeError, r"mask: expected a torch.bool tensor, True = attend, got torch.float32"),
    (pool(mask=torch.ones(B, S + 1).bool()), ValueError, r"mask: expected shape \[B, S\] = \[3, 7\], got \[3, 8\]"),
    (pool(mask=torch.ones(B, S, device=META).bool()), ValueError, r"one device, got hidden on cpu, mask on meta"),
    (pool(scale="1"), TypeError, r"scale: expected a number, got str"),
    (pool(scale=torch.tensor(1.0)), TypeError, r"scale: expected a number, got Tensor"),
    (pool(impl="cuda"), ValueError, r"impl: expected 'auto' or one of \['extension', 'torch', 'triton'\], got 'cuda'"),
    (packed(mask=torch.ones(B, S).bool()), ValueError, r"mask: expected None together with cu_seqlens"),
    (packed(cu_seqlens=[0, 3]), TypeError, r"cu_seqlens: expected a torch.int32 tensor, got list"),
    (packed(cu_seqlens=torch.tensor([0, 1, 2, 3])), TypeError, r"cu_seqlens: .* torch.int32 .* got torch.int64"),
    (
        packed(cu_seqlens=torch.zeros(B, dtype=torch.int32)),
        ValueError,
        r"cu_seqlens: expected shape \[B \+ 1\] = \[4\], got \[3\]",
    ),
    (packed(cu_seqlens=torch.zeros(B + 1, 1, dtype=torch.int32)), ValueError, r"cu_seqlens: .* got \[4, 1\]"),
    (
        packed(cu_seqlens=torch.zeros(B + 1, dtype=torch.int32, device=META)),
        ValueError,
        r"one device, got hidden on cpu, cu_seqlens on meta",
    ),
    (packed(hidden=torch.randn(B, S, D)), ValueError, r"hidden: expected shape \[total, D\], got \[3, 7, 8\]"),
    (packed(hidden=torch.randn(21, D + 1)), ValueError, r"hidden: expected shape \[total, D\] to go with query"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), POOL_ERRORS, ids=range(len(POOL_ERRORS)))
def test_pool_arguments(arguments, error, message):
    with refuses(error, message):
        rk.attention_pool(**arguments)
    for function in (rk.attention_pool_dot, rk.attention_pool_with_gradient):
        with refuses(error, message.replace("query torch.float32, hidden", ".* hidden")):
            function(**arguments, direction=torch.randn(D))


DIRECTION_ERRORS = [
    ((B, D), (D + 1,), r"direction: expected shape \[D\] = \[8\] or like query = \[3, 8\], got \[9\]"),
    ((B, D), (2, D), r"direction: .* got \[2, 8\]"),
    ((B, 2, D), (B, D), r"direction: expected shape \[D\] = \[8\] or \[H, D\] = \[2, 8\] or like query = \[3, 2, 8\]"),
]


@pytest.mark.parametrize(("query", "direction", "message"), DIRECTION_ERRORS)
@pytest.mark.parametrize("function", [rk.attention_pool_dot, rk.attention_pool_with_gradient])
def test_direction_of_a_wrong_shape(function, query, direction, message):
    with pytest.raises(ValueError, match=message):
        function(torch.randn(query), torch.randn(B, S, D), torch.randn(direction))


def test_direction_of_a_wrong_dtype_or_device():
    with pytest.raises(TypeError, match="direction: expected float32"):
        rk.attention_pool_dot(**pool(), direction=torch.ones(D, dtype=torch.int32))
    with pytest.raises(ValueError, match="one device, got query on cpu, hidden on cpu, direction on meta"):
        rk.attention_pool_dot(**pool(), direction=torch.ones(D, device=META))


@pytest.mark.parametrize("name", ["triton", "extension"])
def test_an_explicit_choice_that_cannot_run_says_why(name, monkeypatch):
    reason = "it has no wheels"
    monkeypatch.setattr(dispatch, "_reason", lambda name, device: None if name == "torch" else reason)
    inputs = reward()
    rte, rewards = torch.randn(B, D), torch.randn(B, K)
    for call in (
        lambda: rk.attention_pool(**pool(), impl=name),
        lambda: rk.attention_pool_dot(**pool(), direction=torch.randn(D), impl=name),
        lambda: rk.attention_pool_with_gradient(**pool(), direction=torch.randn(D), impl=name),
        lambda: rk.policy_feedback_reward(**inputs, impl=name),
        lambda: rk.sequence_to_token_attention(**attention(), impl=name),
        lambda: rk.time_weighted_fusion(rte, rte, 0.5, impl=name),
        lambda: rk.fused_reward(rte, rte, 0.5, torch.randn(D), impl=name),
        lambda: rk.grebt_loss(rewards, impl=name),
    ):
        with pytest.raises(RuntimeError, match=f"impl='{name}' cannot run: {reason}"):
            call()


def test_torch_is_always_available_and_the_caller_cannot_change_the_table():
    table = rk.available_implementations()
    assert sorted(table) == ["extension", "torch", "triton"]
    assert table["torch"] is None
    table["torch"] = "broken"
    assert rk.available_implementations()["torch"] is None


def test_the_default_is_the_fastest_implementation_bit_by_bit(impl, request):
    inputs = {name: t.to(request.config.getoption("device")) for name, t in pool().items()}
    assert torch.equal(rk.attention_pool(**inputs), rk.attention_pool(**inputs, impl=impl))


def test_triton_needs_a_gpu_or_its_interpreter_and_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: Triton (is not installed|needs a GPU, .*'cpu')"):
        rk.attention_pool(**pool(), impl="triton")


@pytest.mark.parametrize("name", ["triton", "extension"])
def test_float64_runs_in_torch_only(name, monkeypatch):
    monkeypatch.setattr(dispatch, "_reason", lambda name, device: None)
    monkeypatch.setitem(dispatch.FASTEST_FIRST, "cpu", (name, "torch"))
    query, hidden = torch.randn(B, D).double(), torch.randn(B, S, D).double()
    with pytest.raises(RuntimeError, match=f"impl='{name}' cannot run: float64 runs in 'torch' only"):
        rk.attention_pool(query, hidden, impl=name)
    assert torch.equal(rk.attention_pool(query, hidden), rk.attention_pool(query, hidden, impl="torch"))


def test_the_extension_takes_rows_of_adjacent_elements_only(monkeypatch):
    monkeypatch.setattr(dispatch, "_reason", lambda name, device: None)
    monkeypatch.setitem(dispatch.FASTEST_FIRST, "cpu", ("extension", "torch"))
    inputs = pool(hidden=torch.randn(B, S, 2 * D)[..., ::2])
    with pytest.raises(RuntimeError, match=r"hidden: expected a stride of 1 in the last dimension, got 2"):
        rk.attention_pool(**inputs, impl="extension")
    assert torch.equal(rk.attention_pool(**inputs), rk.attention_pool(**inputs, impl="torch"))


@pytest.mark.parametrize(
    ("capability", "queries", "width", "first"),
    [
        ((9, 0), 1, 2048, "triton"),
        ((9, 0), 1, 4096, "extension"),
        ((9, 0), 8, 896, "extension"),
        ((10, 0), 4, 8192, "extension"),
        ((8, 0), 8, 8192, "triton"),
    ],
)
def test_the_fastest_on_a_gpu_goes_by_queries_and_width(monkeypatch, capability, queries, width, first):
    monkeypatch.setattr(dispatch, "FASTEST_FIRST", FASTEST_FIRST)
    monkeypatch.setattr(dispatch, "_reason", lambda name, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    dispatch._has_clusters.cache_clear()
    hidden = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=torch.Size([2, 3, width]))
    assert dispatch.choose("auto", hidden, op="attention_pool", queries=queries) == first
    assert dispatch.choose("auto", hidden, op="fusion") == "triton"
    monkeypatch.setattr(dispatch, "_reason", lambda name, device: None if name != "extension" else "not built")
    assert dispatch.choose("auto", hidden, op="attention_pool", queries=queries) == "triton"
    dispatch._has_clusters.cache_clear()


def test_the_extension_says_what_it_cannot_run_on(monkeypatch):
    monkeypatch.setattr(extension, "reason", lambda device_type: None)
    monkeypatch.setattr(dispatch, "_new_enough", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU of 2018")
    why_not = "needs compute capability 8.0 or newer, and a GPU of 2018 is older"
    assert dispatch._reason("extension", "cuda:0") == why_not
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dispatch._reason("extension", "cuda:0") is None


WRONG_ROWS = [
    ([-1, 3, 5, 7], r"got cu_seqlens\[0\] = -1$"),
    ([0, 5, 3, 7], r"got cu_seqlens\[2\] = 3 after 5$"),
    ([0, 3, 5, 22], r"got cu_seqlens\[3\] = 22 after 5$"),
    ([0, 3, 5, 100_000_000], r"got cu_seqlens\[3\] = 100000000 after 5$"),
]


@pytest.mark.parametrize(("rows", "message"), WRONG_ROWS)
def test_sequences_of_rows_that_are_not_there(rows, message):
    """On a CPU. On GPUs, where it would have to be waited for, only with R2M_KERNELS_DEBUG."""
    message = r"^cu_seqlens: expected 0 <= cu_seqlens\[0\] <= ... <= cu_seqlens\[3\] <= 21 rows of hidden, " + message
    inputs = packed(cu_seqlens=torch.tensor(rows, dtype=torch.int32))
    weights = attention(**{name: inputs[name] for name in ("hidden", "cu_seqlens")})
    direction = torch.randn(D)
    for call in (
        lambda: rk.attention_pool(**inputs),
        lambda: rk.attention_pool_dot(**inputs, direction=direction),
        lambda: rk.attention_pool_with_gradient(**inputs, direction=direction),
        lambda: rk.sequence_to_token_attention(**weights),
        lambda: rk.policy_feedback_reward(**weights, head_weight=torch.ones(D_RM), weight=0.5),
        lambda: torch.compile(rk.attention_pool, fullgraph=True, backend="aot_eager")(**inputs),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_no_sequences_and_an_offset_past_the_end():
    query, hidden = torch.randn(0, D), torch.randn(3, D, requires_grad=True)
    with pytest.raises(ValueError, match=r"cu_seqlens\[0\] = 1000000"):
        rk.attention_pool(query, hidden, cu_seqlens=torch.tensor([1_000_000], dtype=torch.int32))


def test_lengths_of_another_device_than_a_cpu_are_read_for_debugging_alone(monkeypatch):
    class OnAGPU:
        device, is_meta = torch.device("cuda"), False

        def tolist(self):
            return [0, 5]

        def contiguous(self):
            return "not read"

    assert checks.packed_rows(OnAGPU(), 3) == "not read"
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(ValueError, match=r"<= 3 rows of hidden, got cu_seqlens\[1\] = 5 after 0"):
        checks.packed_rows(OnAGPU(), 3)


@pytest.mark.parametrize("where", [{}, {"R2M_KERNELS_DEBUG": "1"}])
def test_the_switch_for_debugging_is_an_environment_variable(where):
    environment = {key: value for key, value in os.environ.items() if key != "R2M_KERNELS_DEBUG"}
    code = "from r2m_kernels import checks; print(checks.DEBUG)"
    output = subprocess.check_output([sys.executable, "-c", code], env=environment | where, text=True)
    assert output == f"{bool(where)}\n"


def test_a_choice_that_cannot_take_these_rows_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "_reason", lambda name, device: None)
    hidden = torch.randn(B, S, 2 * D)[..., ::2]
    for function, arguments in (
        (rk.sequence_to_token_attention, attention(hidden=hidden)),
        (rk.policy_feedback_reward, reward(hidden=hidden)),
    ):
        with pytest.raises(RuntimeError, match=r"hidden: expected a stride of 1 .* got 2"), NothingRuns():
            function(**arguments, impl="extension")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A machine with a GPU, as far as the choice of an implementation can see."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_too_old", lambda device: None)
    dispatch._triton_error.cache_clear()
    yield
    dispatch._triton_error.cache_clear()


def test_a_triton_that_is_too_old_says_so(on_a_gpu, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.delitem(sys.modules, "r2m_kernels.triton_target", raising=False)
    monkeypatch.setattr(triton, "__version__", "3.5.1+git1234")
    assert "expected Triton 3.6 or newer, got 3.5.1" in dispatch._reason("triton", "cuda:0")


def test_a_triton_that_is_broken_is_passed_over_with_its_message(on_a_gpu, monkeypatch):
    tried = []

    def fails(name):
        tried.append(name)
        raise OSError("libcuda.so: cannot open shared object file")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(importlib, "import_module", fails)
    reason = "Triton cannot be loaded: OSError: libcuda.so: cannot open shared object file"
    assert dispatch._reason("triton", "cuda:0") == dispatch._reason("triton", "cuda:0") == reason
    assert len(tried) == 1


def test_an_operator_without_an_implementation_takes_the_next_one(tmp_path, monkeypatch):
    """A folder with a torch_impl alone, as CONTRIBUTING's steps begin."""
    (tmp_path / "doubling").mkdir()
    (tmp_path / "doubling" / "__init__.py").write_text("")
    (tmp_path / "doubling" / "torch_impl.py").write_text("def doubled(x):\n    return 2 * x\n")
    monkeypatch.setattr(rk, "__path__", [*rk.__path__, str(tmp_path)])
    monkeypatch.setattr(dispatch, "_reason", lambda name, device: None)
    monkeypatch.setitem(dispatch.FASTEST_FIRST, "cpu", ("extension", "torch"))
    x = torch.ones(2)
    name = dispatch.choose("auto", x, op="doubling")
    assert name == "torch"
    assert torch.equal(dispatch.implementation("doubling", name).doubled(x), 2 * x)
    with pytest.raises(
        RuntimeError, match=r"impl='extension' cannot run: r2m_kernels/doubling has no extension_impl.py"
    ):
        dispatch.choose("extension", x, op="doubling")
    assert dispatch.choose("auto", x, op="attention_pool") == "extension"


def attention(**changes):
    shapes = {"rte": (B, D_RM), "hidden": (B, S, D), "w_q": (D_IN, D_RM), "w_k": (D_IN, D), "w_v": (D_IN, D)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"w_o": torch.randn(D_RM, D_IN)} | changes


def reward(**changes):
    return attention() | {"head_weight": torch.randn(D_RM), "head_bias": torch.randn(()), "weight": 0.5} | changes


ATTENTION_ERRORS = [
    ({"rte": torch.randn(D_RM)}, ValueError, r"rte: expected shape \[B, D_rm\], got \[12\]"),
    (
        {"rte": torch.randn(B + 1, D_RM)},
        ValueError,
        r"hidden: .* to go with rte = \[4, 7, 8\], got \[3, 7, 8\]",
    ),
    ({"w_q": torch.randn(D_IN, D_RM + 1)}, ValueError, r"w_q: .* to go with rte = \[d, 12\], got \[6, 13\]"),
    ({"w_q": torch.randn(D_RM, D_IN)}, ValueError, r"w_q: .* to go with rte = \[d, 12\], got \[12, 6\]"),
    ({"w_k": torch.randn(D_IN + 1, D)}, ValueError, r"w_k: .* to go with hidden and w_q = \[6, 8\], got \[7, 8\]"),
    ({"w_k": torch.randn(D, D_IN)}, ValueError, r"w_k: .* to go with hidden and w_q = \[6, 8\], got \[8, 6\]"),
    ({"w_v": torch.randn(D, D_IN)}, ValueError, r"w_v: .* like w_k = \[6, 8\], got \[8, 6\]"),
    ({"w_v": torch.randn(D_IN, D + 1)}, ValueError, r"w_v: .* like w_k = \[6, 8\], got \[6, 9\]"),
    ({"w_o": torch.randn(D_IN, D_RM)}, ValueError, r"w_o: expected shape \[D_rm, d\] = \[12, 6\], got \[6, 12\]"),
    ({"hidden": torch.randn(B, S, D + 1)}, ValueError, r"w_k: .* to go with hidden and w_q = \[6, 9\], got \[6, 8\]"),
    ({"hidden": torch.randn(B, D)}, ValueError, r"hidden: expected shape \[B, S, D\], got \[3, 8\]"),
    ({"w_q": torch.randn(D_IN, D_RM).double()}, TypeError, r"float64 does not mix with other dtypes"),
    ({"w_o": torch.ones(D_RM, D_IN).int()}, TypeError, r"w_o: expected float32, .* got torch.int32"),
    ({"w_v": torch.randn(D_IN, D, device=META)}, ValueError, r"one device, got .* w_v on meta"),
    ({"num_heads": 4}, ValueError, r"num_heads: expected a positive divisor of the width d = 6, got 4"),
    ({"num_heads": 0}, ValueError, r"num_heads: .* got 0"),
    ({"num_heads": 2.0}, TypeError, r"num_heads: expected an int, got float"),
    ({"mask": torch.ones(B, S)}, TypeError, r"mask: expected a torch.bool tensor"),
    (
        {"hidden": torch.randn(B * S, D), "cu_seqlens": torch.zeros(B + 1)},
        TypeError,
        r"cu_seqlens: expected a torch.int32 tensor",
    ),
    ({"impl": "numpy"}, ValueError, r"impl: expected 'auto' or one of"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ATTENTION_ERRORS, ids=range(len(ATTENTION_ERRORS)))
def test_attention_and_reward_arguments(changes, error, message):
    with refuses(error, message):
        rk.sequence_to_token_attention(**attention(**changes))
    with refuses(error, message):
        rk.policy_feedback_reward(**reward(**changes))


def test_value_bias_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"v_bias: expected shape \[d\] = \[6\], got \[8\]"):
        rk.sequence_to_token_attention(**attention(), v_bias=torch.randn(D))


HEAD_ERRORS = [
    (
        {"head_weight": torch.randn(D_RM + 1)},
        ValueError,
        r"head_weight: expected shape \[D_rm\] = \[12\] or \[1, D_rm\] = \[1, 12\], got \[13\]",
    ),
    ({"head_weight": torch.randn(2, D_RM)}, ValueError, r"head_weight: .* = \[1, 12\], got \[2, 12\]"),
    ({"head_weight": torch.randn(D_RM, 1)}, ValueError, r"head_weight: .* = \[1, 12\], got \[12, 1\]"),
    ({"head_bias": torch.randn(2)}, ValueError, r"head_bias: expected shape 0-dim = \[\] or \[1\] = \[1\], got \[2\]"),
    ({"head_bias": 0.5}, TypeError, r"head_bias: expected a torch.Tensor, got float"),
    ({"weight": "0.5"}, TypeError, r"weight: expected a number, got str"),
    ({"weight": torch.tensor([0.5])}, ValueError, r"weight: expected shape 0-dim = \[\], got \[1\]"),
    ({"weight": torch.tensor(1)}, TypeError, r"weight: expected a float or a 0-dim floating tensor, got torch.int64"),
    (
        {"weight": torch.tensor(0.5, device=META)},
        ValueError,
        r"weight: expected a float or a tensor on cpu, got one on meta",
    ),
    ({"weight": torch.tensor(0.5, requires_grad=True)}, ValueError, r"weight: expected a constant .* requires grad"),
]


@pytest.mark.parametrize(("changes", "error", "message"), HEAD_ERRORS, ids=range(len(HEAD_ERRORS)))
def test_head_and_weight_arguments(changes, error, message):
    with refuses(error, message):
        rk.policy_feedback_reward(**reward(**changes))
    head = {name: value for name, value in reward(**changes).items() if name in ("weight", "head_weight", "head_bias")}
    embeddings = torch.randn(B, D_RM), torch.randn(B, D_RM)
    with refuses(error, message):
        rk.fused_reward(*embeddings, **head)
    pools = torch.randn(B, D), torch.randn(D), torch.randn(B, D), torch.randn(B, D)
    with refuses(error, message):
        rk.reward_from_pools(*pools, embeddings[1], **head)
    if "weight" in changes:
        head_without_bias = {name: head[name] for name in ("weight", "head_weight")}
        with refuses(error, message):
            rk.time_weighted_fusion(*embeddings, head["weight"])
        with refuses(error, message):
            rk.reward_direction(torch.randn(D_IN, D), torch.randn(D_RM, D_IN), **head_without_bias)


def test_embeddings_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"aggregated: expected shape \[B, D_rm\] like rte = \[3, 8\], got \[3, 9\]"):
        rk.time_weighted_fusion(torch.randn(3, 9), torch.randn(3, 8), 0.5)
    with pytest.raises(ValueError, match=r"rte: expected shape \[B, D_rm\], got \[8\]"):
        rk.fused_reward(torch.randn(8), torch.randn(8), 0.5, torch.randn(8))


def test_reward_from_pools_shapes():
    good = {"u": torch.randn(B, 2, D), "g": torch.randn(2, D), "rte": torch.randn(B, D_RM)}
    good |= {"pooled": torch.randn(B, 2, D), "gradient": torch.randn(B, 2, D), "head_weight": torch.randn(D_RM)}
    assert rk.reward_from_pools(**good, weight=0.5).shape == (B,)
    for name, shape, message in (
        ("u", (D,), r"u: expected shape \[B, D_p\] or \[B, heads, D_p\], got \[8\]"),
        ("g", (D,), r"g: expected shape u without B = \[2, 8\], got \[8\]"),
        ("pooled", (B, D), r"pooled: expected shape like u = \[3, 2, 8\], got \[3, 8\]"),
        ("gradient", (B, 1, D), r"gradient: expected shape like u = \[3, 2, 8\], got \[3, 1, 8\]"),
        ("rte", (B + 1, D_RM), r"rte: expected shape \[B, D_rm\] to go with u = \[3, 12\], got \[4, 12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.reward_from_pools(**(good | {name: torch.randn(shape)}), weight=0.5)


def test_absorbed_query_and_reward_direction_shapes():
    with pytest.raises(ValueError, match=r"w_k: expected shape \[d, D_p\] to go with w_q = \[6, D_p\], got \[5, 8\]"):
        rk.absorbed_query(torch.randn(B, D_RM), torch.randn(D_IN, D_RM), torch.randn(5, D))
    with pytest.raises(TypeError, match=r"rte: expected a torch.Tensor, got list"):
        rk.absorbed_query([1.0], torch.randn(D_IN, D_RM), torch.randn(5, D))
    with pytest.raises(ValueError, match=r"w_v: expected shape \[d, D_p\] to go with w_o = \[5, D_p\], got \[6, 8\]"):
        rk.reward_direction(torch.randn(D_IN, D), torch.randn(D_RM, 5), torch.randn(D_RM), weight=0.5)
    with pytest.raises(ValueError, match=r"w_o: expected shape \[D_rm, d\] to go with head_weight = \[8, d\], got"):
        rk.reward_direction(torch.randn(D_IN, D), torch.randn(D_RM, D_IN), torch.randn(8), weight=0.5)
    with pytest.raises(ValueError, match=r"head_weight: expected shape \[D_rm\] or \[1, D_rm\], got \[\]"):
        rk.reward_direction(torch.randn(D_IN, D), torch.randn(D_RM, D_IN), torch.randn(()), weight=0.5)


def test_hidden_that_requires_grad_needs_a_choice():
    inputs = reward(hidden=torch.randn(B, S, D, requires_grad=True))
    with refuses(ValueError, r"hidden: expected a tensor that requires no grad \(detach it, or pass hidden_grad=True"):
        rk.policy_feedback_reward(**inputs)
    assert rk.policy_feedback_reward(**inputs, hidden_grad=True).requires_grad
    with torch.no_grad():
        assert not rk.policy_feedback_reward(**inputs).requires_grad


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), 1], ids=lambda number: type(number).__name__)
def test_numbers_may_be_those_of_numpy(number):
    rte = torch.randn(B, D)
    expected = rk.time_weighted_fusion(rte, 2 * rte, float(number))
    assert torch.equal(rk.time_weighted_fusion(rte, 2 * rte, number), expected)
    pooled = rk.attention_pool(**pool(), scale=number)
    assert pooled.dtype == torch.float32
    assert rk.grebt_loss(torch.randn(2, 3), alpha=number, eps=number).dtype == torch.float32


def test_sharded_weights_are_refused_with_what_to_do(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("w_q", "w_o", "head_weight"):
            inputs = reward()
            inputs[name] = distribute_tensor(inputs[name], mesh, [Shard(0)])
            with pytest.raises(TypeError, match=f"{name}: expected a whole tensor, got a DTensor.*{name}.full_tensor"):
                rk.policy_feedback_reward(**inputs)
    finally:
        dist.destroy_process_group()


def test_merge_shapes():
    pooled, lse = torch.randn(2, B, D), torch.randn(2, B)
    with pytest.raises(ValueError, match=r"pooled: expected shape \[P, ..., D\] with at least one part, got \[8\]"):
        rk.merge_pools(torch.randn(D), torch.randn(()))
    with pytest.raises(ValueError, match=r"pooled: expected shape .* got \[0, 3, 8\]"):
        rk.merge_pools(pooled[:0], lse[:0])
    with pytest.raises(ValueError, match=r"lse: expected shape \[P, ...\], pooled without D = \[2, 3\], got \[2, 4\]"):
        rk.merge_pools(pooled, torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"float64 does not mix"):
        rk.merge_pools(pooled, lse.double())
    with pytest.raises(ValueError, match=r"gradient: expected shape like pooled = \[2, 3, 8\], got \[2, 3, 7\]"):
        rk.merge_pools_with_gradient(pooled, torch.randn(2, B, 7), lse, torch.randn(D), scale=1.0)
    for shape in ((7,), (4, D), (2, 2, B, D)):
        with pytest.raises(ValueError, match=r"direction: expected shape \[D\], \[H, D\] or like the merged pool"):
            rk.merge_pools_with_gradient(pooled, pooled, lse, torch.randn(shape), scale=1.0)
    with pytest.raises(TypeError, match=r"scale: expected a number, got NoneType"):
        rk.merge_pools_with_gradient(pooled, pooled, lse, torch.randn(D), scale=None)


GREBT_ERRORS = [
    ([1.0, 2.0], {}, TypeError, r"rewards: expected a torch.Tensor, got list"),
    (torch.ones(2, 3).long(), {}, TypeError, r"rewards: expected float32, .* got torch.int64"),
    (torch.randn(4), {}, ValueError, r"rewards: expected shape \[n, K\] with n >= 1 and K >= 2, got \[4\]"),
    (torch.randn(4, 1), {}, ValueError, r"rewards: .* got \[4, 1\]"),
    (torch.randn(0, 4), {}, ValueError, r"rewards: .* got \[0, 4\]"),
    (torch.randn(2, 3), {"pair_scores": torch.randn(2, 4)}, ValueError, r"pair_scores: .* = \[2, 3\], got \[2, 4\]"),
    (torch.randn(2, 3), {"pair_scores": torch.ones(2, 3).int()}, TypeError, r"pair_scores: .* got torch.int32"),
    (torch.randn(2, 3), {"pair_scores": torch.ones(2, 3, device=META)}, ValueError, r"pair_scores on meta"),
    (torch.randn(2, 3), {"alpha": 1.5}, ValueError, r"alpha: expected a value in \[0, 1\], got 1.5"),
    (torch.randn(2, 3), {"alpha": None}, TypeError, r"alpha: expected a number, got NoneType"),
    (torch.randn(2, 3), {"eps": -1e-3}, ValueError, r"eps: expected a value in \[0, inf\], got -0.001"),
    (torch.randn(2, 3), {"eps": True}, TypeError, r"eps: expected a number, got bool"),
    (torch.randn(2, 3), {"reduction": "avg"}, ValueError, r"reduction: expected one of .*'none'.*, got 'avg'"),
    (torch.randn(2, 3), {"impl": "c"}, ValueError, r"impl: expected 'auto'"),
]


@pytest.mark.parametrize(("rewards", "options", "error", "message"), GREBT_ERRORS, ids=range(len(GREBT_ERRORS)))
def test_grebt_arguments(rewards, options, error, message):
    with refuses(error, message):
        rk.grebt_loss(rewards, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 10, 0.5), ValueError, r"step: expected 1 <= step <= total_steps = 10, got 0"),
        ((11, 10, 0.5), ValueError, r"step: .* got 11"),
        ((1, 0, 0.5), ValueError, r"step: expected 1 <= step <= total_steps = 0, got 1"),
        ((1, 10, -0.1), ValueError, r"floor: expected a value in \[0, 1\], got -0.1"),
        ((1, 10, 1.1), ValueError, r"floor: expected a value in \[0, 1\], got 1.1"),
        ((1, 10, float("nan")), ValueError, r"floor: .* got nan"),
        ((1.0, 10, 0.5), TypeError, r"step: expected an int, got float"),
        ((1, True, 0.5), TypeError, r"total_steps: expected an int, got bool"),
        ((1, 10, None), TypeError, r"floor: expected a number, got NoneType"),
    ],
)
def test_time_weight_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        rk.time_weight(*arguments)


def test_importing_needs_torch_only_and_probes_nothing():
    script = """
import sys, torch
before = set(sys.modules)
import r2m_kernels
assert not torch.cuda.is_initialized()
r2m_kernels.available_implementations()
new = set(sys.modules) - before
assert {name.split(".")[0] for name in new} - sys.stdlib_module_names <= {"r2m_kernels", "torch"}, new
assert not {"triton", "torch.utils.cpp_extension"} & new
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
