"""Twenty machines in one loop. Each has its own exit handler, so each run ends only for its own machine."""

from concurrent.futures import ThreadPoolExecutor

from pyvmm import EventManager, FlatBoot, Vmm, VmmConfig


def guest(number: int) -> bytes:
    """Mov al, number; out 0xf4, al; hlt."""
    return bytes([0xB0, number, 0xE6, 0xF4, 0xF4])


manager = EventManager()
machines = [Vmm(VmmConfig(boot=FlatBoot(guest(number))), event_manager=manager) for number in range(20)]
with ThreadPoolExecutor(len(machines)) as pool:
    exits = list(pool.map(lambda machine: machine.run(timeout=60), machines))
for machine in machines:
    machine.close()
print([exit.code for exit in exits] == list(range(20)))  # True
