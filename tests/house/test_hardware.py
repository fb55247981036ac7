"""The script behind `make hardware`: what it builds without a network, and what it leaves out."""

from __future__ import annotations

import ast
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, is_named, left_out, script

SCRIPT = ROOT / "scripts" / "hardware"
sys.path.insert(0, str(SCRIPT))
import initrd  # noqa: E402
import packages  # noqa: E402
import qemu  # noqa: E402
import tsc  # noqa: E402

VERSION = f"{qemu.VERSION}7+deb12u1"
# What the compiler makes of the two comparisons.
CHECK_IO = bytes.fromhex("f6c480 0f84 11223344 c1e808 83e00f 83f809 0f85")
STACK_OF_TSS = bytes.fromhex("c1e808 4989d4 89ca 89c1 83e107 83f901 0f85")


def test_both_masks_of_a_known_qemu_lose_the_busy_bit_and_nothing_else_changes(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_bytes(b"before" + CHECK_IO + b"between" + STACK_OF_TSS + b"behind")
    qemu.accept_busy_tss(program, VERSION)
    mended = CHECK_IO.replace(b"\xe0\x0f", b"\xe0\x0d"), STACK_OF_TSS.replace(b"\xe1\x07", b"\xe1\x05")
    assert program.read_bytes() == b"before" + mended[0] + b"between" + mended[1] + b"behind"
    busy, available = 11, 9
    assert busy & 0x0D == available & 0x0D == 9
    assert busy & 0x05 == available & 0x05 == 1


@pytest.mark.parametrize(
    ("program", "version"),
    [
        (CHECK_IO + STACK_OF_TSS, "1:8.0+dfsg-1"),
        (CHECK_IO, VERSION),
        (CHECK_IO + CHECK_IO + STACK_OF_TSS, VERSION),
        (CHECK_IO.replace(b"\xe0\x0f", b"\xe0\x0d") + STACK_OF_TSS, VERSION),
    ],
    ids=["another version", "one place is missing", "a place is there twice", "mended already"],
)
def test_any_other_qemu_is_refused_and_stays_as_it_is(tmp_path: Path, program: bytes, version: str) -> None:
    file = tmp_path / "qemu"
    file.write_bytes(program)
    with pytest.raises(qemu.UnknownQemuError, match="QEMU"):
        qemu.accept_busy_tss(file, version)
    assert file.read_bytes() == program


def module(depends: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


def kernel_with(tmp_path: Path, modules: dict[str, str]) -> Path:
    for name, depends in modules.items():
        data = module(depends)
        file = tmp_path / f"lib/modules/6.1/kernel/{name}.ko.xz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(lzma.compress(data))
    return tmp_path


def test_modules_come_behind_those_they_depend_on(tmp_path: Path) -> None:
    needs = dict.fromkeys(["virtio-pci", "9p", "overlay", "ccp", "virtio"], "") | {
        "virtio-pci": "virtio", "9pnet_virtio": "9pnet,virtio", "9pnet": "", "9p": "9pnet", "kvm-amd": "kvm,ccp",
        "kvm": "irq-bypass", "irq-bypass": "",
    }  # fmt: skip
    order = list(initrd.load_order(kernel_with(tmp_path, needs)))
    assert sorted(order) == sorted(name.replace("-", "_") for name in needs)
    for name, depends in needs.items():
        for needed in depends.split(",") if depends else []:
            assert order.index(needed.replace("-", "_")) < order.index(name.replace("-", "_"))


def test_module_that_is_built_in_is_not_loaded_and_one_that_is_nowhere_is_said(tmp_path: Path) -> None:
    kernel = kernel_with(tmp_path, dict.fromkeys(["virtio_pci", "9pnet_virtio", "9p", "kvm_amd"], ""))
    with pytest.raises(packages.UnavailableError, match="overlay"):
        initrd.load_order(kernel)
    (kernel / "lib/modules/6.1/modules.builtin").write_text("kernel/fs/overlayfs/overlay.ko\n")
    assert "overlay" not in initrd.load_order(kernel)


def entries_of(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and data of each file of a cpio archive in the format "newc"."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert (archive[at : at + 6], at % 4) == (b"070701", 0)
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at += (110 + name_size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            return found
        found[name[:-1].decode()] = mode, archive[at : at + size]
        at += (size + 3) // 4 * 4


def test_archive_has_each_file_with_its_mode_and_data() -> None:
    files = [("d", initrd.DIRECTORY, b""), ("d/program", initrd.PROGRAM, b"hello"), ("d/empty", initrd.DATA, b"")]
    assert entries_of(initrd.archive(files)) == {name: (mode, data) for name, mode, data in files}


@pytest.mark.parametrize("name", [name for entry in left_out() for name in entry.tests])
def test_what_is_left_out_is_there(name: str) -> None:
    """A test that has been renamed must not fall out of the list unseen."""
    path, _, function = name.partition("::")
    assert (ROOT / path).exists()
    if function:
        names = {
            node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert function.partition("[")[0] in names


def test_name_of_a_file_a_function_or_a_case_means_those_and_no_others() -> None:
    test = "tests/test_a.py::test_b[c]"
    assert all(is_named(name, test) for name in ("tests", "tests/test_a.py", "tests/test_a.py::test_b", test))
    assert not any(
        is_named(name, test) for name in ("tests/test_", "tests/test_a.py::test", "tests/test_a.py::test_b[")
    )


def test_every_reason_is_given_and_the_subset_is_made_of_tests() -> None:
    assert all(entry.reason and entry.tests for entry in left_out())
    source = (SCRIPT / "__main__.py").read_text()
    (names,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "SUBSET"
    )
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in names)


def test_frequency_of_the_time_stamp_counter_is_the_same_each_time() -> None:
    one, other = tsc.khz(), tsc.khz()
    assert one > 100_000, "a processor of more than 100 MHz"
    assert abs(one - other) < one / 100


QEMU_THAT_BOOTS_AT_THE_SECOND_START = """#!/bin/bash
for argument; do
    case $argument in
    *mount_tag=job*) job=${argument#*path=}; job=${job%%,*} ;;
    esac
done
if [ ! -e "$job/tried" ]; then
    touch "$job/tried"
    exec sleep 1000
fi
echo booted >"$job/output"
echo 7 >"$job/status"
"""


def test_kernel_that_does_not_boot_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    hardware = script(SCRIPT / "__main__.py", "hardware")
    program = tmp_path / "root" / "usr" / "bin" / "qemu-system-x86_64"
    program.parent.mkdir(parents=True)
    program.write_text(QEMU_THAT_BOOTS_AT_THE_SECOND_START)
    program.chmod(0o755)
    (tmp_path / "job").mkdir()
    monkeypatch.setattr(hardware, "BOOT_LIMIT_S", 1.0)
    assert hardware.execute(tmp_path, tmp_path / "job", "true", "max", 60) == 7
    said = capfdbinary.readouterr()
    assert said.out.endswith(b"booted\n")
    assert b"started again" in said.out + said.err


def test_unknown_mode_is_refused() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "nonsense"], capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert b"invalid choice" in done.stderr
