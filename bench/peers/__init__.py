"""Who is measured: ourselves, torch, and every public library of kernels that has the operation.

A peer's module has `forwards(variant)`: operation -> a function of the case's inputs that returns the operation's outputs. It is
imported in the process that measures it and nowhere else, because some of these libraries change torch or transformers.
"""

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

from automodel_accel.kernels.facts import Facts
from bench.case import Forward

EVERYWHERE = frozenset({"cpu", "cuda"})
ON_GPU = frozenset({"cuda"})
NORMS = frozenset({"rms_norm", "add_rms_norm", "layer_norm"})
ELEMENTWISE = frozenset({"gated_linear", "activation", "rope"})
LOSSES = frozenset({"linear_cross_entropy", "cross_entropy"})
ADAPTED = frozenset({"lora", "lora_layer"})
ALL = NORMS | ELEMENTWISE | LOSSES | ADAPTED | {"attention", "fp8"}
OURS, EAGER = "ours", "eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One variant of an operation.

    Attributes:
        name: As rows and tables have it.
        about: What it is.
        module: Of this folder.
        package: Distribution that it needs, or several joined by "+", whose version is printed; None for ourselves.
        operations: Names of those it has.
        devices: Where it runs.
        compiles: Whether its first call compiles for the sizes at hand, so that it is not measured.
    """

    name: str
    about: str
    module: str
    package: str | None
    operations: frozenset[str]
    devices: frozenset[str] = ON_GPU
    compiles: bool = False

    def version(self) -> str | None:
        """The version of its package; None where it is not installed. Ourselves have a commit instead."""
        try:
            return "+".join(map(importlib.metadata.version, (self.package or "automodel-accel").split("+")))
        except importlib.metadata.PackageNotFoundError:
            return None

    def objection(self, operation: str, facts: Facts) -> str | None:
        """Why it is not measured for an operation on a machine, or None."""
        if operation not in self.operations:
            return f"has no {operation}"
        if facts.device not in self.devices:
            return f"runs on a GPU; this is a {facts.device}"
        if self.package is not None and self.version() is None:
            return f"the package {self.package} is not installed"
        return None

    def forward(self, operation: str) -> Forward:
        """The operation as this peer has it; imports the peer."""
        found: Forward = importlib.import_module(f"bench.peers.{self.module}").forwards(self.name)[operation]
        return found


_ALL = (
    Peer(
        name=EAGER,
        about="torch operation by operation, as transformers has it",
        module="eager",
        package="torch",
        operations=ALL,
        devices=EVERYWHERE,
    ),
    Peer(
        name="compile",
        about="torch.compile of the same",
        module="eager",
        package="torch",
        operations=ALL,
        devices=EVERYWHERE,
        compiles=True,
    ),
    Peer(
        name="torch",
        about="torch.nn.functional's own operation, chunked where it has chunks",
        module="functional",
        package="torch",
        operations=frozenset({"rms_norm", "linear_cross_entropy"}),
        devices=EVERYWHERE,
    ),
    Peer(
        name="liger",
        about="Liger-Kernel",
        module="liger",
        package="liger-kernel",
        operations=NORMS | ELEMENTWISE | LOSSES,
    ),
    Peer(
        name="cce",
        about="cut-cross-entropy as it comes: small gradients are dropped",
        module="cut_cross_entropy",
        package="cut-cross-entropy",
        operations=frozenset({"linear_cross_entropy"}),
    ),
    Peer(
        name="cce-exact",
        about="cut-cross-entropy with every gradient",
        module="cut_cross_entropy",
        package="cut-cross-entropy",
        operations=frozenset({"linear_cross_entropy"}),
    ),
    Peer(
        name="cce-compile",
        about="cut-cross-entropy's torch.compile path",
        module="cut_cross_entropy",
        package="cut-cross-entropy",
        operations=frozenset({"linear_cross_entropy"}),
        devices=EVERYWHERE,
        compiles=True,
    ),
    Peer(
        name="quack",
        about="quack-kernels, in CuTe",
        module="quack",
        package="quack-kernels",
        operations=frozenset({"rms_norm", "add_rms_norm", "rope"}) | LOSSES,
        compiles=True,
    ),
    Peer(
        name="te",
        about="Transformer Engine",
        module="transformer_engine",
        package="transformer-engine",
        operations=LOSSES | {"rms_norm", "layer_norm", "gated_linear", "activation", "rope", "attention", "fp8"},
    ),
    Peer(
        name="peft",
        about="PEFT's layers",
        module="peft",
        package="peft",
        operations=ADAPTED,
        devices=EVERYWHERE,
    ),
    Peer(
        name="peft+liger",
        about="PEFT's layers in a model that Liger-Kernel has patched, which has no kernel of LoRA",
        module="peft",
        package="peft+liger-kernel",
        operations=frozenset({"lora_layer"}),
    ),
    Peer(
        name="unsloth",
        about="Unsloth's kernels",
        module="unsloth",
        package="unsloth",
        operations=frozenset({"rms_norm", "layer_norm", "gated_linear", "rope", "cross_entropy"}) | ADAPTED,
    ),
    Peer(
        name="torchao",
        about="torchao's float8 linears, one scale a tensor",
        module="torchao",
        package="torchao",
        operations=frozenset({"fp8"}),
        devices=EVERYWHERE,
    ),
    Peer(
        name="torchao-compile",
        about="torch.compile of the same",
        module="torchao",
        package="torchao",
        operations=frozenset({"fp8"}),
        devices=EVERYWHERE,
        compiles=True,
    ),
    Peer(
        name="flash-attn",
        about="FlashAttention",
        module="flash",
        package="flash-attn",
        operations=frozenset({"attention"}),
    ),
    Peer(name=OURS, about="automodel_accel", module="ours", package=None, operations=ALL, devices=EVERYWHERE),
)
PEERS: Mapping[str, Peer] = {peer.name: peer for peer in _ALL}
