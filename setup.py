"""Everything static is in pyproject.toml; this file is where the optional compiled extension is added."""

from setuptools import setup

setup()
