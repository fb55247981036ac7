"""Every example runs and prints what its comments say."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from conftest import ROOT, linux_directory
from guests import elf

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Linux

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEED_NO_KVM = {"event_loop", "loop_from_threads", "loop_tour", "network_partition"}
NEED_LINUX = {"boot_linux", "initrd_directory", "linux_disk_and_network"}
NEED_RAY = {"snapshot_ray"}
NEED_GCC = {"fuzz_parser", "multiboot_kernel"}
FOR_PYTEST = {"test_guest"}


def run(example: Path, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", str(example), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.stem in NEED_NO_KVM], ids=lambda e: e.stem)
def test_example_prints_what_it_says(example: Path) -> None:
    expected = re.findall(r"print\(.*\)  # (.*)", example.read_text())
    assert expected
    # A callback may print before or after the preceding lines.
    assert sorted(run(example).splitlines()) == sorted(expected)


@pytest.mark.kvm
@pytest.mark.parametrize(
    "example",
    [e for e in EXAMPLES if e.stem not in NEED_NO_KVM | NEED_LINUX | NEED_RAY | FOR_PYTEST],
    ids=lambda e: e.stem,
)
def test_example_with_a_machine_prints_what_it_says(example: Path) -> None:
    if example.stem in NEED_GCC and shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    test_example_prints_what_it_says(example)


@pytest.mark.kvm
def test_example_for_pytest_passes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--rootdir",
        str(tmp_path),
        str(ROOT / "examples" / "test_guest.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert "3 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.kvm
def test_example_for_notebooks_shows_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells, as a notebook runs them: the value of the last line is shown."""
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            body = ast.parse("".join(cell["source"])).body
            last = body.pop()
            assert isinstance(last, ast.Expr)
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names)._repr_html_())
    assert capsys.readouterr().out == "H!"
    assert len(shown) > 6
    assert all(html.startswith("<table>") for html in shown)
    assert ">42<" in shown[0]


@pytest.mark.kvm
def test_example_maps_on_ray() -> None:
    pytest.importorskip("ray", reason="ray is not installed", exc_type=ImportError)
    test_example_prints_what_it_says(ROOT / "examples" / "snapshot_ray.py")


@pytest.mark.linux
@pytest.mark.timeout(300)
def test_example_boots_linux(linux: Linux) -> None:
    said = run(ROOT / "examples" / "boot_linux.py", str(linux.vmlinux), str(linux.initramfs), linux.cmdline)
    assert "pyvmm: userspace reached" in said
    assert said.endswith("reset (vCPU 0)\n")


@pytest.mark.linux
@pytest.mark.timeout(900)
def test_example_answers_linux() -> None:
    machine = linux_directory() / "virtio.toml"
    if not machine.exists():
        pytest.skip("the Linux with virtio is not built: make linux")
    said = run(ROOT / "examples" / "linux_disk_and_network.py", str(machine))
    assert said == f"at byte {(1 << 20) - 16}\nthis page is made for the guest\n"


@pytest.mark.kvm
def test_example_packs_a_directory(tmp_path: Path) -> None:
    """A kernel that ends with the first byte of its RAM disk, which is that of the archive's magic number."""
    # mov eax, [rsi + 0x218]: the address of the RAM disk; mov al, [rax]; out 0xf4, al
    (tmp_path / "kernel").write_bytes(elf(0x100000, b"\x8b\x86\x18\x02\x00\x00\x8a\x00\xe6\xf4"))
    (tmp_path / "root").mkdir()
    said = run(ROOT / "examples" / "initrd_directory.py", str(tmp_path / "kernel"), str(tmp_path / "root"))
    assert said == f"code {ord('0')} (vCPU 0)\n"


def snippets() -> dict[str, str]:
    """The Python programs in README and docs that run by themselves, by page and number."""
    return {
        f"{path.stem}-{number}": snippet
        for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
        for number, snippet in enumerate(
            re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL), 1
        )
    }


@pytest.mark.kvm
@pytest.mark.parametrize("program", snippets().values(), ids=snippets())
def test_program_in_the_documentation_runs(program: str, tmp_path: Path) -> None:
    if '"gcc"' in program and shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    path = tmp_path / "program.py"
    path.write_text(program)
    assert run(path)


def test_first_program_is_the_example() -> None:
    example = (ROOT / "examples" / "first_program.py").read_text()
    assert example.split('"""\n\n', 1)[1] in (ROOT / "README.md").read_text()
