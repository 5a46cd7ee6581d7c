import os

import numpy as np
import pytest
import torch

from r2m_kernels import dispatch, extension
from r2m_kernels.attention_pool import extension_impl


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1":
        mend_interpreter()
    if config.getoption("library"):
        use_library(config.getoption("library"))
    name, device = config.getoption("impl") or "torch", config.getoption("device")
    why_not = dispatch._reason(name, device)
    if why_not is not None:  # or "auto" would let another one pass the tests
        pytest.exit(f"--impl {name} --device {device}: {why_not}", returncode=1)


def use_library(path):
    """The extension for all devices is the library at `path`, of CPU or of emulated CUDA code."""
    torch.ops.load_library(path)
    loaded = (torch.ops.r2m_kernels_cpu, torch.ops.r2m_kernels_emulated)
    ops = next(ops for ops in loaded if hasattr(ops, "attention_pool"))
    extension.ops, extension.reason = lambda device_type: ops, lambda device_type: None
    if hasattr(torch.ops.r2m_kernels_emulated, "attention_pool"):
        extension_impl.CHUNK["cpu"] = extension_impl.CHUNK["cuda"]


def mend_interpreter():
    """Triton's interpreter as the compiled code rounds, and three times faster.

    It truncates float32 to bfloat16 where compiled code rounds to nearest, and it patches Triton's language anew for
    every call of a function inside a kernel.
    """
    from triton import language
    from triton.runtime import interpreter

    convert, patched = interpreter._convert_float, False

    def convert_float(value, source, target, mode):
        if (source, target) == (language.float32, language.bfloat16):
            bits = np.ascontiguousarray(value).view(np.uint32)
            rounded = bits + 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
            return np.where(np.isnan(value), 0x7FC0, rounded >> 16).astype(np.uint16)
        return convert(value, source, target, mode)

    def call(self, *args, **kwargs):
        nonlocal patched
        if not patched and language.core in self.fn.__globals__.values():  # what a launch itself does not patch
            interpreter._patch_lang(self.fn)
            patched = True
        return self.rewrite()(*args, **kwargs)

    interpreter._convert_float = convert_float
    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True)
def _same_random_numbers_every_run(request):
    if request.config.getoption("device") != "cpu":
        torch.set_default_device(request.config.getoption("device"))
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def impl(request, monkeypatch):
    """The implementation under test: what impl="auto" takes for every dtype that it runs."""
    name = request.config.getoption("impl") or "torch"
    for device in dispatch.FASTEST_FIRST:
        monkeypatch.setitem(dispatch.FASTEST_FIRST, device, (name, "torch"))
    return name


@pytest.fixture
def poisoned_memory():
    """Every torch.empty comes filled with NaN, and an op whose result could change from run to run raises."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
