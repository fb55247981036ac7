"""The shape of the house: where pyo3 may be named, what is exported, and that each room has its test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import pyvmm
from conftest import ROOT
from pyvmm import _pyvmm

RUST = sorted((ROOT / "src").rglob("*.rs"))
PYTHON = sorted((ROOT / "python" / "pyvmm").glob("*.py"))
MOST_LINES = 500

# Rooms whose test has another name: what a user sees first is tested there.
TESTED_BY = {
    "src/event/turns.rs": "tests/event/test_event_manager.py",
    "src/py/lead.rs": "tests/event/test_endpoint.py",
    "src/py/device.rs": "tests/devices/test_devices.py",
    "src/py/in_loop.rs": "tests/vmm/test_life.py",
    "src/py/hooks.rs": "tests/vcpu/test_hooks.py",
    "src/py/raised.rs": "tests/devices/test_devices.py",
    "src/py/vmm_devices.rs": "tests/devices/test_devices.py",
    "src/vcpu/access.rs": "tests/devices/test_devices.py",
    "python/pyvmm/hostcalls.py": "tests/devices/test_hostcalls.py",
    "src/py/attach.rs": "tests/event/test_callbacks.py",
    "src/py/attached.rs": "tests/event/test_event_fd.py",
    "src/py/awaiting.rs": "tests/aio/test_aio_ends.py",
    "src/py/timers.rs": "tests/event/test_timers.py",
    "src/py/reader.rs": "tests/aio/test_async_for.py",
    "src/py/run.rs": "tests/aio/test_aio_ends.py",
    "src/py/watch.rs": "tests/event/test_callbacks.py",
    "src/py/batch.rs": "tests/event/test_event_manager.py",
    "src/py/callback.rs": "tests/event/test_event_manager.py",
    "src/py/config.rs": "tests/vmm/test_vmm.py",
    "src/py/errors.rs": "tests/vmm/test_vmm.py",
    "src/py/events.rs": "tests/event/test_event_manager.py",
    "src/py/exit.rs": "tests/vmm/test_vmm.py",
    "src/py/host.rs": "tests/cli/test_doctor.py",
    "src/py/live.rs": "tests/py/test_ending.py",
    "src/py/interpreter.rs": "tests/py/test_ending.py",
    "src/py/interrupt.rs": "tests/boot/test_boot.py",
    "src/py/owned.rs": "tests/py/test_forked.py",
    "src/py/serial.rs": "tests/devices/test_streams.py",
    "src/vmm/machine.rs": "tests/rust/seed.rs",
    "src/vmm/parts.rs": "tests/rust/seed.rs",
    "src/vmm/resets.rs": "tests/snapshot/test_snapshot.py",
    "src/vmm/runner.rs": "tests/vmm/test_life.py",
    "src/bytes.rs": "tests/snapshot/test_snapshot_file.py",
    "src/cpu/features.rs": "src/cpu/cpuid.rs",
    "src/devices/line.rs": "tests/vm/test_interrupts.py",
    "src/devices/platform.rs": "tests/vmm/test_vmm.py",
    "src/event/recorded.rs": "tests/trace/test_trace.py",
    "src/event/subscriber.rs": "tests/event/test_event_manager.py",
    "src/fixup/access.rs": "src/fixup/walk.rs",
    "src/vmm/run.rs": "tests/rust/seed.rs",
    "src/vmm/life.rs": "tests/vmm/test_vmm.py",
    "src/event/calls.rs": "tests/event/test_endpoint.py",
    "src/event/inner.rs": "tests/event/test_event_manager.py",
    "src/py/turning.rs": "tests/event/test_event_manager.py",
    "src/event/errors.rs": "tests/event/test_event_manager.py",
    "src/sync/held.rs": "src/sync/mod.rs",
    "src/sync/rank.rs": "src/sync/mod.rs",
    "src/vm/life.rs": "tests/vm/test_vm.py",
    "src/vm/vcpus.rs": "tests/vcpu/test_vcpu.py",
    "src/memory/view.rs": "tests/memory/test_memory.py",
    "src/vm/mod.rs": "tests/vm/test_vm.py",
    "src/vmm/renew.rs": "tests/snapshot/test_pool.py",
    "src/vm/restore.rs": "tests/snapshot/test_snapshot.py",
    "src/snapshot/save.rs": "tests/snapshot/test_snapshot_file.py",
    "src/snapshot/file.rs": "tests/snapshot/test_snapshot_file.py",
    "python/pyvmm/snapshots.py": "tests/snapshot/test_snapshot_pool.py",
    "src/vcpu/kick.rs": "tests/vcpu/test_kick.py",
    "src/py/subscribers.rs": "tests/event/test_subscribers.py",
    "src/vcpu/registers.rs": "tests/vcpu/test_vcpu.py",
    "python/pyvmm/registers.py": "tests/vcpu/test_vcpu.py",
    "src/vcpu/cell.rs": "tests/vcpu/test_vcpu.py",
    "src/vcpu/signal.rs": "tests/vcpu/test_kick.py",
    "src/py/vcpu_exit.rs": "tests/vm/test_kvm.py",
    "src/py/memory_parts.rs": "tests/memory/test_memory.py",
    "src/vcpu/run_page.rs": "tests/vcpu/test_robustness.py",
    "src/vcpu/thread.rs": "tests/vcpu/test_robustness.py",
    "src/fixup/bits.rs": "tests/fixup/test_fixups.py",
    "src/fixup/sse.rs": "tests/fixup/test_fixups.py",
    "src/fixup/cpu.rs": "tests/fixup/test_fixups.py",
    "src/boot/initrd.rs": "tests/boot/test_boot.py",
    "src/boot/mod.rs": "tests/boot/test_boot.py",
    "src/snapshot/new_file.rs": "tests/snapshot/test_snapshot_save.py",
    "src/devices/uart_bits.rs": "src/devices/uart.rs",
    "python/pyvmm/devices.py": "tests/vmm/test_vmm.py",
    "python/pyvmm/events.py": "tests/event/test_event_manager.py",
    "python/pyvmm/exceptions.py": "tests/vmm/test_vmm.py",
    "python/pyvmm/exits.py": "tests/vmm/test_vmm.py",
    "python/pyvmm/runner.py": "tests/cli/test_cli.py",
    "python/pyvmm/signals.py": "tests/cli/test_cli_hostile.py",
    "python/pyvmm/__main__.py": "tests/cli/test_cli.py",
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(path: Path) -> str:
    """The text without its comments."""
    return re.sub(r"//.*", "", path.read_text())


def test_pyo3_is_named_only_in_the_binding() -> None:
    named = {name(path) for path in RUST if "pyo3" in code(path)}
    assert {path for path in named if not path.startswith("src/py/")} == {"src/lib.rs"}


def test_only_callback_calls_into_python_from_other_threads() -> None:
    # One way in, which an interpreter that ends closes.
    assert {name(path) for path in RUST if re.search(r"Python::(try_)?attach", code(path))} == {"src/py/attach.rs"}
    attaching = {name(path) for path in RUST if re.search(r"use super::attach::(\{.*\b)?attach\b", code(path))}
    allowed = {
        "src/py/callback.rs",
        "src/py/errors.rs",  # makes an exception
        "src/py/interrupt.rs",  # runs signal handlers, on the caller's thread
        "src/py/vm.rs",  # lets the GIL go while a machine is dropped
        "src/py/vmm.rs",
        "src/py/wakeup.rs",  # runs signal handlers, on the main thread
    }
    assert {path for path in attaching if path.startswith("src/py/")} == allowed


def is_list(path: Path) -> bool:
    """Nothing but a list of what the folder holds."""
    return path.name in {"lib.rs", "__init__.py"} or (path.name == "mod.rs" and "fn " not in code(path))


@pytest.mark.parametrize("path", [*RUST, *PYTHON], ids=name)
def test_every_source_file_has_its_test(path: Path) -> None:
    if is_list(path) or "#[cfg(test)]" in path.read_text():
        return
    own = list((ROOT / "tests").glob(f"*/test_{path.stem}.py"))
    assert own or (ROOT / TESTED_BY.get(name(path), "none")).exists(), f"{name(path)} has no test"


@pytest.mark.parametrize("path", [*RUST, *PYTHON], ids=name)
def test_files_open_with_what_lives_there_and_are_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith(("//!", '"""'))
    assert len(lines) <= MOST_LINES


