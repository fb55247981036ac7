"""The command line from a script, as in CI: a guest as a file, the text that it must print, its end as JSON."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# mov dx, 0x3f8; print "ok"; mov al, 3; out 0xf4, al. Real mode.
GUEST = bytes.fromhex("baf803 b06f ee b06b ee b003 e6f4")


def pyvmm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Call `pyvmm`, which is also `python -m pyvmm`."""
    command = [sys.executable, "-m", "pyvmm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


with tempfile.TemporaryDirectory() as folder:
    guest = Path(folder, "guest.bin")
    guest.write_bytes(GUEST)
    ended = pyvmm("run", "--flat", str(guest), "--json", "--timeout", "60")
    found = pyvmm("run", "--flat", str(guest), "--expect", "ok", "--timeout", "60")
    missing = pyvmm("run", "--flat", str(guest), "--expect", "login: ", "--timeout", "60")

exit = json.loads(ended.stdout)
print(ended.returncode, exit["reason"], exit["code"], ended.stderr)  # 3 code 3 ok
print(found.returncode, missing.returncode)  # 0 123
print(missing.stderr.splitlines()[0])  # pyvmm: the console did not show 'login: '; its last lines are:
