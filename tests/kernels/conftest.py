import os

import numpy as np
import pytest
import torch

from r2m_kernels import dispatch


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1":
        mend_interpreter()


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
    name = request.config.getoption("impl")
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
