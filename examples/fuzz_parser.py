"""A fuzz target: each input runs from one snapshot, and a crash of the guest is a value."""

import subprocess
import tempfile
from pathlib import Path

from pyvmm import ElfBoot, MemoryConfig, VmmConfig
from pyvmm.fuzz import FLAGS, Target, ready

SOURCE = Path(__file__).parent / "guest" / "parser.c"

with tempfile.TemporaryDirectory() as folder:
    program = Path(folder) / "parser"
    subprocess.run(["gcc", "-O1", *FLAGS, "-fsanitize-coverage=trace-pc", SOURCE, "-o", program], check=True)
    snapshot = ready(VmmConfig(boot=ElfBoot(program), memory=MemoryConfig(size_mib=8)))

with Target(snapshot, timeout=5) as target:
    print(target.run(b"n\x02abd\x02ab").value)  # 2
    result = target.run(b"d\x02a")
    print(result.crash, result.exit.vector, result.exit.symbol)  # True 14 sum_of
    print(any(result.coverage))  # True
    batch = target.run_batch([b"n\x01x", b"a\x00", b"?"] * 100)
    print(batch.values[:3], batch.failures[1].vector, len(batch.failures))  # [1, None, -1] 0 100
