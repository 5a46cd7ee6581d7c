"""The reward model, fitted to human pairs before a run."""
