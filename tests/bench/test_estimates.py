"""The tables of the paper's setups in docs/operations.md, beside what the estimate says now."""

import sys

import estimates
import pytest


@pytest.mark.slow
def test_the_page_shows_what_the_estimate_says(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["estimates.py", "--check"])
    estimates.main()  # else: run python benchmarks/estimates.py


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="has no <!-- estimates: begin -->"):
        estimates.page("text")
