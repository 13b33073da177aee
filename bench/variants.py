"""Who takes part in a case: peers that can, our implementations, and ourselves at another commit; and why others do not."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from automodel_accel.kernels import cross_entropy, gated_linear, layer_norm, rms_norm
from automodel_accel.kernels.contract import Kernel, Spec, choose, unknown_name
from automodel_accel.kernels.facts import Facts
from automodel_accel.kernels.preference import ROW_SIZES
from bench.case import Case
from bench.peers import EAGER, OURS, PEERS, Peer

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {"add_rms_norm": ("rms_norm", "ADD_KERNEL"), "lora": ("linear", "KERNEL")}
LAYERS: dict[str, tuple[str, ...]] = {
    "lora_layer": ("selective",),
    "fp8": ("rowwise",),
}  # many kernels, or a recipe; by the settings that are measured too


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of a table.

    Attributes:
        name: As rows have it.
        peer: Who.
        implementation: Of ours; None for another library.
        named: Whether that implementation must be named, because `auto` takes another.
        root: Where the package that is measured lies.
    """

    name: str
    peer: Peer
    implementation: str | None = None
    named: bool = False
    root: Path = ROOT


def take_part(case: Case, facts: Facts, wanted: Sequence[str]) -> tuple[list[Variant], dict[str, str]]:
    """The variants of a case, the baseline first and ourselves last, and for every peer that has the operation and cannot, why.

    Raises:
        ValueError: there is no peer of a wanted name.
    """
    for name in wanted:
        if name not in PEERS:
            raise ValueError(unknown_name("peer", name, PEERS))
    found, refused = [], {}
    for peer in PEERS.values():
        if case.operation not in peer.operations or (wanted and peer.name not in (*wanted, EAGER, OURS)):
            continue
        objection = peer.objection(case.operation, facts)
        if objection is not None:
            refused[peer.name] = objection
        elif peer.name != OURS:
            found.append(Variant(peer.name, peer))
    return found + ours(case, facts), refused


def ours(case: Case, facts: Facts) -> list[Variant]:
    """What `auto` takes, and whatever else of ours serves the case."""
    if case.operation in LAYERS:
        others = [Variant(f"{OURS}:{name}", PEERS[OURS], name, named=True) for name in LAYERS[case.operation]]
        return [*others, Variant(OURS, PEERS[OURS])]
    kernel = kernel_of(case.operation)
    size = next(int(case.sizes[name]) for name in ROW_SIZES if name in case.sizes)
    choice = choose(kernel, facts, Spec(facts.device, getattr(torch, case.dtype), size, asked(case)))
    assert choice.winner is not None, f"{case.operation}: torch's implementation serves everything"
    auto = Variant(OURS, PEERS[OURS], choice.winner.name)
    others = [Variant(f"{OURS}:{one.name}", PEERS[OURS], one.name, named=True) for one in choice.others]
    return [*others, auto]


def asked(case: Case) -> frozenset[str]:
    """What the case asks of our kernel beyond the plain operation."""
    dtype, options = getattr(torch, case.dtype), case.options
    if case.operation == "rms_norm":
        return rms_norm.features(dtype, dtype, options["offset"], options["order"])
    if case.operation == "layer_norm":
        return layer_norm.features(dtype, dtype, dtype, options["offset"])
    if case.operation == "gated_linear":
        return gated_linear.FEATURES[options["activation"]]
    if case.operation == "cross_entropy":
        return cross_entropy.features(1.0, options["softcap"], 0.0)
    return frozenset()


def kernel_of(operation: str) -> Kernel:
    """Our kernel of that operation."""
    package, name = KERNELS.get(operation, (operation, "KERNEL"))
    found: Kernel = getattr(importlib.import_module(f"automodel_accel.kernels.{package}"), name)
    return found
