"""What verl's plugin group `verl.plugins` loads, in every process that imports verl: the name of R2M's trainer.

The adapter takes seconds to import and makes verl choose its platform, so it is imported when a run asks for it.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

NAME = "r2m"
TRAINERS = "verl.trainer.ppo.v1.trainer_base"  # has verl's table of trainers


class Trainers(dict[str, Any]):
    """verl's table, in which R2M's trainer stands as soon as it is looked up."""

    def __missing__(self, name: str) -> Any:
        if name != NAME:
            raise KeyError(name)
        import_module("r2m.integrations.verl")  # registers its trainer
        return self[name]


def offer(module: Any) -> None:
    module.TRAINER_REGISTRY = Trainers(module.TRAINER_REGISTRY)


class WhenImported:
    """Offers the trainer after verl's module has run; a finder of `sys.meta_path`."""

    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != TRAINERS:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_offer(module: ModuleType) -> None:
                run(module)
                offer(module)

            spec.loader.exec_module = run_and_offer  # type: ignore[method-assign]
        return spec


if TRAINERS in sys.modules:
    offer(sys.modules[TRAINERS])
else:
    sys.meta_path.insert(0, WhenImported)
