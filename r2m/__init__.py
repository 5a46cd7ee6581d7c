"""R2M: reward models that see the policy's own hidden states, trained in step with it.

After "Real-Time Aligned Reward Model beyond Semantics" (arXiv 2601.22664). The kernels live in `r2m_kernels`.
"""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2m.config import R2MConfig, load_config
    from r2m.data.sources import Preference, load_pairs, load_prompts
    from r2m.fitting.recipe import fit_reward
    from r2m.method.hidden_states import HiddenStateTap
    from r2m.method.reward_model import R2MRewardModel
    from r2m.method.updater import R2MUpdater
    from r2m.policy.load import load_policy, load_tokenizer
    from r2m.trainer import R2MTrainer
    from r2m_kernels import __version__

# The packages of the extra `train`, by the names that are imported.
_TRAIN = (
    "accelerate",
    "filelock",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "peft",
    "pydantic",
    "safetensors",
    "tqdm",
    "transformers",
    "typer",
    "yaml",
)

# Where each public name lives. Imported on first use: `r2m --help` should not wait for torch and transformers.
_HOME = {
    "HiddenStateTap": "method.hidden_states",
    "Preference": "data.sources",
    "R2MConfig": "config",
    "R2MRewardModel": "method.reward_model",
    "R2MTrainer": "trainer",
    "R2MUpdater": "method.updater",
    "fit_reward": "fitting.recipe",
    "load_config": "config",
    "load_pairs": "data.sources",
    "load_policy": "policy.load",
    "load_prompts": "data.sources",
    "load_tokenizer": "policy.load",
}

__all__ = [
    "HiddenStateTap",
    "Preference",
    "R2MConfig",
    "R2MRewardModel",
    "R2MTrainer",
    "R2MUpdater",
    "__version__",
    "fit_reward",
    "load_config",
    "load_pairs",
    "load_policy",
    "load_prompts",
    "load_tokenizer",
]


def _check_packages() -> None:
    """Raises ImportError, which names the extra to install, unless the packages of `train` are there."""
    found = {name: find_spec(name) for name in _TRAIN}
    missing = [name for name, spec in found.items() if spec is None]
    transformers = found["transformers"]
    if transformers is not None and transformers.origin is not None:
        # Read rather than imported, which takes seconds; importlib.metadata would slow down `r2m --help`, too.
        version = re.search(r'^__version__ = "((\d+).*)"', Path(transformers.origin).read_text(), re.MULTILINE)
        if version is not None and int(version[2]) < 5:
            missing.append(f"transformers 5 or newer (this is {version[1]})")
    if missing:
        raise ImportError(
            f"r2m needs {', '.join(missing)}: pip install 'r2m-kernels[train]' (r2m_kernels needs torch alone)"
        )


_check_packages()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("r2m_kernels").__version__
    if name not in _HOME:
        raise AttributeError(f"module 'r2m' has no attribute {name!r}")
    return getattr(import_module(f"r2m.{_HOME[name]}"), name)
