"""The documentation site: every public name is in it, and the pages that are generated are there.

Covers scripts/site/pages.py and scripts/site/glossary.py.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

import pytest
import pyvmm
from conftest import ROOT, script

if TYPE_CHECKING:
    from types import ModuleType

API = (ROOT / "docs" / "api.md").read_text()
SUBMODULES = (
    "config",
    "exits",
    "devices",
    "hostcalls",
    "events",
    "stats",
    "exceptions",
    "boots",
    "cpu_template",
    "virtio_parts",
    "disks",
    "shares",
    "user_net",
    "vsock_parts",
    "nets",
)


def hook() -> ModuleType:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    return script(ROOT / "scripts" / "site" / "pages.py", "pages")


def listed() -> set[str]:
    """The names that docs/api.md lists, by themselves or with their module."""
    names = set(re.findall(r"^::: pyvmm\.(\w+)", API, re.MULTILINE))
    for module in names & set(SUBMODULES):
        found = vars(importlib.import_module(f"pyvmm.{module}"))
        names |= {name for name, value in found.items() if getattr(value, "__module__", "") == f"pyvmm.{module}"}
    return names


def test_api_page_lists_every_public_name() -> None:
    assert set(pyvmm.__all__) - listed() == set()


def test_every_example_has_a_page_and_a_summary() -> None:
    pages = hook()
    files = (path for path in pages.EXAMPLES.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert pages.sources() == sorted(files)
    for path in pages.sources():
        assert pages.summary(path), path
        assert pages.code(path) in pages.example(path)
        assert path.suffix == ".ipynb" or pages.code(path) == path.read_text()
        assert f"]({path.relative_to(ROOT / 'examples')}.md)" in pages.contents()


def test_links_that_leave_the_folder_become_pages() -> None:
    pages = hook()

    class Page:
        class file:  # noqa: N801
            src_uri = "index.md"

    text = "[a](docs/devices.md#x) [b](examples) [c](examples/guest) [d](examples/clock.py)"
    page: Any = Page
    assert pages.on_page_markdown(text, page=page) == (
        "[a](devices.md#x) [b](examples/index.md) [c](examples/index.md) [d](examples/clock.py.md)"
    )
    Page.file.src_uri = "devices.md"
    assert pages.on_page_markdown("[a](../examples/clock.py) [b](../README.md#how-fast)", page=page) == (
        "[a](examples/clock.py.md) [b](index.md#how-fast)"
    )


def test_first_use_of_a_word_is_a_link() -> None:
    glossary = script(ROOT / "scripts" / "site" / "glossary.py", "glossary")
    text = "# A kick\n\n| kick |\n\n```\nkick\n```\nA `kick`, [a kick](x.md), kicks, a kick.\n"
    assert glossary.with_links(text) == text.replace(", kicks,", ", [kicks](glossary.md#kick),")


def test_every_linked_word_is_in_the_glossary() -> None:
    glossary = script(ROOT / "scripts" / "site" / "glossary.py", "glossary")
    page = glossary.with_anchors((ROOT / "docs" / "glossary.md").read_text())
    anchors = set(re.findall(r'<span id="([\w-]+)">', page))
    assert {glossary.slug(term) for term in glossary.TERMS} <= anchors
