"""A loop in its own thread, called from the main thread, with a function as subscriber and a scheduled call."""

import threading

from pyvmm import EventFd, EventManager, Events

manager = EventManager()
fd = EventFd()


@manager.on(fd)
def count(events: Events) -> None:
    print("read", fd.read())  # read 5
    manager.call_later(0.01, manager.stop)


thread = threading.Thread(target=manager.run_forever)
thread.start()
endpoint = manager.remote_endpoint()
print(endpoint.call_blocking(lambda manager: manager.dispatched))  # 0
fd.write(5)
thread.join()
