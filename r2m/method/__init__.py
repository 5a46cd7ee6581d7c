"""The paper: the reward model with policy feedback, its update, and where the policy's hidden states come from."""
