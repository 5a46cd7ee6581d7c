"""The pools with `group`: processes that each hold a part of every sequence, beside one process that holds it all."""

import functools
import math
import multiprocessing
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from numerics import assert_accurate, ragged, results_and_gradients
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from r2m_kernels import attention_pool, attention_pool_dot, attention_pool_with_gradient, dispatch

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
B, D = 5, 96
# Rows on each of four ranks: of every sequence, or, packed, of each of the five. Two ranks hold the first two columns.
EVEN, UNEVEN = [32, 32, 32, 32], [70, 0, 130, 5]
PACKED = [[5, 0, 64, 1], [0, 0, 0, 0], [200, 65, 3, 37], [0, 130, 2, 0], [1, 9, 0, 0]]


class Case(NamedTuple):
    rows: list
    heads: tuple[int, ...] = ()
    query: torch.dtype = F32
    hidden: torch.dtype = F32
    scale: float | None = None
    masked: bool = False
    offset: float = 0.0


CASES = {
    "dense": Case(EVEN, scale=1.0),
    "dense, heads": Case(UNEVEN, heads=(3,)),
    "dense, heads, float64": Case(UNEVEN, heads=(3,), query=F64, hidden=F64, scale=0.2),
    "dense, bfloat16": Case(UNEVEN, query=BF16, hidden=BF16),
    "dense, common offset": Case(EVEN, offset=50.0),
    "left padding": Case(UNEVEN, masked=True),
    "left padding, heads, float64": Case(UNEVEN, heads=(2,), query=F64, hidden=F64, masked=True),
    "left padding, hidden in bfloat16": Case(EVEN, hidden=BF16, scale=1.0, masked=True),
    "packed": Case(PACKED),
    "packed, float64": Case(PACKED, query=F64, hidden=F64),
    "packed, heads, hidden in bfloat16": Case(PACKED, heads=(2,), hidden=BF16, scale=-0.3),
    "packed, heads, common offset": Case(PACKED, heads=(2,), offset=50.0),
}


def whole(case, world):
    """What one process is given, the same in every process, and where in hidden each rank's rows are."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        rows = torch.tensor(case.rows)[..., :world]
        packed = rows.ndim == 2
        owner = torch.arange(world).repeat(B if packed else 1).repeat_interleave(rows.flatten())
        total = len(owner)
        tensors = {
            "query": torch.randn(B, *case.heads, D).to(case.query),
            "hidden": (torch.randn(*([total] if packed else [B, total]), D) + case.offset).to(case.hidden),
            "direction": torch.randn(*case.heads, D).to(case.query),
            "upstream": torch.randn(B, *case.heads, D).to(case.query),
            "upstream_lse": torch.randn(B, *case.heads).to(F64 if case.query is F64 else F32),
        }
        options = {"scale": case.scale}
        if packed:
            options["cu_seqlens"] = ragged(rows.sum(1).tolist())
        if case.masked:  # none; some of the first rank's rows; all of them; more; everything
            padding = torch.tensor([0, 7, case.rows[0], case.rows[0] + 1, total])
            options["mask"] = torch.arange(total) >= padding[:, None]
            tensors["hidden"][~options["mask"]] = math.nan
            tensors["upstream_lse"][-1] = math.nan
        if case.offset:  # it makes the gradient of lse large, which would hide the rest
            tensors["upstream_lse"].zero_()
        places = [(owner == rank,) if packed else (slice(None), owner == rank) for rank in range(world)]
    device = torch.get_default_device()
    return tree_map_only(torch.Tensor, lambda t: t.to(device), (tensors, options, places))


def part(case, world, rank):
    """What a rank is given of it."""
    tensors, options, places = whole(case, world)
    tensors["hidden"] = tensors["hidden"][places[rank]]
    if "mask" in options:
        options["mask"] = options["mask"][places[rank]]
    if "cu_seqlens" in options:
        options["cu_seqlens"] = ragged([of_ranks[rank] for of_ranks in case.rows])
    return tensors, options


def results(tensors, options):
    """Every output and gradient of the three forms."""
    query, hidden, direction, *upstream = tensors.values()
    pool = functools.partial(attention_pool, return_lse=True, **options)
    two_reads = results_and_gradients(pool, {"query": query, "hidden": hidden}, upstream)
    one_read = attention_pool_with_gradient(query, hidden, direction, **options)
    scoring = attention_pool_dot(query, hidden, direction, **options)
    names = "pooled of one pass", "gradient of one pass", "lse of one pass", "value", "lse of dot"
    return two_reads | dict(zip(names, (*one_read, *scoring), strict=True))


class Messages(TorchDispatchMode):
    """Records how many numbers this rank sends in each collective."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.numbers.append(sum(t.numel() for t in tree_leaves(args[1])))
        return func(*args, **(kwargs or {}))


