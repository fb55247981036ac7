"""The pages of the site that are no files of docs/: README as the first page, and one page for each example.

A hook of MkDocs. It also points links that leave docs/ at these pages.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
LANGUAGES = {".py": "python", ".ipynb": "python", ".c": "c", ".h": "c", ".s": "gas", ".toml": "toml"}


def sources() -> list[Path]:
    """The programs of examples/, guests included."""
    return sorted(path for path in EXAMPLES.rglob("*") if path.suffix in LANGUAGES)


def page_of(path: Path) -> str:
    """The page of an example: `examples/guest/parser.c` has `examples/guest/parser.c.md`."""
    return f"{path.relative_to(ROOT).as_posix()}.md"


def summary(path: Path) -> str:
    """What an example says of itself: the docstring of a program, the first comment of anything else."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        return "".join(json.loads(text)["cells"][0]["source"])
    if path.suffix == ".py":
        return " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
    comment = re.match(r"\s*/\*(.*?)\*/|((?:\s*(?://|#) [^\n]*\n)+)", text, re.DOTALL)
    words = re.sub(r"^\s*(\*|//|#)", "", comment[0].strip("/* \n"), flags=re.MULTILINE) if comment else ""
    return " ".join(words.split())


def code(path: Path) -> str:
    """The text of an example; of a notebook, its cells."""
    text = path.read_text()
    if path.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n\n".join("".join(cell["source"]) for cell in cells) + "\n"


def example(path: Path) -> str:
    """The page of one example."""
    return f"# {path.name}\n\n```{LANGUAGES[path.suffix]}\n{code(path)}```\n"


def contents() -> str:
    """The page that lists the examples."""
    rows = [
        f"| [{path.relative_to(EXAMPLES)}]({path.relative_to(EXAMPLES)}.md) | {summary(path)} |" for path in sources()
    ]
    return "\n".join(["# Examples", "", "| | |", "| --- | --- |", *rows, ""])


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"index.md": (ROOT / "README.md").read_text(), "examples/index.md": contents()}
    pages |= {page_of(path): example(path) for path in sources()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Point the links of README and of docs/ at pages of the site."""
    if page.file.src_uri == "index.md":
        markdown = markdown.replace("](docs/", "](").replace("](LICENSE", "](https://opensource.org/licenses/")
    markdown = markdown.replace("](../README.md", "](index.md")
    return re.sub(r"\]\((?:\.\./)?examples(?:/([\w./-]*))?\)", _to_example, fence_free(markdown))


def _to_example(link: re.Match[str]) -> str:
    name = link[1] or ""
    return f"](examples/{name}.md)" if Path(name).suffix in LANGUAGES else "](examples/index.md)"


def fence_free(markdown: str) -> str:
    """Take the names off fences that only the tests read."""
    return markdown.replace("```python no-run\n", "```python\n")
