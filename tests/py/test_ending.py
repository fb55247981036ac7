"""The end of the interpreter: whatever is in progress then, the process ends with its own status, and in time.

Covers src/py/interpreter.rs, src/py/registry.rs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from conftest import TESTS

DEADLINE_S = 60
# What is in progress when the interpreter ends is where it is by chance.
TIMES = 20 if "PYVMM_STRESS_S" in os.environ else 2

PREAMBLE = """
import atexit, os, sys, threading, time
from guests import COUNT_IN_MEMORY, HALT, OUT_FOR_EVER, PRINT_FOR_EVER, SPIN, exit_with, flat

class Device:
    def __init__(self, call):
        self.call = call
        self.called = threading.Event()

    def write(self, offset, size, value):
        self.called.set()
        self.call()

class Forever:
    def kick(self):
        entered.set()
        time.sleep(1000)

entered = threading.Event()

def daemon(call, *arguments):
    threading.Thread(target=call, args=arguments, daemon=True).start()

def for_ever(call):
    while True:
        entered.set()
        try:
            call()
        except StateError:
            pass

def with_device(call):
    vmm = Vmm(flat(OUT_FOR_EVER))
    device = Device(call)
    vmm.add_pio_device(0x500, 4, device)
    return vmm, device.called

def ring(call):
    manager, bell = EventManager(), EventFd(1)
    manager.on(bell)(lambda event: (entered.set(), call()))
    return manager
"""

# By name: the program, run once pyvmm is imported.
PROGRAMS = {
    "a daemon thread in run_forever whose callback gives the GIL away": """
        daemon(ring(lambda: time.sleep(0.001)).run_forever)
        entered.wait()
    """,
    "a daemon thread in run_forever whose callback never returns": """
        daemon(ring(lambda: time.sleep(1000)).run_forever)
        entered.wait()
    """,
    "a daemon thread in run_forever whose callback computes": """
        daemon(ring(lambda: sum(range(1000))).run_forever)
        entered.wait()
    """,
    "a daemon thread in run_forever that waits": """
        manager = EventManager()
        daemon(manager.run_forever)
        manager.remote_endpoint().call_blocking(lambda manager: None)
    """,
    "a daemon thread in call_blocking": """
        endpoint = EventManager().remote_endpoint()
        daemon(lambda: (entered.set(), endpoint.call_blocking(print)))
        entered.wait()
    """,
    "a daemon thread in call_blocking on the loop's thread": """
        manager = EventManager()
        endpoint = manager.remote_endpoint()
        daemon(ring(lambda: endpoint.call_blocking(lambda manager: time.sleep(1000))).run_forever)
        entered.wait()
    """,
    "a daemon thread in run": """
        vmm, called = with_device(lambda: time.sleep(0.001))
        daemon(vmm.run)
        called.wait()
    """,
    "a daemon thread in run whose device never returns": """
        vmm, called = with_device(lambda: time.sleep(1000))
        daemon(vmm.run)
        called.wait()
    """,
    "a started machine whose device never returns": """
        vmm, called = with_device(lambda: time.sleep(1000))
        vmm.start()
        called.wait()
    """,
    "a started machine that is dropped by its device": """
        vmm, called = with_device(lambda: (box.clear(), time.sleep(0.001)))
        box = [vmm]
        del vmm
        box[0].start()
        called.wait()
    """,
    "a started machine whose output nobody reads": """
        reader, writer = os.pipe()
        vmm = Vmm(flat(PRINT_FOR_EVER, serial=SerialConfig(output=writer)))
        vmm.start()
    """,
    "a hook that never returns": """
        vmm = Vmm(flat(OUT_FOR_EVER))
        vmm.on_exit("io", lambda vcpu, exit: (entered.set(), time.sleep(1000)))
        vmm.start()
        entered.wait()
    """,
    "an exit handler whose kick never returns": """
        vm = KvmVm(flat(HALT), Forever())
        vm.run()
        entered.wait()
    """,
    "daemon threads that pause and resume": """
        vmm, called = with_device(lambda: None)
        vmm.start()
        called.wait()
        for _ in range(3):
            daemon(for_ever, lambda: (vmm.pause(), vmm.resume()))
        entered.wait()
    """,
    "daemon threads that look at a machine": """
        vmm = Vmm(flat(SPIN))
        daemon(for_ever, lambda: (vmm.state, vmm.unanswered, vmm.stats.exits, repr(vmm)))
        daemon(for_ever, lambda: vmm.vcpus[0].regs.rip)
        daemon(for_ever, lambda: vmm.run(0))
        entered.wait()
    """,
    "daemon threads that make and fork machines": """
        snapshot = Vmm(flat(COUNT_IN_MEMORY)).snapshot()
        daemon(for_ever, lambda: snapshot.fork().run(0.001))
        daemon(for_ever, lambda: Vmm(flat(SPIN)).run(0.001))
        daemon(for_ever, lambda: snapshot.map(lambda fork, input: fork.run(0.001), range(3)))
        entered.wait()
    """,
    "daemon threads whose errors are made": """
        manager = EventManager()
        daemon(for_ever, lambda: Vmm(flat(b"", "nonsense")) if False else StateError("x"))
        daemon(for_ever, lambda: manager.call_later(1, lambda: None).cancel())
        def fail():
            try:
                Events("nonsense")
            except TypeError:
                pass
            try:
                VmmConfig.from_dict({"memory": {"size_mib": 0}})
            except ConfigError:
                pass
        daemon(for_ever, fail)
        entered.wait()
    """,
    "a machine that is started as the last handler runs": """
        def last():
            global vmm
            vmm, called = with_device(lambda: time.sleep(0.001))
            vmm.start()
            called.wait()
        first.append(last)
    """,
    "a machine that is run as the last handler runs": """
        first.append(lambda: print(Vmm(flat(exit_with(3))).run(60).code))
    """,
    "a loop that is stopped and awaited as the last handler runs": """
        manager = ring(lambda: time.sleep(0.001))
        thread = threading.Thread(target=manager.run_forever, daemon=True)
        thread.start()
        first.append(lambda: (manager.stop(), thread.join()))
    """,
    "a machine that is started as threads are joined": """
        def early():
            global vmm
            vmm, called = with_device(lambda: time.sleep(0.001))
            vmm.start()
            called.wait()
        threading._register_atexit(early)
    """,
    "a machine that is closed by a finalizer": """
        class Owner:
            def __init__(self):
                self.vmm, called = with_device(lambda: time.sleep(1000))
                self.vmm.start()
                called.wait()
            def __del__(self):
                self.vmm.close()
        first.append(lambda: globals().update(owner=Owner()))
    """,
    "a machine that is made and run by a finalizer": """
        class Late:
            make, config = Vmm, flat(exit_with(3))
            def __del__(self):
                try:
                    self.make(self.config).run(60)
                except Exception:
                    pass
        late = Late()
    """,
    "a machine that a handler leaves an exception of": """
        vmm, called = with_device(lambda: 1 / 0)
        vmm.start()
        called.wait()
        sys.unraisablehook = lambda unraisable: None
    """,
    "an import as the last handler runs": """
        del sys.modules["pyvmm"], sys.modules["pyvmm._pyvmm"]
        first.append(lambda: __import__("pyvmm"))
    """,
    "os._exit in a callback": """
        ring(lambda: os._exit(0)).run()
        os._exit(1)
    """,
    "os._exit in a device": """
        vmm, called = with_device(lambda: os._exit(0))
        vmm.run()
        os._exit(1)
    """,
    "a child that ends while its parent's loop and machine run": """
        vmm, called = with_device(lambda: time.sleep(0.001))
        vmm.start()
        daemon(ring(lambda: time.sleep(0.001)).run_forever)
        called.wait()
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            vmm.pause()
    """,
}


def end(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program with handlers that run before and after those of pyvmm."""
    before = "import atexit\nfirst = []\natexit.register(lambda: [call() for call in first])\n"
    whole = f"{before}from pyvmm import *\n{PREAMBLE}{textwrap.dedent(program)}"
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-W", "error", "-c", whole]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment, check=False)


