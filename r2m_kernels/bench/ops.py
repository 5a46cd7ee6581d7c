"""The operators beside what a user would otherwise run: cases, inputs, bytes that must move, exact results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import r2m_kernels as rk
from r2m_kernels.attention_pool import reference as pool_reference
from r2m_kernels.bench.measure import TOLERANCE, Run, free_memory, measure, release
from r2m_kernels.bench.plain import (
    ALPHA,
    EPS,
    absorbed_reward,
    flash_attn_package,
    flash_attn_varlen,
    flash_sdpa,
    plain_grebt,
    projected_reward,
    softmax_attention,
    two_products,
)
from r2m_kernels.bench.results import Row, dtype_name
from r2m_kernels.fusion import reference as fusion_reference
from r2m_kernels.grebt import reference as grebt_reference

MODES = ("score", "forward", "forward+backward")
OURS = ("triton", "extension")
WEIGHT = 0.7  # w(t): nothing that is measured depends on it
FEEDBACK_ALONE = 0.0  # w for rewards that are checked: beside phi . H, an error in the attention would hardly show

# Tokens of the demo's movie reviews at 0 %, 5 %, ... 100 % (those over 1024 cut off): how lengths really spread.
REVIEW_LENGTHS = (4, 15, 21, 27, 35, 52, 92, 137, 154, 165, 178, 195, 211, 237, 269, 311, 356, 421, 510, 687, 1024)


@dataclass(frozen=True)
class Case:
    """One operator on one shape, in one or more modes.

    shape: policy_feedback_reward and attention_pool: B S D_p, and for the former D_rm d heads; shared_prefix: n K
    S_prompt S_response D_p; time_weighted_fusion and fused_reward: B D_rm; grebt_loss: n K.
    lengths: "full"; "ragged", rows padded at the end under a mask; or "packed", without padding.
    """

    op: str
    name: str  # for Row.case
    shape: dict[str, int]
    dtype: torch.dtype = torch.bfloat16
    modes: tuple[str, ...] = MODES
    lengths: str = "full"
    compiled: bool = False  # measure torch.compile's providers too, which takes half a minute each to compile


def run_cases(
    cases: Iterable[Case],
    device: torch.device,
    *,
    best_bandwidth: float,
    seconds: float,
    deadline: float = math.inf,
) -> Iterator[list[Row]]:
    """Measure each case, every provider for about `seconds` a mode; yields the rows of one mode of one case.

    deadline: of time.monotonic(); cases that would start after it are entered as not run.
    """
    for case in cases:
        late = "not run: the time was up" if time.monotonic() > deadline else None
        missing = late or _missing_memory(case, device)
        for mode in case.modes:
            if missing:
                yield [replace(_row(case, mode, "all"), status=missing)]
                continue
            entries, exact = build(case, mode, device)
            yield measure(
                entries,
                exact,
                TOLERANCE[case.dtype],
                device=device,
                best_bandwidth=best_bandwidth,
                seconds=seconds,
            )
            del entries, exact
            torch._dynamo.reset()  # or compiling the next shape makes shapes variable, and later ones give up
            release(device)


def build(case: Case, mode: str, device: torch.device) -> Entries:
    """Every provider of one mode of a case, with a row to fill in, on the same inputs; and the exact results (float64)
    that `measure` holds theirs against."""
    torch.manual_seed(0)
    return _BUILDERS[case.op](case, mode, partial(_row, case, mode), device)


def _row(case: Case, mode: str, provider: str) -> Row:
    return Row("ops", case.op, mode, case.name, provider, dtype_name(case.dtype), dict(case.shape))


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


# ---- inputs ----


@dataclass
class Sequences:
    """Hidden states and where they end: [B, S, D], with a mask where rows are padded, or packed [total, D]."""

    hidden: Tensor
    mask: Tensor | None = None  # bool [B, S]
    cu_seqlens: Tensor | None = None
    source: Tensor | None = None  # int [B, S]: where a padded [B, S, D] finds its rows in a packed one
    valid_bytes: int = 0  # of the rows that count

    @property
    def where(self) -> dict[str, Tensor | None]:
        """What the operators take."""
        return {"mask": self.mask if self.cu_seqlens is None else None, "cu_seqlens": self.cu_seqlens}

    def each(self) -> Iterator[Tensor]:
        """The rows [length, D] of every sequence."""
        if self.cu_seqlens is not None:
            yield from self.hidden.split(self.cu_seqlens.diff().tolist())
        elif self.mask is not None:
            yield from (hidden[keep] for hidden, keep in zip(self.hidden, self.mask, strict=True))
        else:
            yield from self.hidden

    def padded(self) -> tuple[Tensor, Tensor | None]:
        """What plain PyTorch needs: [B, S, D] and a mask."""
        return (self.hidden if self.source is None else self.hidden[self.source]), self.mask

    def packed(self) -> tuple[Tensor, Tensor]:
        """[total, D] without padding and cu_seqlens, of what has a mask or is packed."""
        if self.cu_seqlens is not None:
            return self.hidden, self.cu_seqlens
        assert self.mask is not None
        ends = self.mask.sum(-1).cumsum(0, dtype=torch.int32)
        return self.hidden[self.mask], torch.cat([ends.new_zeros(1), ends])


def make_sequences(case: Case, device: torch.device) -> Sequences:
    batch, length, width = (case.shape[name] for name in ("B", "S", "D_p"))
    if case.lengths == "full":
        hidden = torch.randn(batch, length, width, dtype=case.dtype, device=device)
        return Sequences(hidden, valid_bytes=hidden.nbytes)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [max(1, round(length * _review_length((i + 0.5) / batch) / REVIEW_LENGTHS[-1])) for i in order]
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    counts = torch.arange(length, device=device) < torch.tensor(lengths, device=device)[:, None]
    valid_bytes = sum(lengths) * width * case.dtype.itemsize
    if case.lengths == "ragged":
        hidden = torch.randn(batch, length, width, dtype=case.dtype, device=device)
        return Sequences(hidden, mask=counts, valid_bytes=valid_bytes)
    hidden = torch.randn(sum(lengths), width, dtype=case.dtype, device=device)
    source = (ends[:-1, None] + torch.arange(length, device=device)).clamp(max=len(hidden) - 1)
    return Sequences(hidden, counts, ends.int(), source, valid_bytes)


def _review_length(quantile: float) -> float:
    """Interpolated."""
    position = quantile * (len(REVIEW_LENGTHS) - 1)
    below = math.floor(position)
    a, b = REVIEW_LENGTHS[below : below + 2]
    return a + (b - a) * (position - below)


def make_weights(shape: dict[str, int], device: torch.device) -> list[Tensor]:
    """W_q, W_k, W_v, W_o, phi and b: float32, to be trained."""
    with device:
        attention = rk.SequenceToTokenAttention(shape["D_rm"], shape["D_p"], shape["d"], shape.get("heads", 1))
        return [*attention.parameters(), *rk.RewardHead(shape["D_rm"]).parameters()]


# ---- exact results ----


def exact_pools(query: Tensor, rows: Iterable[Tensor], direction: Tensor) -> tuple[Tensor, Tensor]:
    """Pools and their gradients by the reference, for query and direction in float64 and the rows [length, D] of each
    sequence in any dtype: one sequence at a time, since float64 copies of all would not fit."""
    pooled, gradient = torch.empty_like(query), torch.empty_like(query)
    for i, hidden in enumerate(rows):
        one = query[i : i + 1].detach().requires_grad_()
        with torch.enable_grad():
            result, _ = pool_reference.attention_pool(one, hidden.double()[None], scale=1.0)
            (gradient[i : i + 1],) = torch.autograd.grad((result * direction).sum(), one)
        pooled[i : i + 1] = result.detach()
    return pooled, gradient


def exact_reward(rte: Tensor, rows: Iterable[Tensor], weights: Sequence[Tensor], heads: int, weight: float) -> Tensor:
    """Equations 1 to 3 around `exact_pools`, for rte and weights in float64; differentiable."""
    w_q, w_k, w_v, w_o, head_weight, head_bias = weights
    u = rk.absorbed_query(rte, w_q, w_k, num_heads=heads)
    g = rk.reward_direction(w_v, w_o, head_weight, weight=weight, num_heads=heads)
    pools = exact_pools(u.detach(), rows, g.detach())
    return rk.reward_from_pools(u, g, *pools, rte, head_weight, head_bias, weight=weight)


def in_float64(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


# ---- what each operator is compared with ----

Entries = tuple[list[tuple[Row, Run]], list[Tensor]]


def _reward(case: Case, mode: str, row: Callable[[str], Row], device: torch.device) -> Entries:
    heads = case.shape["heads"]
    sequences, weights = make_sequences(case, device), make_weights(case.shape, device)
    rte = torch.randn(case.shape["B"], case.shape["D_rm"], device=device)
    cotangent = torch.randn(case.shape["B"], device=device)
    trained = weights[:-1]  # of the bias, the gradient is a sum that anyone gets right

    def finish(reward: Callable[[], Tensor]) -> Run:
        def run() -> Tensor | Sequence[Tensor]:
            with torch.set_grad_enabled(mode != "score"):
                result = reward()
                return result if mode != "forward+backward" else torch.autograd.grad(result, trained, cotangent)

        return run

    def plain(function: Callable[..., Tensor], *arguments: Any) -> Run:
        def reward() -> Tensor:
            hidden, mask = sequences.padded()
            return function(rte, hidden, weights, mask, heads, FEEDBACK_ALONE, *arguments)

        return finish(reward)

    def flash_attn() -> Tensor:
        if case.lengths == "full":
            attend: Any = flash_attn_package
            hidden, where = sequences.padded()
        else:
            attend = partial(flash_attn_varlen, longest=case.shape["S"])
            rows, where = sequences.packed()
            hidden = rows[None]
        return projected_reward(rte, hidden, weights, where, heads, FEEDBACK_ALONE, attend)

    def ours(impl: str) -> Run:
        keywords: dict[str, Any] = {"weight": FEEDBACK_ALONE, "num_heads": heads, "impl": impl, **sequences.where}
        return finish(lambda: rk.policy_feedback_reward(rte, sequences.hidden, *weights, **keywords))

    compiled = partial(torch.compile, dynamic=False)
    providers = {
        "projected, eager": plain(projected_reward, softmax_attention),
        "projected, SDPA flash": plain(projected_reward, flash_sdpa),
        "projected, flash_attn": finish(flash_attn),
        "absorbed, eager": plain(absorbed_reward),
    }
    if case.compiled:
        providers |= {
            "projected, compiled": plain(compiled(projected_reward), softmax_attention),
            "absorbed, compiled": plain(compiled(absorbed_reward)),
        }
    providers |= {impl: ours(impl) for impl in OURS}

    doubles = in_float64(weights)
    exact: Any = exact_reward(rte.double(), sequences.each(), doubles, heads, FEEDBACK_ALONE)
    if mode == "forward+backward":
        exact = torch.autograd.grad(exact, doubles[:-1], cotangent.double())
    exact = [exact.detach()] if isinstance(exact, Tensor) else list(exact)
    moved = sequences.valid_bytes + _nbytes(rte, *weights)
    moved += _nbytes(*trained) if mode == "forward+backward" else rte.shape[0] * 4
    entries = _entries(providers, row, moved)
    _refuse_too_large(entries, case, device)
    return entries, exact


def _pool(case: Case, mode: str, row: Callable[[str], Row], device: torch.device) -> Entries:
    sequences, width = make_sequences(case, device), case.shape["D_p"]
    heads = case.shape.get("heads", 1)
    query = torch.randn(case.shape["B"], heads, width, device=device) * width**-0.5
    query = query.squeeze(1) if heads == 1 else query
    direction = torch.randn(width, device=device)

    def plain(pool: Callable[..., Tensor]) -> Run:
        def run() -> Tensor:
            leaf = query.detach().requires_grad_(mode == "forward+backward")
            hidden, mask = sequences.padded()
            pooled = pool(leaf.view(len(leaf), heads, width), hidden, mask).view_as(leaf)
            if mode == "forward":
                return pooled
            value = (pooled.float() * direction).sum(-1)
            return value if mode == "score" else torch.autograd.grad(value.sum(), leaf)[0]

        return run

    def ours(impl: str) -> Run:
        keywords: dict[str, Any] = {"scale": 1.0, "impl": impl, **sequences.where}
        if mode == "forward":
            return lambda: rk.attention_pool(query, sequences.hidden, **keywords)
        if mode == "score":
            return lambda: rk.attention_pool_dot(query, sequences.hidden, direction, **keywords)[0]
        return lambda: rk.attention_pool_with_gradient(query, sequences.hidden, direction, **keywords)[1]

    providers = {"absorbed, eager": plain(two_products)}
    if case.compiled:
        providers["absorbed, compiled"] = plain(torch.compile(two_products, dynamic=False))
    providers |= {impl: ours(impl) for impl in OURS}
    pooled, gradient = exact_pools(query.double(), sequences.each(), direction.double())
    exact = {"score": pooled @ direction.double(), "forward": pooled, "forward+backward": gradient}[mode]
    moved = sequences.valid_bytes + _nbytes(query) + exact.numel() * 4
    moved += 0 if mode == "forward" else _nbytes(direction)
    return _entries(providers, row, moved), [exact]


def _shared_prefix(case: Case, mode: str, row: Callable[[str], Row], device: torch.device) -> Entries:
    """K responses of one prompt: the prompt's hidden states stored once, or in every sequence."""
    n, k, s_prompt, s_response, width = (case.shape[key] for key in ("n", "K", "S_prompt", "S_response", "D_p"))
    prompts = torch.randn(n, s_prompt, width, dtype=case.dtype, device=device)
    responses = torch.randn(n * k, s_response, width, dtype=case.dtype, device=device)
    whole = torch.cat([prompts.repeat_interleave(k, 0), responses], 1)
    query = torch.randn(n * k, width, device=device) * width**-0.5
    direction = torch.randn(width, device=device)

    def stored_once(impl: str) -> tuple[Tensor, Tensor]:
        of_prompts = rk.attention_pool_with_gradient(query.view(n, k, -1), prompts, direction, scale=1.0, impl=impl)
        of_responses = rk.attention_pool_with_gradient(query, responses, direction, scale=1.0, impl=impl)
        pooled, gradient, lse = (
            torch.stack([a.flatten(0, 1), b]) for a, b in zip(of_prompts, of_responses, strict=True)
        )
        return rk.merge_pools_with_gradient(pooled, gradient, lse, direction, scale=1.0)[:2]

    def repeated(impl: str) -> tuple[Tensor, Tensor]:
        return rk.attention_pool_with_gradient(query, whole, direction, scale=1.0, impl=impl)[:2]

    def plain() -> tuple[Tensor, Tensor]:
        leaf = query.detach().requires_grad_()
        pooled = two_products(leaf[:, None], whole, None)[:, 0]
        return pooled, torch.autograd.grad((pooled.float() * direction).sum(), leaf)[0]

    providers: dict[str, Run] = {"absorbed, eager, prompt repeated": plain}
    for impl in OURS:
        providers[f"{impl}, prompt repeated"] = partial(repeated, impl)
        providers[f"{impl}, prompt stored once"] = partial(stored_once, impl)
    exact = exact_pools(query.double(), whole, direction.double())
    moved = _nbytes(prompts, responses, query, direction) + 2 * query.nbytes
    return _entries(providers, row, moved), list(exact)


