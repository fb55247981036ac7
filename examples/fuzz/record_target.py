"""The target of these examples: the parser of examples/guest/parser.c, compiled and ready for inputs."""

import subprocess
import tempfile
from pathlib import Path

from pyvmm import ElfBoot, MemoryConfig, Snapshot, VmmConfig
from pyvmm.fuzz import FLAGS, ready

SOURCE = Path(__file__).parent.parent / "guest" / "parser.c"


def record_parser() -> Snapshot:
    """Compile the parser with gcc, boot it, and return the snapshot in which it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "parser"
        subprocess.run(["gcc", "-O1", *FLAGS, "-fsanitize-coverage=trace-pc", SOURCE, "-o", program], check=True)
        return ready(VmmConfig(boot=ElfBoot(program), memory=MemoryConfig(size_mib=8)))
