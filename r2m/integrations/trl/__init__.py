"""R2M in TRL's trainers: `r2m_reward` makes the reward function and the callback."""

from r2m.integrations.trl.callback import R2MCallback, r2m_reward

__all__ = ["R2MCallback", "r2m_reward"]
