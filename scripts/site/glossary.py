"""Links the first use of a word of the glossary on each page to its line there.

A hook of MkDocs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

# Words that mean something else elsewhere ("machine", "line", "pause") are not linked.
TERMS = (
    "exit handler",
    "exit hook",
    "fix-up",
    "guest-physical address",
    "hostcall",
    "ioeventfd",
    "irqfd",
    "kick",
    "run page",
    "memory slot",
    "subscriber",
    "unanswered access",
    "vCPU",
)
# Programs, headings, tables, code, links and pictures stay as they are.
SKIPPED = r"^```.*?^```$|^#.*?$|^\|.*?$|`[^`]*`|!?\[[^\]]*\]\([^)]*\)"
FOUND = re.compile(rf"{SKIPPED}|(?<![\w-])(?P<term>{'|'.join(TERMS)})(?:s|es)?(?![\w-])", re.MULTILINE | re.DOTALL)


def slug(term: str) -> str:
    """The anchor of a term."""
    return term.removeprefix("memory ").lower().replace(" ", "-")


def with_links(markdown: str) -> str:
    """Link the first use of each term in a paragraph or a list."""
    linked = set()

    def link(found: re.Match[str]) -> str:
        term = found["term"]
        if term is None or term in linked:
            return found[0]
        linked.add(term)
        return f"[{found[0]}](glossary.md#{slug(term)})"

    return FOUND.sub(link, markdown)


def with_anchors(markdown: str) -> str:
    """Give each line of the glossary an anchor."""
    return re.sub(
        r"^\| (\w[^|]*) \|", lambda row: f'| <span id="{slug(row[1])}">{row[1]}</span> |', markdown, flags=re.MULTILINE
    )


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Link the words of a page, or mark those of the glossary."""
    name = page.file.src_uri
    if name == "glossary.md":
        return with_anchors(markdown)
    return markdown if name == "api.md" or name.startswith("examples/") else with_links(markdown)
