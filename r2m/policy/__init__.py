"""The policy: loaded, sampled, scored, and the loss that trains it."""
