"""What the rows in a folder say: `python -m bench.e2e.summary FOLDER` reads its *.jsonl and writes summary.md and e2e.png."""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from automodel_accel.kernels.facts import this_machine
from bench import fp8, overhead
from bench.e2e.variants import OURS, VANILLA

Row = dict[str, Any]
KERNELS = ("operation", "sizes", "ours", "of copy", "of matmul", "extra MB", "best peer", "faster", "than eager")
TRAINING = (
    "variant",
    "tokens/s",
    "speed",
    "MFU",
    "peak GB",
    "memory",
    "loss off",
    "allowed",
    "gradient off",
    "allowed",
)


def read(folder: Path) -> list[Row]:
    """The rows of every file; a line that was cut off when a run was ended is left out."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                found.append(json.loads(line))
    return found


def summary(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    if not rows:
        return "No rows.\n"
    training = [row for row in rows if row["case"] == "e2e"]
    kernels = [row for row in rows if row["case"] != "e2e"]
    return (
        "\n".join([*_where(rows), *_kernels(kernels), *_overheads(kernels), *_gains(kernels), *_trainings(training)])
        + "\n"
    )


def _where(rows: Sequence[Row]) -> Iterator[str]:
    devices = dict.fromkeys(f"{row['device_name']} {row['arch']}, commit {row['commit']}" for row in rows)
    versions = {name: number for row in rows for name, number in row["versions"].items()}
    yield f"{'; '.join(devices)}: {', '.join(f'{name} {number}' for name, number in versions.items())}"
    yield ""


def _kernels(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield from _head(KERNELS)
    for _, group in itertools.groupby(
        rows, key=lambda row: (row["case"], row.get("model"), row["sizes"], row["dtype"])
    ):
        found = {row["variant"]: row for row in group}
        if OURS not in found:
            continue
        ours = found[OURS]
        seconds = ours["seconds"]["p50"]
        peers = {name: row["seconds"]["p50"] for name, row in found.items() if OURS not in name and name != "eager"}
        best = min(peers, key=lambda name: peers[name]) if peers else None
        sizes = " ".join(f"{name} {value}" for name, value in ours["sizes"].items())
        yield _line(
            ours["case"],
            f"{ours.get('model') or ''} {sizes} {ours['dtype']}".strip(),
            f"{seconds * 1e3:.4g} ms",
            f"{ours['share_of_copy']:.0%}",
            f"{ours['share_of_matmul']:.0%}",
            f"{ours['extra_peak_bytes'] / 1e6:.0f}",
            f"{best} {peers[best] * 1e3:.4g} ms" if best else "-",
            f"{peers[best] / seconds:.2f}x" if best else "-",
            f"{found['eager']['seconds']['p50'] / seconds:.2f}x" if "eager" in found else "-",
        )
    yield ""


def _overheads(rows: Sequence[Row]) -> Iterator[str]:
    for pairs in overhead.overheads(rows):
        yield f"**{overhead.title(pairs)}**"
        yield ""
        yield from _head(overhead.COLUMNS)
        for pair in pairs:
            yield _line(*pair.cells)
        yield ""


def _gains(rows: Sequence[Row]) -> Iterator[str]:
    for pairs in fp8.gains(rows):
        yield f"**{fp8.title(pairs)}**"
        yield ""
        yield from _head(fp8.COLUMNS)
        for pair in pairs:
            yield _line(*pair.cells)
        yield ""


def _trainings(rows: Sequence[Row]) -> Iterator[str]:
    for title, group in itertools.groupby(rows, key=_title):
        found = list(group)
        base = next((row for row in found if row["variant"] == VANILLA and "seconds" in row), None)
        yield f"**{title}**: {found[0]['tokens']} tokens timed, {found[0]['data']['source']}"
        yield ""
        yield from _head(TRAINING)
        for row in found:
            if "seconds" in row:
                yield _line(row["variant"], *_training(row, base))
        yield ""
        if gains := list(fp8.trainings(found)):
            yield from _head(fp8.TRAINING_COLUMNS)
            yield from (_line(*cells) for cells in gains)
            yield ""
        for row in found:
            if "skipped" in row:
                yield f"- {row['variant']}: {row['skipped']}"
        yield ""


def _title(row: Row) -> str:
    kind = f"{row['model']} ({row['layers']} layers), {row['method']}, {row['layout']} rows"
    return f"{kind}, {row['rows']} x {row['length']}, {row['dtype']}"


def _training(row: Row, base: Row | None) -> Iterator[str]:
    yield f"{row['tokens_per_second']:.0f}"
    yield f"{row['tokens_per_second'] / base['tokens_per_second']:.2f}x" if base else "-"
    yield f"{row['mfu']:.1%}"
    yield f"{row['peak_memory_bytes'] / 1e9:.2f}"
    yield f"{row['peak_memory_bytes'] / base['peak_memory_bytes']:.2f}x" if base else "-"
    for off, allowed in (("loss_difference", "loss_allowed"), ("gradient_distance_worst", "gradient_allowed")):
        yield f"{row[off]:.1e}" if off in row else "-"
        yield f"{row[allowed]:.1e}" if allowed in row else "-"


def _head(columns: Sequence[str]) -> Iterator[str]:
    yield _line(*columns)
    yield _line("---", *["--:"] * (len(columns) - 1))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(folder: Path) -> None:
    """Write and print the table, and draw the trainings where matplotlib is installed."""
    rows = read(folder)
    text = summary(rows)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    if this_machine().has("matplotlib"):
        from bench.e2e.plot import draw

        draw([row for row in rows if row["case"] == "e2e"], folder / "e2e.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
