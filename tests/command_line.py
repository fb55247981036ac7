"""The program `pyvmm`, and configurations for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def pyvmm(*arguments: object, stdin: bytes = b"", deadline: float = 60) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pyvmm", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=deadline, check=False)


def flat_file(directory: Path, code: bytes, mode: str = "real16", **rest: Any) -> Path:
    (directory / "code").write_bytes(code)
    path = directory / "vm.json"
    boot = {"type": "flat", "path": "code", "mode": mode}
    path.write_text(json.dumps({"boot": boot, "memory": {"size_mib": 1}, **rest}))
    return path
