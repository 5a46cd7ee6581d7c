"""What only a GPU can show, of Triton's kernels or, with --impl extension, of those in CUDA C++. The rest runs there by
`pytest tests/kernels --impl triton --device cuda`.
"""

import sys
from pathlib import Path

import pytest
import torch

from r2m_kernels import dispatch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))  # for the accuracy rule, and check_pool


@pytest.fixture(autouse=True)
def _on_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def impl(request, monkeypatch):
    """The implementation under test: what impl="auto" takes."""
    name = request.config.getoption("impl") or "triton"
    monkeypatch.setitem(dispatch.FASTEST_FIRST, "cuda", (name, "torch"))
    return name


@pytest.fixture
def triton_alone(impl):
    if impl != "triton":
        pytest.skip("of Triton")


@pytest.fixture
def free_memory():
    """Skips where the device has less than so many bytes left."""

    def skip_below(needed):
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < needed:
            pytest.skip(f"needs {needed / 1e9:.0f} GB of free device memory")

    yield skip_below
    torch.cuda.empty_cache()
