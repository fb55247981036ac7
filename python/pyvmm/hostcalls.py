"""Calls from the guest to Python functions: the host's side of `@vmm.hostcall`.

The guest fills a block in its memory and writes the block's guest-physical address to port 0x7076,
as 16 or 32 bits. After the instruction, the block contains the status and the result.
`examples/guest` has the guest's side. All numbers are little-endian:

    offset  bytes
         0      4  the function's number
         4      4  status: a `HostcallStatus`
         8      8  result, signed
        16      4  number of arguments, at most 6
        20      4  zero
        24     16  for each argument:
                       4  kind: 0 unsigned, 1 signed, 2 bytes, 3 a buffer
                       4  length of the bytes or the buffer
                       8  the number, or the guest-physical address

Reading the port returns the status of the machine's last call. The guest needs it if the block is
not in memory, where the status cannot be written.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from pyvmm.exceptions import GuestMemoryError
from pyvmm.exits import Stop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyvmm._pyvmm import GuestMemory, Vmm

PORT = 0x7076
# The longest block. A call reads this much at once.
_LONGEST = 120
_HEAD = struct.Struct("<IIqII")
_ARGUMENT = struct.Struct("<IIQ")
_SIGNED_REPLY = struct.Struct("<Iq")
_UNSIGNED_REPLY = struct.Struct("<IQ")
_MOST_ARGUMENTS = 6
_UNSIGNED, _SIGNED, _BYTES, _BUFFER = range(4)


class HostcallStatus(IntEnum):
    """The status in the guest's block."""

    OK = 0
    """The function returned; the result is its value."""
    BAD_BLOCK = 1
    """The block is not in memory, or was written with a width of 1."""
    NO_SUCH_FUNCTION = 2
    """No function has this number."""
    BAD_ARGUMENT = 3
    """There are more than 6 arguments, or one has an unknown kind."""
    BAD_MEMORY = 4
    """Bytes or a buffer are not entirely in memory; a buffer must be in one memory slot."""
    BAD_RESULT = 5
    """The function returned bytes that do not fit into the call's last buffer, or the call has no buffer."""
    FAILED = 6
    """The function raised `HostcallError`; the result is its code."""


# Plain numbers, because looking up an enum member is slower.
_OK, _BAD_BLOCK = int(HostcallStatus.OK), int(HostcallStatus.BAD_BLOCK)


