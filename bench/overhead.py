"""What adapters cost over the frozen base: rows with adapters beside the rows without, of each variant."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from bench.operations import frozen_flops
from bench.peers import OURS

Row = dict[str, Any]
COLUMNS = ("variant", "base", "with adapters", "added", "of the base", "of its products", "target")
# of the time of the adapted linears' own matrix products, on one H100 at 8192 tokens
TARGETS = {"Llama-3-8B": 0.07, "Llama-3.2-1B": 0.13}
TARGET_TOKENS, TARGET_ARCH, TARGET_DTYPE = 8192, "sm_90", "bfloat16"


@dataclass(frozen=True, slots=True)
class Overhead:
    """A variant with adapters, and the same variant without.

    Attributes:
        row: With them.
        base: Without.
    """

    row: Row
    base: Row

    @property
    def added(self) -> float:
        """Seconds."""
        return float(self.row["seconds"]["p50"] - self.base["seconds"]["p50"])

    @property
    def of_base(self) -> float:
        """As a share of the time of all that was measured without adapters."""
        return self.added / float(self.base["seconds"]["p50"])

    @property
    def of_products(self) -> float:
        """As a share of what the frozen linears' products take at the rate of a large product on this device."""
        rate = float(self.row["rates"]["matmul_flops_per_second"])
        return self.added / (frozen_flops(self.row["sizes"]) / rate)

    @property
    def verdict(self) -> str:
        """Hit or missed, of ours where the target is for; "-" elsewhere."""
        row = self.row
        measured_for = (row["arch"], row["dtype"], row["sizes"]["tokens"]) == (TARGET_ARCH, TARGET_DTYPE, TARGET_TOKENS)
        ours = row["variant"].split(":")[0] == OURS
        if not (ours and measured_for and row["case"] == "lora_layer" and row["model"] in TARGETS) or row["cut"]:
            return "-"
        target = TARGETS[row["model"]]
        return f"{target:.0%}: {'hit' if self.of_products <= target else 'missed'}"

    @property
    def cells(self) -> tuple[str, ...]:
        """Of a table, in the order of `COLUMNS`."""
        base, whole = (f"{row['seconds']['p50'] * 1e3:.4g} ms" for row in (self.base, self.row))
        shares = f"{self.of_base:.1%}", f"{self.of_products:.1%}"
        return self.row["variant"], base, whole, f"{self.added * 1e3:.3g} ms", *shares, self.verdict


def overheads(rows: Sequence[Row]) -> Iterator[list[Overhead]]:
    """Those of each case; of two measurements of the same, the later one counts."""
    found: dict[str, dict[str, dict[bool, Row]]] = {}
    for row in rows:
        if "rank" in row.get("sizes", ()):
            sizes = {name: size for name, size in row["sizes"].items() if name != "rank"}
            where = [row[name] for name in ("case", "model", "dtype", "device_name")]
            its = found.setdefault(f"{where} {sizes}", {}).setdefault(row["variant"], {})
            its[bool(row["sizes"]["rank"])] = row
    for variants in found.values():
        if pairs := [Overhead(its[True], its[False]) for its in variants.values() if len(its) == 2]:
            yield pairs


def title(pairs: Sequence[Overhead]) -> str:
    """What is compared."""
    row = pairs[0].row
    cut = f"; cut: {row['cut']}" if row["cut"] else ""
    sizes = row["sizes"]
    return f"{row['case']}: {row['model']}, {sizes['tokens']} tokens, rank {sizes['rank']}, {row['dtype']}: over the frozen base{cut}"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """For the screen."""
    for pairs in overheads(rows):
        shown = Table(title=title(pairs), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        for column in COLUMNS:
            shown.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
        for pair in pairs:
            shown.add_row(*pair.cells)
        yield shown