def test_every_lock_has_a_rank() -> None:
    unranked = re.compile(r"parking_lot|std::sync::\{?[^;]*\b(Mutex|RwLock|Condvar)\b")
    without = {name(path) for path in RUST if unranked.search(code(path).replace("\n", " "))}
    # Held over each fork, whatever its thread holds, and let go in a child without its parent's
    # waiters: a lock of std, under which no other is taken.
    assert {path for path in without if not path.startswith("src/sync/")} == {"src/memory/mapping.rs"}


def test_every_export_of_the_native_module_is_public_documented_and_in_the_stub() -> None:
    stub = ast.parse((ROOT / "python" / "pyvmm" / "_pyvmm.pyi").read_text())
    stubbed = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    exported = {export for export in vars(_pyvmm) if not export.startswith("_")}
    assert exported == {export for export in stubbed if not export.startswith("_")}
    assert exported - {"close_all", "MsrBytes", "RegisterBytes"} <= set(pyvmm.__all__)
    for export in exported:
        assert getattr(_pyvmm, export).__doc__, export


def test_every_public_name_is_there() -> None:
    for public in pyvmm.__all__:
        assert getattr(pyvmm, public).__doc__, public
        assert public in dir(pyvmm)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pyvmm.nonsense


def test_each_atomic_ordering_and_unsafe_block_has_its_reason() -> None:
    for path in RUST:
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if re.search(r"unsafe \{|unsafe impl", line.split("//")[0]):
                above = "\n".join(lines[max(0, number - 8) : number + 1])
                assert "SAFETY" in above, f"{name(path)}:{number + 1}"