@pytest.mark.kvm
@pytest.mark.parametrize("name", PROGRAMS)
def test_process_ends_with_its_own_status(name: str) -> None:
    for _ in range(TIMES):
        done = end(PROGRAMS[name])
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.kvm
@pytest.mark.parametrize("status", [0, 7])
def test_sys_exit_in_a_callback_ends_the_process_with_its_status(status: int) -> None:
    for program in (
        f"ring(lambda: sys.exit({status})).run()",
        f"ring(lambda: sys.exit({status})).run_forever()",
        f"with_device(lambda: sys.exit({status}))[0].run()",
    ):
        done = end(program)
        assert (done.returncode, done.stderr) == (status, "")


def test_subinterpreter_is_refused_and_leaves_the_main_one_its_import() -> None:
    program = """
        import os, sys
        try:
            import _interpreters as subinterpreters
        except ImportError:
            import _xxsubinterpreters as subinterpreters
        script = '''try:
            import pyvmm
        except ImportError as error:
            assert "subinterpreter" in str(error), error
        else:
            raise AssertionError
        '''
        for _ in range(2):
            interpreter = subinterpreters.create()
            failure = subinterpreters.run_string(interpreter, script)
            assert failure is None, failure
            # In 3.12 the end of one crashes the process, whatever it has imported: datetime, say.
            if sys.version_info[:2] != (3, 12):
                subinterpreters.destroy(interpreter)
            import pyvmm
        pyvmm.EventManager().run_with_timeout(0)
        if sys.version_info[:2] == (3, 12):
            os._exit(0)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