class HostcallError(Exception):
    """Raised in a hostcall to return `HostcallStatus.FAILED` and this code to the guest.

    Any other exception ends the run and comes out of `Vmm.run`.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _RefusedError(Exception):
    """The call is not made, and the guest gets the status."""

    def __init__(self, status: HostcallStatus) -> None:
        super().__init__(status)
        self.status = status


class Hostcalls:
    """The device at the hostcall port of one machine."""

    def __init__(self, memory: GuestMemory) -> None:
        self.functions: dict[int, Callable[..., Any]] = {}
        self._memory = memory
        self._status = _OK

    def read(self, _offset: int, size: int) -> int:
        """Return the status of the last call."""
        return self._status & ((1 << 8 * size) - 1)

    def write(self, _offset: int, size: int, address: int) -> Stop | None:
        """Make the call described by the block at an address."""
        try:
            if size == 1:
                raise _RefusedError(HostcallStatus.BAD_BLOCK)
            number, count, words = self._block(address)
            function = self.functions.get(number)
            if function is None:
                raise _RefusedError(HostcallStatus.NO_SUCH_FUNCTION)
            arguments = [self._argument(*word) for word in words] if count else []
            returned = function(*arguments)
            if type(returned) is int:
                value = returned
            elif returned is None or isinstance(returned, Stop):
                value = 0
            else:
                value = self._result(returned, arguments)
        except _RefusedError as refused:
            self._reply(address, refused.status, 0)
        except HostcallError as error:
            self._reply(address, HostcallStatus.FAILED, error.code)
        else:
            self._reply(address, _OK, value)
            return returned if isinstance(returned, Stop) else None
        return None

    def _block(self, address: int) -> tuple[int, int, Iterable[tuple[int, int, int]]]:
        try:
            block = self._memory.read(address, _LONGEST)
        except GuestMemoryError:
            block = self._short_block(address)
        number, _, _, count, _ = _HEAD.unpack_from(block)
        if count > _MOST_ARGUMENTS:
            raise _RefusedError(HostcallStatus.BAD_ARGUMENT)
        return number, count, _ARGUMENT.iter_unpack(block[24 : 24 + 16 * count])

    def _short_block(self, address: int) -> bytes:
        """Read a block right below the end of memory."""
        try:
            head = self._memory.read(address, 24)
            count = _HEAD.unpack(head)[3]
            return head + (self._memory.read(address + 24, 16 * count) if count <= _MOST_ARGUMENTS else b"")
        except GuestMemoryError:
            raise _RefusedError(HostcallStatus.BAD_BLOCK) from None

    def _argument(self, kind: int, length: int, value: int) -> int | bytes | memoryview:
        try:
            if kind == _BYTES:
                return self._memory.read(value, length)
            if kind == _UNSIGNED:
                return value
            if kind == _SIGNED:
                return value - (value >> 63 << 64)
            if kind == _BUFFER:
                return self._memory.view(value, length)
        except GuestMemoryError:
            raise _RefusedError(HostcallStatus.BAD_MEMORY) from None
        raise _RefusedError(HostcallStatus.BAD_ARGUMENT)

    @staticmethod
    def _result(returned: object, arguments: list[int | bytes | memoryview]) -> int:
        if isinstance(returned, int):
            return returned
        if not isinstance(returned, bytes | bytearray | memoryview):
            raise TypeError(f"a hostcall returns None, an int, bytes or a Stop, not {type(returned).__name__}")
        buffers = [argument for argument in arguments if isinstance(argument, memoryview)]
        length = memoryview(returned).nbytes
        if not buffers or length > buffers[-1].nbytes or buffers[-1].readonly:
            raise _RefusedError(HostcallStatus.BAD_RESULT)
        buffers[-1][:length] = memoryview(returned).cast("B")
        return length

    def _reply(self, address: int, status: int, value: int) -> None:
        self._status = status
        if status == _BAD_BLOCK:
            return
        try:
            reply = (_UNSIGNED_REPLY if value > 0 else _SIGNED_REPLY).pack(status, value)
        except struct.error:
            raise OverflowError(f"a hostcall's result has at most 64 bits; {value:#x} has more") from None
        self._memory.write(address + 4, reply)


def _add(vmm: Vmm, number: int | None, function: Callable[..., Any]) -> Callable[..., Any]:
    if not callable(function):
        raise TypeError(f"a hostcall is a function, not {type(function).__name__}")
    _ = vmm.memory.size  # raises if the machine is closed
    port = vmm._pio_device(PORT)
    if port is None:
        port = Hostcalls(vmm.memory)
        vmm.add_pio_device(PORT, 4, port)
    elif not isinstance(port, Hostcalls):
        raise ValueError(f"port {PORT:#x}, which hostcalls use, belongs to another device")
    if number is None:
        number = next(free for free in range(len(port.functions) + 1) if free not in port.functions)
    if not 0 <= number < 1 << 32:
        raise ValueError(f"hostcall number {number} does not fit in 32 bits")
    if number in port.functions:
        raise ValueError(f"hostcall {number} is already registered")
    port.functions[number] = function
    return function


def hostcall(vmm: Vmm, number: int | Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Implement `Vmm.hostcall`."""
    if callable(number):
        return _add(vmm, None, number)
    if number is not None and not isinstance(number, int):
        raise TypeError(f"a hostcall's number is an int, not {type(number).__name__}")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        return _add(vmm, number, function)

    return decorate
