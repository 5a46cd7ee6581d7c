"""Which implementation of an op runs. Adding one: a module `<op>/<name>_impl.py` in each op's folder, a row here."""

import importlib
from types import ModuleType

# Fastest first; the value says why the implementation cannot run, None if it can.
_IMPLEMENTATIONS: dict[str, str | None] = {
    "extension": "not part of this version",
    "triton": "not part of this version",
    "torch": None,
}


def available_implementations() -> dict[str, str | None]:
    """Every implementation's name -> None if it can run, else the reason it cannot."""
    return dict(_IMPLEMENTATIONS)


def choose(impl: str) -> str:
    """The implementation to run: the fastest that can for "auto", else the one named or an error."""
    if impl == "auto":
        return next(name for name, reason in _IMPLEMENTATIONS.items() if reason is None)
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl: expected 'auto' or one of {sorted(_IMPLEMENTATIONS)}, got {impl!r}")
    reason = _IMPLEMENTATIONS[impl]
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {reason}")
    return impl


def implementation(op: str, name: str) -> ModuleType:
    """The module that implements `op`, imported on first use so that importing r2m_kernels needs torch only."""
    return importlib.import_module(f"r2m_kernels.{op}.{name}_impl")