def _fusion(case: Case, mode: str, row: Callable[[str], Row], device: torch.device) -> Entries:
    shape = case.shape["B"], case.shape["D_rm"]
    inputs = [torch.randn(shape, dtype=case.dtype, device=device) for _ in range(2)]
    if case.op == "fused_reward":
        inputs += [torch.randn(shape[1], device=device) * shape[1] ** -0.5, torch.randn((), device=device)]
    weight = torch.tensor(WEIGHT, device=device)
    plain, ours = getattr(fusion_reference, case.op), getattr(rk, case.op)

    def call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda a, h, *head: function(a, h, weight.to(a.dtype), *(x.to(a.dtype) for x in head))

    providers = {"eager": call(plain), "compiled": torch.compile(call(plain), dynamic=False)}
    providers |= {impl: lambda a, h, *head, impl=impl: ours(a, h, weight, *head, impl=impl) for impl in OURS}
    return _by_autograd(case, mode, row, inputs, providers, call(plain))


def _grebt(case: Case, mode: str, row: Callable[[str], Row], device: torch.device) -> Entries:
    rewards = torch.randn(case.shape["n"], case.shape["K"], device=device)
    providers: dict[str, Callable[..., Tensor]] = {
        "eager": plain_grebt,
        "compiled": torch.compile(plain_grebt, dynamic=False),
    }
    providers |= {impl: partial(rk.grebt_loss, alpha=ALPHA, eps=EPS, impl=impl) for impl in OURS}

    def exact(rewards: Tensor) -> Tensor:
        return grebt_reference.grebt_loss(rewards, alpha=ALPHA, eps=EPS)[0].mean()

    return _by_autograd(case, mode, row, [rewards], providers, exact)


