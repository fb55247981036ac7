"""A tour of the event loop: sources, changes in a callback, errors, signals, counters."""

import os
import signal
import threading

from pyvmm import EventFd, EventManager, EventOps, Events, TimerFd

manager = EventManager()

# A source is anything with a file descriptor. With `drain` the loop reads an EventFd or TimerFd and
# passes the count.
doorbell, timer = EventFd(), TimerFd()


class Doorbell:
    """Watches the doorbell for one event."""

    def init(self, ops: EventOps) -> None:
        ops.add(Events(doorbell, drain=True))

    def process(self, events: Events, ops: EventOps) -> None:
        print("rung", events.count)  # rung 3
        ops.remove(doorbell)  # from inside its own callback


bell = manager.add_subscriber(Doorbell())
doorbell.write(3)
manager.run()
manager.event_ops(bell).add(Events(doorbell))  # from outside: any thread may, also while the loop waits
manager.remove_subscriber(bell)


# Functions as subscribers, timers, and stop.
@manager.on(timer)
def tick(events: Events) -> None:
    print("ticks:", timer.read())  # ticks: 1


timer.set(0.01)
manager.call_later(0.05, manager.stop)
manager.run_forever()


# An exception comes out of the run.
def fail() -> None:
    raise LookupError("on purpose")


manager.call_later(0.0, fail)
try:
    manager.run()
except LookupError as error:
    print("raised:", error)  # raised: on purpose

# The program's signal handlers run while the loop waits in the main thread. If one raises, the run
# ends.
signal.signal(signal.SIGUSR1, signal.default_int_handler)
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
try:
    manager.run()
except KeyboardInterrupt:
    print("interrupted")  # interrupted

# A counter of the loop.
print("dispatched", manager.dispatched)  # dispatched 3
