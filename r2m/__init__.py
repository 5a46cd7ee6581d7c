"""R2M: reward models that see the policy's own hidden states, trained in step with it.

After "Real-Time Aligned Reward Model beyond Semantics" (arXiv 2601.22664). The kernels live in `r2m_kernels`.
"""

from r2m.config import R2MConfig, load_config
from r2m.data import Preference, load_prompts
from r2m.fitting import fit_reward
from r2m.hidden_states import HiddenStateTap
from r2m.policy import load_policy, load_tokenizer
from r2m.reward_model import R2MRewardModel
from r2m.trainer import R2MTrainer
from r2m.updater import R2MUpdater

__all__ = [
    "HiddenStateTap",
    "Preference",
    "R2MConfig",
    "R2MRewardModel",
    "R2MTrainer",
    "R2MUpdater",
    "fit_reward",
    "load_config",
    "load_policy",
    "load_prompts",
    "load_tokenizer",
]
