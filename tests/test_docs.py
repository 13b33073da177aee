"""The Python examples in the README and in docs/ run, each in a fresh namespace, without a network."""

import json
import re
from pathlib import Path

import pytest

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


def test_figures_in_the_readme_are_those_of_committed_rows() -> None:
    text = (ROOT / "bench" / "results" / "linear_cross_entropy.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    lines = {
        f"| {row['variant']} | {row['seconds']['p50']:.1f} | {row['extra_peak_bytes'] / 1e6:.0f} MB |": row["time"]
        for row in rows
        if row["sizes"] == {"tokens": 4096, "hidden": 512, "vocab": 128256, "ignored": 0.0}
    }
    told = re.findall(r"^\| (?:vanilla|ours) \|.*\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(told) == 2
    assert len({lines.get(line) for line in told}) == 1, "both from one run"
    assert set(told) <= set(lines)
