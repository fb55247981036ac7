"""Virtio devices in Python: what such a device has, and how a machine's loop serves it.

docs/virtio-python.md shows how to write one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pyvmm.aio import refuse_awaitable
from pyvmm.events import EventSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm._pyvmm import EventManager, EventOps, Events, SubscriberId, VirtioTransport, Virtqueue


@runtime_checkable
class VirtioProgram(Protocol):
    """A virtio device in Python, for `VmmConfig.virtio`.

    It may also have:

    - ``features``: the feature bits that it offers, 0 by default
    - ``config``: its configuration space at first, bytes
    - ``attach(transport)``: called with its `VirtioTransport` when the machine is made
    - ``activate(features)``: the driver has started the device with these features
    - ``reset()``: the driver has reset the device, or a snapshot was restored
    - ``write_config(offset, data)``: the driver writes the configuration space. Called on the
      vCPU's thread; the transport's ``set_config_quietly`` answers
    - ``save()`` and ``restore(state)``: its state for snapshots, bytes; called on the thread that
      takes or restores the snapshot, as is the ``reset`` before a ``restore``

    All others are called on the thread that runs the machine's loop, as the methods of a subscriber
    are. Their exceptions end the run.
    """

    @property
    def device_type(self) -> int:
        """The type, such as 18 for an input device (virtio 1.2, section 5)."""
        ...

    @property
    def queues(self) -> Sequence[int]:
        """The maximum sizes of the queues, each a power of two."""
        ...

    def process(self, queue: Virtqueue) -> object:
        """Answer the chains of a queue, which the driver has notified."""


class _Server:
    """The subscriber of a device's notifications."""

    def __init__(self, device: Any, transport: VirtioTransport) -> None:
        self._device = device
        self._transport = transport

    def init(self, ops: EventOps) -> None:
        """Watch the notifications of all queues."""
        from pyvmm._pyvmm import Events

        for descriptor in self._transport._descriptors():
            ops.add(Events(descriptor, EventSet.IN))

    def process(self, events: Events, _ops: EventOps) -> object:
        """Tell the device what the driver has done, and give it the queue."""
        happened, queue = self._transport._take(events.fd)
        for features in happened:
            if features is None:
                _call(self._device, "reset")
            else:
                _call(self._device, "activate", features)
        if queue is None:
            return None
        try:
            return self._device.process(queue)
        except BaseException:
            self._transport._left(events.fd)
            raise


def _call(device: Any, name: str, *arguments: Any) -> None:
    if (method := getattr(device, name, None)) is not None:
        refuse_awaitable(method(*arguments), f"{type(device).__qualname__}.{name}")


def connect(device: Any, transport: VirtioTransport, manager: EventManager) -> SubscriberId:
    """Serve a device in a machine's loop. Return the id of its subscriber."""
    _call(device, "attach", transport)
    return manager.add_subscriber(_Server(device, transport))
