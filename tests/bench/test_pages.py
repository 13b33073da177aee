"""What is made from rows: tables of a page, pictures, the screen, and the table of preferences."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench import __main__ as command_line
from bench import rows as rows_module
from bench import screen, tables
from bench.cases import custom
from bench.operations import LINEAR_CROSS_ENTROPY
from bench.peers import OURS
from bench.suite import Outcome
from tests.bench import made

PAGE = """# Title

<!-- bench: operation=rms_norm tokens=1000 variants=eager,ours -->
anything
<!-- bench end -->

the end
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page with a marker, beside rows of the operation that it asks for."""
    monkeypatch.setattr(rows_module, "RESULTS", tmp_path / "results")
    rows_module.append(made.rows(eager=(0.002, 0.004), ours=(0.001, 0.003)))
    path = tmp_path / "page.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


def test_a_page_is_written_and_then_checks(page: Path) -> None:
    assert command_line.main(["tables", str(page), "--check"]) == 1
    assert page.read_text() == PAGE, "a check writes nothing"
    assert command_line.main(["tables", str(page)]) == 0
    assert command_line.main(["tables", str(page), "--check"]) == 0
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- bench: operation=rms_norm")
    assert text.endswith("<!-- bench end -->\n\nthe end\n")
    (row,) = (line for line in text.splitlines() if line.startswith("| ours"))
    assert "| 2 ms | 0.67 |" in row
    assert "`bench/results/rms_norm.jsonl`" in text
    assert str(made.rows()[0]["commit"]) in text


def test_a_newer_run_takes_the_place_of_an_older_one(page: Path) -> None:
    command_line.main(["tables", str(page)])
    rows_module.append(made.rows(eager=(0.5,), time="2026-02-01"))
    assert command_line.main(["tables", str(page), "--check"]) == 1
    command_line.main(["tables", str(page)])
    assert "500 ms" in page.read_text()
    assert "2026-01-01" not in page.read_text()


def test_a_changed_figure_is_found(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command_line.main(["tables", str(page)])
    page.write_text(page.read_text().replace("0.67", "0.07"))
    assert command_line.main(["tables", str(page), "--check"]) == 1
    assert "does not say what the rows say" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [("operation=rope", "no row in bench/results/"), ("operation=rms_norm variants=liger", "there are no rows")],
)
def test_a_marker_that_asks_for_what_is_not_there(asked: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tables.table(asked, made.rows())


def test_a_page_without_markers_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("# Title\n")
    assert command_line.main(["tables", str(path), "--check"]) == 2


def test_the_screen_fits_80_columns() -> None:
    rows = made.rows()
    rows[0]["variant"] = "cce-compile"
    console = Console(width=80, record=True)
    console.print(screen.table(Outcome(made.CASE, rows)))
    text = console.export_text()
    assert "\u2026" not in text, "nothing is cut off"
    assert "0.50" in text
    assert "tokens 1000, hidden 100" in " ".join(text.split())
    assert f"cce-compile {rows[0]['version']}" in " ".join(text.split())


def test_ratio_is_of_medians_with_the_span_of_repetitions() -> None:
    eager, ours = made.rows(eager=(2.0, 4.0, 4.0), ours=(1.0, 1.0, 3.0))
    assert rows_module.ratio(ours, eager) == (0.25, 0.25, 0.75)
    other = {**eager, "variant": "ours@abc"}
    console = Console(width=100, record=True)
    console.print(screen.against([Outcome(made.CASE, [eager, other, ours])], "ours@abc"))
    assert "0.250 - 0.750" in console.export_text()


def test_pictures_and_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(rows_module, "RESULTS", tmp_path / "results")
    head = replace(custom(LINEAR_CROSS_ENTROPY, LINEAR_CROSS_ENTROPY.custom, "float32"), model="<Llama>")
    rows_module.append([*made.rows(), *made.rows(head)])
    assert command_line.main(["plot", "--to", str(tmp_path / "out")]) == 0
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert [name.rsplit("_", 1)[1] for name in pictures] == ["memory.png", "roofline.png", "time.png"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "linear_cross_entropy: &lt;Llama&gt;, 4096 tokens" in page
    assert "http" not in page, "it needs nothing from elsewhere"


def test_no_rows_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(rows_module, "RESULTS", tmp_path)
    assert command_line.main(["plot", "--to", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_preferences_come_from_rows_of_a_gpu(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[rows_module.Row] = []

    def keep(found: list[rows_module.Row]) -> list[rows_module.Row]:
        written.extend(found)
        return written

    assert command_line.main(["preferences"]) == 2, "a processor's rows say nothing about a GPU"
    rows = [{**row, "device": "cuda", "arch": "sm_90"} for row in made.rows()]
    rows_module.append([*rows, {**rows[1], "variant": f"{OURS}@abc"}])
    monkeypatch.setattr(command_line, "write_preferences", keep)
    assert command_line.main(["preferences"]) == 0
    assert [(row["variant"], row["implementation"]) for row in written] == [("eager", None), (OURS, "torch")]
