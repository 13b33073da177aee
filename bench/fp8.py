"""What 8-bit products gain over those of the dtype: for the linears of a layer, and for whole trainings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from bench.peers import EAGER, OURS

Row = dict[str, Any]
COLUMNS = ("variant", "linears of a layer", "than eager", "target")
TRAINING_COLUMNS = ("variant", "tokens/s", "than ours without", "target")
# tokens a second of a whole training over ours in bfloat16, on one H100
TARGETS = {"full": 1.20, "lora": 1.35}
TARGET_MODEL, TARGET_ARCH, TARGET_DTYPE, TARGET_TOKENS = "Llama-3-8B", "sm_90", "bfloat16", 8192
GROUPS = 4  # of linears that share an input, in a layer


@dataclass(frozen=True, slots=True)
class Gain:
    """A variant beside eager, over all linears of one layer.

    Attributes:
        rows: Of the variant.
        eager: Of eager, in that order.
    """

    rows: tuple[Row, ...]
    eager: tuple[Row, ...]

    @property
    def seconds(self) -> float:
        """Of the variant, forward and backward."""
        return _seconds(self.rows)

    @property
    def faster(self) -> float:
        """How many times as fast as eager."""
        return _seconds(self.eager) / self.seconds

    @property
    def verdict(self) -> str:
        """The target is of a whole training, whose other parts gain nothing: linears can miss it, and never hit it."""
        row = self.rows[0]
        whole = _is_measured_for(row) and row["sizes"]["tokens"] == TARGET_TOKENS and not row["cut"]
        if not whole or row["variant"].split(":")[0] != OURS:
            return "-"
        target = TARGETS["full" if row["sizes"]["trains"] else "lora"]
        return f"{target:.2f}x: {'the trainings decide' if self.faster > target else 'missed'}"

    @property
    def cells(self) -> tuple[str, ...]:
        """Of a table, in the order of `COLUMNS`."""
        return self.rows[0]["variant"], f"{self.seconds * 1e3:.4g} ms", f"{self.faster:.2f}x", self.verdict


def gains(rows: Sequence[Row]) -> Iterator[list[Gain]]:
    """Those of each layer all of whose linears were measured; of two measurements of the same, the later one counts."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["case"] == "fp8":
            sizes = row["sizes"]
            layer = *(row[name] for name in ("model", "dtype", "device_name")), sizes["tokens"], sizes["trains"]
            found.setdefault(layer, {}).setdefault(row["variant"], {})[str(sizes)] = row
    for variants in found.values():
        eager = variants.get(EAGER, {})
        whole = 1 if _is_custom(variants) else GROUPS
        pairs = [
            Gain(tuple(its[size] for size in eager), tuple(eager.values()))
            for name, its in variants.items()
            if name != EAGER and len(eager) >= whole and eager.keys() <= its.keys()
        ]
        if pairs:
            yield pairs


def title(pairs: Sequence[Gain]) -> str:
    """What is compared."""
    row = pairs[0].rows[0]
    sizes, cut = row["sizes"], "; cut" if row["cut"] else ""
    weights = "weights that train" if sizes["trains"] else "frozen weights"
    return f"fp8: {row['model']}, {sizes['tokens']} tokens, {weights}, {row['dtype']}{cut}"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """For the screen."""
    for pairs in gains(rows):
        shown = Table(title=title(pairs), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        for column in COLUMNS:
            shown.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
        for pair in pairs:
            shown.add_row(*pair.cells)
        yield shown


def trainings(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Cells of each training with fp8= beside ours of the same job without, in the order of `TRAINING_COLUMNS`."""
    base = {_job(row): row for row in rows if row["variant"] == OURS and "seconds" in row}
    for row in rows:
        without = base.get(_job(row))
        if ":fp8=" in row["variant"] and "seconds" in row and without is not None:
            faster, verdict = row["tokens_per_second"] / without["tokens_per_second"], "-"
            if _is_measured_for(row):
                target = TARGETS[row["method"]]
                verdict = f"{target:.2f}x: {'hit' if faster >= target else 'missed'}"
            yield row["variant"], f"{row['tokens_per_second']:.0f}", f"{faster:.2f}x", verdict


def is_other_arithmetic(variant: str) -> bool:
    """Whether a training differs from vanilla's by more than roundings of its dtype, by design."""
    return any(setting.startswith("fp8=") and setting != "fp8=false" for setting in variant.split(":")[1:])


def _is_custom(variants: dict[str, dict[str, Row]]) -> bool:
    return any(row["model"] == "custom" for its in variants.values() for row in its.values())


def _is_measured_for(row: Row) -> bool:
    return (row["model"], row["arch"], row["dtype"]) == (TARGET_MODEL, TARGET_ARCH, TARGET_DTYPE)


def _job(row: Row) -> tuple[Any, ...]:
    names = "model", "layers", "method", "layout", "rows", "length", "dtype", "device_name"
    return tuple(row[name] for name in names)


def _seconds(rows: Sequence[Row]) -> float:
    return sum(float(row["seconds"]["p50"]) for row in rows)
