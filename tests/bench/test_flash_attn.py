"""The row of the package flash-attn, which needs a GPU, beside a stand-in for it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from r2m_kernels.bench.measure import TOLERANCE, measure
from r2m_kernels.bench.ops import Case, build

CPU = torch.device("cpu")
SHAPE = {"B": 6, "S": 40, "D_p": 64, "D_rm": 48, "d": 32, "heads": 2}


def flash_attn_func(q, k, v):
    """[B, S, H, d] each."""
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """[total, H, d] each."""
    ends = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
    assert all(e.dtype == torch.int32 and e[-1] == len(x) for e, x in zip(ends, (q, k, v), strict=True))
    assert cu_seqlens_q.diff().max() <= max_seqlen_q and cu_seqlens_k.diff().max() <= max_seqlen_k
    parts = zip(*(x.split(e.diff().tolist()) for e, x in zip(ends, (q, k, v), strict=True)), strict=True)
    return torch.cat([flash_attn_func(*(x[None] for x in part))[0] for part in parts])


@pytest.mark.parametrize("lengths", ["full", "ragged", "packed"])
def test_it_computes_the_operator_on_sequences_of_any_length(monkeypatch, lengths):
    package = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    case = Case("policy_feedback_reward", lengths, SHAPE, dtype=torch.float32, lengths=lengths)
    entries, exact = build(case, "forward+backward", CPU)
    entries = [(row, run) for row, run in entries if row.provider == "projected, flash_attn"]
    (row,) = measure(entries, exact, TOLERANCE[case.dtype], device=CPU, best_bandwidth=1.0, seconds=0.0)
    assert row.status == "ok"
