"""Which implementation is fastest on which machine: a table of measured seconds that the bench writes and the package ships.

A row holds for one operation, GPU architecture, dtype, class of sizes and set of features, and says how long each
implementation took there, forward and backward. It decides between implementations that it measured, on that architecture
only; where it says nothing, the order in which the operation lists them stands.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from automodel_accel.kernels.facts import Facts

TABLE = Path(__file__).with_name("preference.json")
# which of a benchmark's sizes is the length of the row that the kernel works on
ROW_SIZES = ("size", "vocab", "intermediate", "head_dim", "hidden")
Key = tuple[str, str, str, int, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """One row of the table.

    Attributes:
        operation: Name of the kernel, such as "rms_norm".
        arch: Such as "sm_90".
        dtype: Of the activations, such as "bfloat16".
        size_class: Row lengths above half of it, up to it; a power of 2.
        features: Beyond the plain operation, sorted.
        device_name: What the vendor calls the device that was measured.
        seconds: Implementation -> seconds of a forward and backward, the sum of the medians over the sizes that all ran.
        commit: The newest of the measurements was taken there.
    """

    operation: str
    arch: str
    dtype: str
    size_class: int
    features: tuple[str, ...]
    device_name: str
    seconds: Mapping[str, float]
    commit: str

    @property
    def key(self) -> Key:
        """What a row is looked up by; unique in a table."""
        return self.operation, self.arch, self.dtype, self.size_class, self.features


def size_class(size: int) -> int:
    """The power of 2 that is `size` or the next one above it."""
    return 1 << max(size - 1, 0).bit_length()


def order(
    operation: str, facts: Facts, dtype: torch.dtype, size: int, features: frozenset[str], able: Sequence[str]
) -> tuple[list[str], str]:
    """Put the implementations that can serve a call into the order of the table.

    Args:
        operation: Name of the kernel.
        facts: The machine.
        dtype: Of the activations.
        size: Row length.
        features: What the call asks beyond the plain operation; where just these were not measured, the plain operation's row decides.
        able: The implementations that can serve the call, in the operation's order; at least one.

    Returns:
        The same names, best first, and the reason for the first one.
    """
    if len(able) == 1:
        return list(able), f"the only one that serves {_name(dtype)} here"
    for asked in dict.fromkeys((tuple(sorted(features)), ())):
        row = table(TABLE).get((operation, facts.arch, _name(dtype), size_class(size), asked))
        if row is not None and able[0] in row.seconds:  # else the row does not know what it would displace
            return _by_seconds(row, able)
    return list(able), f"first in order, as this was not measured on {facts.arch}"


def _by_seconds(row: Preference, able: Sequence[str]) -> tuple[list[str], str]:
    measured = sorted((name for name in able if name in row.seconds), key=row.seconds.__getitem__)
    names = [*measured, *(name for name in able if name not in row.seconds)]
    if len(measured) == 1:
        return names, f"the only one measured on {row.device_name}"
    first, second = measured[:2]
    ratio = row.seconds[first] / row.seconds[second]
    return names, f"fastest measured on {row.device_name}: {ratio:.2f} x the time of {second}"


@functools.cache
def table(path: Path) -> Mapping[Key, Preference]:
    """The table in a file, by key.

    Raises:
        ValueError: two rows have the same key.
    """
    rows = [_read(row) for row in json.loads(path.read_text())]
    found = {row.key: row for row in rows}
    if len(found) != len(rows):
        raise ValueError(f"{path.name} has two rows for one key; write it again from the rows of the bench.")
    return MappingProxyType(found)


def _read(row: Mapping[str, Any]) -> Preference:
    return Preference(**{**row, "features": tuple(row["features"]), "seconds": MappingProxyType(row["seconds"])})


def write_preferences(rows: Iterable[Mapping[str, Any]], path: Path = TABLE) -> list[Preference]:
    """Write the table from the rows of the bench; rows of other keys that the file has stay.

    Args:
        rows: One a variant: `case`, `variant`, `sizes`, `dtype`, `arch`, `device_name`, `seconds` (with `p50`), `commit`, `time`. A
            row may say which `operation` its case is of, which `implementation` its variant is (None for another library's own),
            and which `features` it asked for. Of two measurements of the same, the newest counts.
        path: The table.

    Returns:
        The preferences that came from these rows.

    Raises:
        ValueError: a row has no size that is a row length, or lacks a key.
    """
    newest: dict[Key, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: str(row["time"])):
        implementation = row.get("implementation", row["variant"])
        if implementation is not None:
            sizes = json.dumps(row["sizes"], sort_keys=True)
            newest.setdefault(_key(row), {}).setdefault(sizes, {})[implementation] = row
    found = [_preference(key, list(by_sizes.values())) for key, by_sizes in newest.items()]
    old = table(path) if path.exists() else {}
    merged = {**old, **{row.key: row for row in found}}
    path.write_text(json.dumps([_plain(merged[key]) for key in sorted(merged)], indent=1) + "\n")
    table.cache_clear()
    return found


def _preference(key: Key, by_sizes: list[dict[str, Mapping[str, Any]]]) -> Preference:
    in_all = frozenset.intersection(*(frozenset(rows) for rows in by_sizes))
    seconds = {name: sum(rows[name]["seconds"]["p50"] for rows in by_sizes) for name in sorted(in_all)}
    last = max((row for rows in by_sizes for row in rows.values()), key=lambda row: str(row["time"]))
    operation, arch, dtype, size, features = key
    return Preference(
        operation=operation,
        arch=arch,
        dtype=dtype,
        size_class=size,
        features=features,
        device_name=last["device_name"],
        seconds=MappingProxyType(seconds),
        commit=f"{last['commit']}{' with changes' if last.get('dirty') else ''}",
    )


def _key(row: Mapping[str, Any]) -> Key:
    sizes = {**row["sizes"], **({"size": row["size"]} if "size" in row else {})}
    length = next((int(sizes[name]) for name in ROW_SIZES if name in sizes), None)
    if length is None:
        raise ValueError(f"{row['case']}: none of its sizes {sorted(sizes)} is the length of a row: {ROW_SIZES}.")
    features = tuple(sorted(row.get("features", ())))
    return row.get("operation", row["case"]), row["arch"], row["dtype"], size_class(length), features


def _plain(row: Preference) -> dict[str, Any]:
    plain = {name: getattr(row, name) for name in Preference.__dataclass_fields__}
    return {**plain, "features": list(row.features), "seconds": dict(row.seconds)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
