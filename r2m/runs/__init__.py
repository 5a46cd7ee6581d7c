"""A run's folder: what is written when, how a run goes on, what is said while it runs."""
