"""Pictures of rows, and one HTML page that holds them all: time and memory beside the peers, and how near the device's limits."""

import base64
import html
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.operations import OPERATIONS
from bench.peers import EAGER, OURS, PEERS
from bench.rows import Row, ratio
from bench.screen import best_peer, duration, limit

Case = list[Row]
COLUMNS = ("variant", "version", "time", "p20 - p80", "of eager", "of the limit", "extra peak")
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>automodel_accel: benchmarks</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100%; margin: 1rem 0 } table { border-collapse: collapse } p { color: #555; margin: .3rem 0 }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #eee } td:first-child, th:first-child { text-align: left }
</style></head><body><h1>Operations, forward and backward</h1>
<p>Times are medians. Left of 1 is less than eager torch. The limit is what copies or matrix products were measured to reach on
the same device in the same run.</p>"""

# by variant, whatever the picture, and told apart by those who see no red or no green (after Okabe and Ito)
COLORS = {
    EAGER: "#9a9a9a",
    "compile": "#56b4e9",
    "torch": "#0072b2",
    "liger": "#e69f00",
    "cce": "#f0e442",
    "cce-exact": "#cc79a7",
    "cce-compile": "#b8a000",
    "quack": "#882255",
    "te": "#44aa99",
    "unsloth": "#999933",
    "flash-attn": "#332288",
    OURS: "#d55e00",
}
OTHER = "#f0b090"
MARKERS = "osD^vP*Xhp"
ROW_INCHES, PANEL_INCHES = 0.26, 0.6
FEW = 4  # panels that stand in one column


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the newest rows of every case.

    Args:
        rows: Oldest first.
        folder: Made where it is not there.

    Returns:
        The files: PNGs, and index.html, which needs none of them.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows in bench/results/ to draw; run python -m bench kernels first.")
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[Path, list[Case]]] = []
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130}):
        for (device, dtype), cases in _by_device(newest(rows)).items():
            stem = re.sub(r"[^A-Za-z0-9]+", "_", f"{device}_{dtype}").strip("_")
            drawn = {
                "time": _dots(cases, f"Time, forward and backward, as a share of eager's\n{device}, {dtype}", _time),
                "memory": _dots(cases, f"Extra peak memory, as a share of eager's\n{device}, {dtype}", _memory),
                "roofline": _roofline(cases, f"{device}, {dtype}"),
            }
            for name, figure in drawn.items():
                path = folder / f"{stem}_{name}.png"
                figure.savefig(path, bbox_inches="tight", facecolor="white")
                plt.close(figure)
                pictures.append((path, cases))
    page = folder / "index.html"
    page.write_text(_page(pictures), encoding="utf-8")
    return [*(path for path, _ in pictures), page]


def newest(rows: Sequence[Row]) -> list[Case]:
    """The rows of the newest run of each case, baseline first."""
    found: dict[str, Case] = {}
    for row in rows:
        key = json.dumps([row[name] for name in ("case", "model", "sizes", "dtype", "device_name", "arch")])
        if found.get(key) and found[key][0]["time"] != row["time"]:
            del found[key]
        found.setdefault(key, []).append(row)
    return list(found.values())


def _by_device(cases: Sequence[Case]) -> dict[tuple[str, str], list[Case]]:
    found: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        row = case[0]
        found.setdefault((f"{row['device_name']} {row['arch']}", row["dtype"]), []).append(case)
    return found


def _time(row: Row, first: Row) -> float:
    return ratio(row, first)[0]


def _memory(row: Row, first: Row) -> float:
    return float(row["extra_peak_bytes"] / first["extra_peak_bytes"]) if first["extra_peak_bytes"] else math.nan


def _label(row: Row) -> str:
    sizes = row["sizes"]
    ignored = f", {sizes['ignored']:.0%} ignored" if sizes.get("ignored") else ""
    return f"{row['model']}, {sizes['tokens']}{ignored}"


def _dots(cases: Sequence[Case], title: str, value: Callable[[Row, Row], float]) -> Figure:
    """A panel for each operation, a line for each case, a dot for each variant: left of 1 is better than the baseline."""
    operations: dict[str, list[Case]] = {name: [] for name in OPERATIONS}
    for case in cases:
        operations[case[0]["operation"]].append(case)
    shown = {name: its_cases for name, its_cases in operations.items() if its_cases}
    columns = 1 if len(shown) <= FEW else 2
    lines = [max(map(len, group)) for group in _in_lines(list(shown.values()), columns)]
    heights = [PANEL_INCHES + ROW_INCHES * count for count in lines]
    size = 7.5 * columns, sum(heights) + 1
    figure, axes = plt.subplots(
        len(lines), columns, figsize=size, height_ratios=heights, squeeze=False, layout="constrained", sharex=True
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (operation, its_cases) in zip(axes.flat, shown.items(), strict=False):
        _panel(axis, operation, its_cases, value)
    present = {row["variant"] for case in cases for row in case}
    variants = [*(name for name in COLORS if name in present), *sorted(present - COLORS.keys())]
    handles = [Line2D([], [], marker="o", linestyle="", color=_color(name), label=name) for name in variants]
    figure.legend(handles=handles, loc="outside lower center", ncols=6 * columns, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _in_lines(panels: list[list[Case]], columns: int) -> list[list[list[Case]]]:
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def _panel(axis: Axes, operation: str, cases: Sequence[Case], value: Callable[[Row, Row], float]) -> None:
    for line, case in enumerate(cases):
        values = {row["variant"]: value(row, case[0]) for row in case}
        axis.hlines(line, min(values.values()), max(values.values()), color="#dddddd", zorder=1)
        for name, its_value in values.items():
            axis.scatter(
                its_value, line, s=64 if name == OURS else 36, color=_color(name), zorder=3 if name == OURS else 2
            )
    axis.axvline(1, color="#9a9a9a", linewidth=0.8, zorder=0)
    axis.set_xscale("log", base=2)
    lowest, highest = axis.get_xlim()
    axis.set_xlim(min(lowest, 0.45), max(highest, 2.2))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    axis.tick_params(labelbottom=True)
    axis.set_yticks(range(len(cases)), [_label(case[0]) for case in cases])
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_title(operation, loc="left", fontsize=10, fontweight="bold")
    axis.grid(axis="x", color="#eeeeee", zorder=0)


def _color(variant: str) -> str:
    return COLORS.get(variant, OTHER)


def _roofline(cases: Sequence[Case], title: str) -> Figure:
    """Work done a second over work a byte, ours and the fastest other, under what this device was measured to reach."""
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    rates = cases[-1][0]["rates"]
    copy, matmul = rates["copy_bytes_per_second"], rates["matmul_flops_per_second"]
    intensities = [row["flops"] / row["bytes_floor"] for case in cases for row in case]
    ends = min(*intensities, matmul / copy) / 3, max(*intensities, matmul / copy) * 3
    corner = matmul / copy
    axis.plot([ends[0], corner, ends[1]], [ends[0] * copy, matmul, matmul], color="#333333", linewidth=1.2)
    axis.annotate(f"copies {copy / 1e9:,.0f} GB/s", (corner / 4, matmul / 4), (8, -10), textcoords="offset points")
    axis.annotate(
        f"matrix products {matmul / 1e12:,.3g} TFLOP/s",
        (ends[1], matmul),
        (0, 5),
        textcoords="offset points",
        ha="right",
    )
    operations = list(dict.fromkeys(case[0]["operation"] for case in cases))
    for case in cases:
        marker = MARKERS[operations.index(case[0]["operation"]) % len(MARKERS)]
        best = best_peer(case)
        for row in case:
            if row is best or row["variant"] == OURS:
                color = COLORS[OURS] if row["variant"] == OURS else COLORS["torch"]
                place = row["flops"] / row["bytes_floor"], row["flops"] / row["seconds"]["p50"]
                axis.scatter(
                    *place,
                    marker=marker,
                    s=40,
                    facecolors=color if row["variant"] == OURS else "none",
                    edgecolors=color,
                )
    handles = [
        Line2D([], [], marker=MARKERS[number % len(MARKERS)], linestyle="", color="#555555", label=name)
        for number, name in enumerate(operations)
    ]
    handles += [Line2D([], [], marker="o", linestyle="", color=COLORS[OURS], label="filled: ours")]
    handles += [
        Line2D(
            [], [], marker="o", linestyle="", markerfacecolor="none", color=COLORS["torch"], label="open: best other"
        )
    ]
    axis.legend(handles=handles, loc="lower right", frameon=False, fontsize=8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(*ends)
    axis.set_xlabel("FLOPs a byte that must move")
    axis.set_ylabel("FLOPs a second")
    axis.set_title(f"How near the device's limits\n{title}", fontsize=11)
    axis.grid(color="#eeeeee")
    return figure


def _page(pictures: Sequence[tuple[Path, list[Case]]]) -> str:
    """One page without any other file: the pictures, then every figure."""
    parts = [HEAD]
    for path, _ in pictures:
        picture = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{picture}">')
    cases = {id(case): case for _, its_cases in pictures for case in its_cases}
    for case in cases.values():
        parts.append(_figures(case))
    return "\n".join([*parts, "</body></html>\n"])


def _figures(case: Case) -> str:
    first = case[0]
    sizes = ", ".join(f"{name} {value}" for name, value in first["sizes"].items())
    dirty = " with changes" if first["dirty"] else ""
    cut = f"; cut: {first['cut']}" if first["cut"] else ""
    where = f"{first['device_name']} {first['arch']}, {first['dtype']}, commit {first['commit']}{dirty}, {first['time']}{cut}"
    lines = ["".join(f"<th>{name}</th>" for name in COLUMNS)]
    for row in case:
        cells = (
            row["variant"],
            row["version"] or "-",
            duration(row["seconds"]["p50"]),
            f"{duration(row['seconds']['p20'])} - {duration(row['seconds']['p80'])}",
            f"{ratio(row, first)[0]:.2f}",
            limit(row),
            f"{row['extra_peak_bytes'] / 1e6:.1f} MB",
        )
        lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    about = PEERS[OURS].about
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    heading = html.escape(f"{first['operation']}: {_label(first)} tokens")
    return f"<h3>{heading}</h3><p>{html.escape(f'{sizes}; {where}; ours is {about}')}</p><table>{table}</table>"
