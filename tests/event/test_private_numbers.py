"""A plain read of a nonblocking descriptor is allowed until the program knows its number, and not after."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each learns the number of `source` in another way.
ROUTES = {
    "fileno": "number = source.fileno()",
    "repr": "number = int(repr(source).partition('=')[2].rstrip(')'))",
    "Events.fd": "number = Events(source).fd",
    "repr of Events": "number = int(repr(Events(source)).partition('=')[2].partition(',')[0])",
    "an object with fileno": "import select; select.select([source], [], [], 0); number = made",
    "an event": """
class Learns:
    def init(self, ops): ops.add(Events(source))
    def process(self, events, ops):
        global number
        number = events.fd
manager = EventManager()
id = manager.add_subscriber(Learns())
fill()
manager.run()
source.read()
manager.remove_subscriber(id)
""",
    "async for": """
class Waiter:
    pass
waiter = Waiter()
number = source._begin_wait(waiter)
source._end_wait()
""",
    "a child": """
child = os.fork()
if not child:
    os.set_blocking(source.fileno(), True)
    os._exit(0)
os.waitpid(child, 0)
number = made
""",
}
SOURCES = {"EventFd": "fill = source.write", "TimerFd": "fill = lambda: source.set(0)"}
START = """
import os, threading
from pyvmm import EventFd, EventManager, Events, TimerFd
source = {0}()
{1}
def link(number):
    try:
        return os.readlink(f"/proc/self/fd/{{number}}")
    except FileNotFoundError:  # the folder itself
        return ""
# The number, without asking for it.
names = {{"EventFd": "[eventfd]", "TimerFd": "[timerfd]"}}
made = max(int(n) for n in os.listdir("/proc/self/fd") if names["{0}"] in link(n))
"""
# If the wait held the GIL, the main thread could not end it.
WAIT = """
assert number == made
os.set_blocking(number, True)
waiting = threading.Thread(target=source.read)
waiting.start()
while "S" not in open(f"/proc/self/task/{waiting.native_id}/stat").read().split(") ")[1][:1]:
    pass
fill()
waiting.join()
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("route", ROUTES)
def test_once_the_number_is_known_a_read_never_holds_up_other_threads(source: str, route: str) -> None:
    run(START.format(source, SOURCES[source]) + ROUTES[route] + WAIT)


@pytest.mark.parametrize("source", SOURCES)
def test_private_number_is_read_plainly_by_the_program_and_the_loop(source: str) -> None:
    run(
        START.format(source, SOURCES[source])
        + """
counts = []
class Drained:
    def init(self, ops): ops.add(Events(source, drain=True))
    def process(self, events, ops): counts.append(events.count)
manager = EventManager()
id = manager.add_subscriber(Drained())
fill()
assert manager.run() == 1 and counts == [1]
manager.remove_subscriber(id)
try:
    source.read()
    raise AssertionError("it is empty")
except BlockingIOError:
    pass
"""
    )


def test_number_used_again_for_a_blocking_eventfd_is_not_private() -> None:
    run(
        """
import threading
from pyvmm import EventFd
EventFd().close()
source = EventFd(nonblocking=False)
waiting = threading.Thread(target=source.read)
waiting.start()
source.write()
waiting.join()
"""
    )
