"""What the commands need beyond torch and numpy, and how it is installed."""

from __future__ import annotations


def install(extra: str) -> str:
    """The command that installs an extra of `pyproject.toml`, for messages: beside the torch that is there."""
    return f"pip install --no-build-isolation '.[{extra}]' in the repository"
