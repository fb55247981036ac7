"""What every wheel and source distribution must have, and the files that are published beside them.

`python scripts/packages.py FOLDER` checks the packages in a folder, copies the list of the crates
that are compiled into the wheels (an SBOM in CycloneDX's format) out of one of them, and writes
SHA256SUMS.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
LICENCES = ["LICENSE-APACHE", "LICENSE-BSD-3-CLAUSE"]
# The source distribution builds without a network, and explains itself.
IN_SOURCE = ["Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md", "CHANGELOG.md", "docs/getting-started.md"]


def metadata_faults(text: str) -> list[str]:
    """What PyPI would refuse or show wrongly."""
    found = Parser().parsestr(text)
    wanted = {"Name": NAME, "Version": VERSION}
    faults = [f"the {key} is {found[key]}" for key, value in wanted.items() if found[key] != value]
    links = re.findall(r"\]\((?!https?://)([^)]*)\)", found.get_payload())
    return faults + [f"the description has a link that PyPI cannot follow: {link}" for link in links]


def wheel_faults(path: Path) -> list[str]:
    """What is wrong with a wheel."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        faults = metadata_faults(wheel.read(f"{info}/METADATA").decode())
        wanted = [f"{info}/licenses/{licence}" for licence in LICENCES]
        wanted += ["pyvmm/py.typed", "pyvmm/_pyvmm.pyi", "pyvmm/linux/build.sh", "pytest_pyvmm/__init__.py"]
        faults += [f"it does not have {name}" for name in wanted if name not in names]
    crates = {crate["name"] for crate in sbom(path).get("components", [])}
    return faults + [f"its SBOM does not have {crate}" for crate in ("kvm-ioctls", "pyo3") if crate not in crates]


def source_faults(path: Path) -> list[str]:
    """What is wrong with a source distribution."""
    with tarfile.open(path) as source:
        top = path.name.removesuffix(".tar.gz")
        names = source.getnames()
        information = source.extractfile(f"{top}/PKG-INFO")
        faults = metadata_faults(information.read().decode()) if information else []
    return faults + [f"it does not have {name}" for name in IN_SOURCE + LICENCES if f"{top}/{name}" not in names]


def sbom(path: Path) -> dict[str, list[dict[str, str]]]:
    """The crates in a wheel, without the folder that it was built in; empty if the wheel has no list."""
    with zipfile.ZipFile(path) as wheel:
        listed = [name for name in wheel.namelist() if ".dist-info/sboms/" in name]
        text = wheel.read(listed[0]).decode() if listed else "{}"
    found: dict[str, list[dict[str, str]]] = json.loads(text.replace(f"path+file://{ROOT}", "pyvmm"))
    return found


def main(folder: Path) -> int:
    """Check the packages in a folder, and write what is published beside them."""
    wheels, sources = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    faults = [(path, fault) for path in wheels for fault in wheel_faults(path)]
    faults += [(path, fault) for path in sources for fault in source_faults(path)]
    for path, fault in faults:
        print(f"{path.name}: {fault}", file=sys.stderr)
    if faults or not wheels + sources:
        return 1
    beside = folder / f"{NAME}-{VERSION}.cdx.json"
    if wheels:
        beside.write_text(json.dumps(sbom(wheels[0]), indent=1) + "\n")
    published = [*wheels, *sources, *([beside] if wheels else [])]
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in published]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
