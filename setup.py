"""Project data is in pyproject.toml; this file is where ahead-of-time builds of csrc hook in."""

from setuptools import setup

setup()