def run_rank(rank, world, folder, impl, device):
    """One rank's results of all cases, into `folder`, and what needs no comparison with one process."""
    torch.set_num_threads(1)
    torch.set_default_device(device)
    for kind in dispatch.FASTEST_FIRST:
        dispatch.FASTEST_FIRST[kind] = (impl, "torch")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    group, report = dist.group.WORLD, {}
    for name, case in CASES.items():
        tensors, options = part(case, world, rank)
        with Messages() as messages:
            report[name] = results(tensors, options | {"group": group})
        report[name, "messages"] = messages.numbers

    tensors, options = part(CASES["dense, heads"], world, rank)
    with torch.autocast(torch.device(device).type, dtype=BF16):
        report["autocast"] = results(tensors, options | {"group": group})

    # The tensor that the op is given as it is, without a conversion between, keeps nothing of the group.
    tensors, options = part(CASES["dense"]._replace(heads=(1,)), world, rank)
    leaf, hidden = tensors["query"].requires_grad_(), tensors["hidden"]
    (expected,) = torch.autograd.grad(attention_pool(leaf, hidden, **options).sum(), leaf)
    pooled = attention_pool(leaf, hidden, **options, group=group)
    (alone,) = torch.autograd.grad(attention_pool(leaf, hidden, **options).sum(), leaf)
    assert torch.equal(alone, expected)
    (gradient,) = torch.autograd.grad(pooled.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_pool: second derivatives are not available"):
        gradient.sum().backward()

    members = list(range(1, world, 2))
    subgroup = dist.new_group(members)
    if rank in members:
        tensors, options = part(CASES["packed"], len(members), members.index(rank))
        report["subgroup"] = results(tensors, options | {"group": subgroup})
    else:
        with pytest.raises(ValueError, match=f"group: expected a process group .* and rank {rank} is not"):
            attention_pool(leaf, hidden, group=subgroup)
    with pytest.raises(TypeError, match=r"group: expected a torch.distributed.ProcessGroup, got list"):
        attention_pool(leaf, hidden, group=members)
    torch.save(report, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def reports(request, tmp_path_factory):
    """What each of two or four ranks reported."""
    config = request.config
    if config.getoption("library") or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("ranks are new processes, without the library or the mended interpreter of this one")
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    impl, device = config.getoption("impl") or "torch", config.getoption("device")
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])  # ranks find everything imported
    start_processes(run_rank, (world, folder, impl, device), world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", map_location=device) for rank in range(world)]


def assert_as_accurate_as_one_process(name, case, ranks):
    tensors, options, places = whole(case, len(ranks))
    in_float64 = results({key: t.double() for key, t in tensors.items()}, options)
    in_one_process = results(tensors, options)
    joined = torch.empty_like(tensors["hidden"])
    for place, of_rank in zip(places, ranks, strict=True):
        joined[place] = of_rank["gradient of hidden"]
    for what, exact in in_float64.items():
        actual, plain = joined if what == "gradient of hidden" else ranks[0][what], in_one_process[what]
        assert actual.dtype == plain.dtype
        if case.offset:  # which decides the error: 2e-5 is what one process is held to
            some = exact.isfinite()
            assert (actual - exact)[some].norm() <= 2e-5 * exact[some].norm(), f"{name}: {what}"
        else:
            assert_accurate(actual, exact, plain, f"{name}: {what}")


def test_every_result_and_gradient_is_as_accurate_as_in_one_process(reports):
    for name, case in CASES.items():
        assert_as_accurate_as_one_process(name, case, [report[name] for report in reports])


def test_all_ranks_have_the_same_bits(reports):
    for name in CASES:
        for what, expected in reports[0][name].items():
            if what != "gradient of hidden":
                assert all(torch.equal(report[name][what], expected) for report in reports), f"{name}: {what}"


def test_messages_do_not_grow_with_the_sequence(reports):
    for name, case in CASES.items():
        queries = B * math.prod(case.heads)
        forward, backward, one_read, scoring = D + 1, D, 2 * D + 1, 2
        expected = [queries * numbers for numbers in (forward, backward, one_read, scoring)]
        assert all(report[name, "messages"] == expected for report in reports), name


def test_an_outer_autocast_changes_nothing(reports):
    for report in reports:
        for what, expected in report["dense, heads"].items():
            assert torch.equal(report["autocast"][what], expected), what


def test_a_group_of_some_ranks(reports):
    assert_as_accurate_as_one_process("subgroup", CASES["packed"], [report["subgroup"] for report in reports[1::2]])


@pytest.mark.parametrize("function", [attention_pool, attention_pool_dot, attention_pool_with_gradient])
def test_a_group_needs_torch_distributed(function):
    direction = () if function is attention_pool else (torch.randn(8),)
    with pytest.raises(ValueError, match=r"group: .* torch.distributed initialised \(init_process_group\): it is not"):
        function(torch.randn(2, 8), torch.randn(2, 9, 8), *direction, group="everyone")


def test_importing_works_where_torch_has_no_distributed():
    script = """
import torch
torch.distributed.is_available = lambda: False
torch.distributed.ProcessGroup = type("ProcessGroup", (), {})  # the stub that such builds have
for name in ("GroupMember", "is_initialized", "get_rank", "get_world_size", "all_gather"):
    delattr(torch.distributed, name)
from r2m_kernels import attention_pool
try:
    attention_pool(torch.randn(2, 8), torch.randn(2, 9, 8), group="everyone")
except ValueError as error:
    assert str(error).startswith("group: expected None, or torch.distributed"), error
else:
    raise AssertionError("a group was taken")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
