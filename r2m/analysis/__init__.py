"""What `r2m diagnose` measures, as plain functions."""
