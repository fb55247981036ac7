"""AFL++ fuzzes a guest. Start it with Debian's afl++.

AFL_SKIP_BIN_CHECK=1 afl-fuzz -i SEEDS -o FOUND -- python examples/fuzz/with_afl.py
"""

from pyvmm.afl import serve
from pyvmm.fuzz import Target
from record_target import record_parser

with Target(record_parser(), timeout=0.5) as target:
    serve(target)