def _by_autograd(
    case: Case,
    mode: str,
    row: Callable[[str], Row],
    inputs: list[Tensor],
    providers: dict[str, Callable[..., Tensor]],
    exact: Callable[..., Tensor],
) -> Entries:
    """Result, or gradients of all inputs by autograd, of functions of the same inputs."""
    if not case.compiled:
        providers.pop("compiled")
    result = exact(*(x.double() for x in inputs))
    cotangent = torch.randn_like(result)

    def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> Sequence[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        result = function(*leaves)
        return torch.autograd.grad(result, leaves, cotangent.to(result.dtype))

    def run(function: Callable[..., Tensor]) -> Tensor | Sequence[Tensor]:
        return function(*inputs) if mode == "forward" else gradients(function, inputs)

    if mode == "forward":
        moved = _nbytes(*inputs) + result.numel() * inputs[0].itemsize
        expected = [result]
    else:
        moved = 2 * _nbytes(*inputs) + result.numel() * inputs[0].itemsize  # of the result, its gradient
        expected = list(gradients(exact, [x.double() for x in inputs]))
    return _entries({name: partial(run, function) for name, function in providers.items()}, row, moved), expected


def _entries(providers: dict[str, Run], row: Callable[[str], Row], moved: int) -> list[tuple[Row, Run]]:
    return [(replace(row(name), ideal_bytes=moved), run) for name, run in providers.items()]


_BUILDERS = {
    "policy_feedback_reward": _reward,
    "attention_pool": _pool,
    "shared_prefix": _shared_prefix,
    "time_weighted_fusion": _fusion,
    "fused_reward": _fusion,
    "grebt_loss": _grebt,
}


# ---- what does not fit ----


def _missing_memory(case: Case, device: torch.device) -> str | None:
    """Why the inputs of a case do not fit on the device, or None."""
    shape = case.shape
    if "D_p" not in shape:
        return None
    rows = (
        shape["B"] * shape["S"] if "B" in shape else shape["n"] * shape["K"] * (shape["S_prompt"] + shape["S_response"])
    )
    # Shared prefixes are there twice; float64 copies are made a sequence at a time.
    needed = rows * shape["D_p"] * case.dtype.itemsize * (1.1 if "B" in shape else 2.1)
    return too_much(needed, device)


def _refuse_too_large(entries: list[tuple[Row, Run]], case: Case, device: torch.device) -> None:
    """Mark projected providers whose K, V and their gradients do not fit: on a CPU, nothing else would stop them."""
    tokens = case.shape["B"] * case.shape["S"]
    missing = too_much(5 * tokens * case.shape["d"] * case.dtype.itemsize, device)
    for row, _ in entries:
        if missing and row.provider.startswith("projected"):
            row.status = missing


def too_much(needed: float, device: torch.device) -> str | None:
    free = free_memory(device)
    if needed <= free:
        return None
    return f"cannot run: needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
