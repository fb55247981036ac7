"""The configuration of directories that a guest can mount. docs/share.md describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

from msgspec import Meta

from pyvmm.config_parts import FilePath, Part
from pyvmm.exceptions import ConfigError

_Number: TypeAlias = Annotated[int, Meta(ge=0, le=2**32 - 1)]

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Source(Part, frozen=True):
    path: FilePath
    tag: str


class Share(_Source, frozen=True, kw_only=True):
    """A directory of the host for the guest: `Share(path, tag)`.

    The guest mounts it by ``mount -t 9p -o trans=virtio,version=9p2000.L TAG /mnt``. All access is
    that of pyvmm's process, whichever user of the guest it is for.

    Attributes:
        path: the directory.
        tag: what the guest mounts it by: 1 to 255 bytes without blanks.
        read_only: the guest cannot change anything in it.
        owner: the user and group that the guest sees as the owner of every file, such as (0, 0).
            None means the host's numbers.
    """

    read_only: bool = False
    owner: tuple[_Number, _Number] | None = None


def parsed(texts: Iterable[str]) -> tuple[Share, ...]:
    """The shares of options of the command line: ``HOST:TAG[:ro][:owner=UID.GID]``.

    Raises:
        ConfigError: a text has no tag, or another option.
    """
    return tuple(_parsed(text) for text in texts)


def _parsed(text: str) -> Share:
    path, *parts = text.split(":")
    read_only, owner = False, None
    while parts and (parts[-1] == "ro" or parts[-1].startswith("owner=")):
        last = parts.pop()
        if last == "ro":
            read_only = True
        else:
            owner = _owner(text, last.removeprefix("owner="))
    if not parts or not path or not parts[-1]:
        raise ConfigError(f"share: '{text}' is not HOST:TAG[:ro][:owner=UID.GID]", at="share")
    *rest, tag = parts
    return Share(":".join([path, *rest]), tag, read_only=read_only, owner=owner)


def _owner(text: str, numbers: str) -> tuple[int, int]:
    uid, _, gid = numbers.partition(".")
    if not (uid.isdecimal() and gid.isdecimal()):
        raise ConfigError(f"share: '{text}' has no owner=UID.GID in numbers", at="share")
    return int(uid), int(gid)
