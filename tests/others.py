"""The guests of others."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def guest_of_others(name: str) -> Path:
    """A file that `make guests` fetches; skips the test if it is not there."""
    command = [str(Path(__file__).parent.parent / "scripts" / "guests.sh"), "where"]
    path = Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()) / name
    if not path.exists():
        pytest.skip(f"{name} is not there: make guests")
    return path
