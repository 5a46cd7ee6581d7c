import pytest
import torch
from numerics import ragged

from r2m_kernels import attention_pool_with_gradient


@pytest.fixture
def tuning(impl, monkeypatch):
    if impl != "triton":
        pytest.skip("searches configurations of the Triton kernels")
    from r2m_kernels.attention_pool import triton_tuning

    monkeypatch.setattr(triton_tuning, "_found", {})
    return triton_tuning


def test_the_search_prints_the_fastest_once_and_uses_it(tuning, monkeypatch, capsys):
    query, hidden, direction = torch.randn(3, 128), torch.randn(500, 128), torch.randn(128)
    cu_seqlens = ragged([300, 0, 200])
    expected = attention_pool_with_gradient(query, hidden, direction, cu_seqlens=cu_seqlens)
    tried = []

    def milliseconds(run, config):
        run(config)
        tried.append(config)
        return 1.0 if config["CHUNK"] == 64 else 2.0

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(
        tuning, "_neighbours", lambda config: iter([config, dict(config, CHUNK=64), dict(config, BS=2)])
    )
    monkeypatch.setenv("R2M_KERNELS_AUTOTUNE", "1")
    for _ in range(2):
        found = attention_pool_with_gradient(query, hidden, direction, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(found, expected)
    assert len(tried) == 3
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "'CHUNK': 64" in printed and "1.0000 ms, the default 2.0000 ms" in printed


def test_neighbours_are_valid_and_begin_with_the_default(tuning):
    config = {"BS": 4, "BD": 4096, "CHUNK": 128, "STAGES": 3, "num_warps": 8}
    first, *others = tuning._neighbours(config)
    assert first == config and config not in others and len(others) > 30
    for other in others:
        assert set(other) == set(config) and other["BD"] == 4096
        assert other["BS"] in (2, 4, 8) and other["num_warps"] in (4, 8, 16) and other["CHUNK"] in (64, 128, 256)
