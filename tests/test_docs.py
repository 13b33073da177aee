"""The Python examples in the README and in docs/ run, each in a fresh namespace, without a network."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from bench import tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")
EXAMPLES = [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def line(page: Path, match: re.Match[str]) -> str:
    return f"{page.relative_to(ROOT)}:{match.string.count(chr(10), 0, match.start()) + 1}"


@pytest.mark.parametrize(("page", "match"), EXAMPLES, ids=[line(*example) for example in EXAMPLES])
def test_example_runs(page: Path, match: re.Match[str]) -> None:
    above = "\n" * match.string.count("\n", 0, match.start(1))  # so that a traceback names the line of the page
    exec(compile(above + match.group(1), str(page), "exec"), {"__name__": "__main__"})  # noqa: S102 - the test's very purpose


def test_the_readme_has_examples() -> None:
    assert [page for page, _ in EXAMPLES].count(ROOT / "README.md") >= 2


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [
        target for target in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / target).exists()
    ]
    assert not broken


def test_tables_in_the_readme_are_made_from_committed_rows() -> None:
    console = Console(record=True, file=io.StringIO())
    assert tables.main(ROOT / "README.md", True, console) == 0, console.export_text()
