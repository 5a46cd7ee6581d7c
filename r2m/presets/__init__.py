"""Configs that come with the package: the demo's settings and the paper's experiments, a YAML file each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent


class Preset(NamedTuple):
    """What the comment at the head of a preset's file says."""

    name: str
    summary: str
    hardware: str
    status: str


def list_presets() -> list[Preset]:
    return [_describe(path) for path in sorted(_FOLDER.glob("*.yaml"))]


def preset_path(name: str) -> Path:
    """The YAML file of a preset. Raises ValueError for an unknown name, listing the known ones."""
    known = [preset.name for preset in list_presets()]
    if name not in known:
        raise ValueError(f"preset is {name!r}; expected one of {', '.join(known)}")
    return _FOLDER / f"{name}.yaml"


def resolve_config_source(name_or_path: str | Path) -> Path:
    """The config file that is meant: a file that exists, or else the preset of this name.

    Raises FileNotFoundError for neither, listing the presets.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    try:
        return preset_path(str(name_or_path))
    except ValueError:
        known = ", ".join(preset.name for preset in list_presets())
        raise FileNotFoundError(f"config: {name_or_path} is no file and no preset; presets: {known}") from None


def _describe(path: Path) -> Preset:
    """The first line is the summary; `Hardware:` and `Status:` begin lines of their own."""
    head = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines()]
    hardware, status = (
        next(line.removeprefix(label).strip() for line in head if line.startswith(label))
        for label in ("Hardware:", "Status:")
    )
    return Preset(path.stem, head[0], hardware, status)
