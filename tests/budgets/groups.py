"""The groups of figures: how each is measured, and the packages on whose version it depends."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

from tests.budgets import layers, loss_memory, machine_code, traffic
from tests.budgets.ledger import Figures
from tests.ops.aot_cases import CASES

MODELS = "torch", "transformers"


@dataclass(frozen=True, slots=True)
class Group:
    """Figures that are measured together.

    Attributes:
        measure: Measures them.
        depends_on: Packages; under another version of one of them the figures are not comparable.
    """

    measure: Callable[[], Figures]
    depends_on: tuple[str, ...] = ()


def _launches() -> Figures:
    of_ours = layers.ours(**layers.TRITON)
    counts = layers.launches(of_ours)
    named = {
        f"llama / {way} / {name}": float(number) for way, found in counts.items() for name, number in found.items()
    }
    changes = {
        "llama, LoRA": layers.lora(0.0, of_ours),
        f"llama, LoRA with dropout {layers.DROPOUT}": layers.lora(layers.DROPOUT, of_ours),
        "llama, FP8 tensorwise": layers.ours(**layers.FP8, fp8="tensorwise"),
    }
    totals = {"llama": counts} | {name: layers.launches(change) for name, change in changes.items()}
    return named | {f"{name} / all": _total(found) for name, found in totals.items()}


def _total(counts: Mapping[str, Counter[str]]) -> float:
    """But for a seed of dropout, a number that a GPU's generator gives without a launch."""
    return float(sum(found.total() - found["randint"] for found in counts.values()))


def _saved() -> Figures:
    figures = {
        f"{name} / {label}": layers.saved_bytes(name, layers.ours(**settings))
        for name in layers.SHAPES
        for label, settings in layers.SAVING.items()
    }
    for label, settings in layers.SAVING.items():
        change = layers.lora(layers.DROPOUT, layers.ours(**settings))
        figures[f"{LORA} / {label}"] = layers.saved_bytes("Llama-3-8B", change)
        in_8_bits = layers.ours(**settings, fp8="tensorwise")
        figures[f"Llama-3-8B, FP8 / {label}"] = layers.saved_bytes("Llama-3-8B", in_8_bits)
    return figures


def _machine_code(operation: str) -> Callable[[], Figures]:
    return lambda: machine_code.figures(machine_code.compiled(operation))


MACHINE_CODE = "machine code of "
LORA = f"Llama-3-8B, LoRA with dropout {layers.DROPOUT}"
GROUPS = {
    "bytes moved, of the floor": Group(traffic.figures),
    "launches of a layer": Group(_launches, MODELS),
    "saved bytes of a layer, per token": Group(_saved, MODELS),
    "memory of the loss": Group(loss_memory.figures),
    **{MACHINE_CODE + operation: Group(_machine_code(operation), ("triton",)) for operation in CASES},
}


def versions(group: Group) -> dict[str, str]:
    """Versions of the packages that the group's figures depend on."""
    return {package: version(package).partition("+")[0] for package in group.depends_on}
