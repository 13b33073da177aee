"""What is run: on which mesh, on how many tokens, and what is kept. The arguments of every formula."""

from dataclasses import dataclass
from types import MappingProxyType

from automodel_accel.config import RECOMPUTE
from automodel_accel.kernels.contract import unknown_name
from automodel_accel.parallel.mesh import Mesh

# states of an optimizer, in elements of the size of the parameter: torch.optim
OPTIMIZERS = MappingProxyType({"adamw": 2, "sgd_momentum": 1, "sgd": 0})
SYNCS = ("last", "every")
SIZES = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
ALL_FUSIONS = frozenset({"norm", "mlp", "experts", "rope", "linear", "loss"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run.

    Attributes:
        mesh: With all sizes.
        rows: Rows of a micro-batch of one data rank.
        length: Tokens of a row.
        accumulate: Micro-batches of an optimizer step.
        sync: Whether ranks sum gradients in the "last" micro-batch (parallel.gradients.accumulate), or in "every" one.
        optimizer: A name of OPTIMIZERS.
        recompute: As in AccelConfig.
        fusions: What apply serves, by name; empty for plain transformers.

    Raises:
        ValueError: a number below 1, a name that there is not, or a length that the mesh does not cut evenly.
    """

    mesh: Mesh
    rows: int = 1
    length: int = 4096
    accumulate: int = 1
    sync: str = "last"
    optimizer: str = "adamw"
    recompute: str | None = None
    fusions: frozenset[str] = ALL_FUSIONS

    def __post_init__(self) -> None:
        for name in ("rows", "length", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(unknown_name("optimizer", self.optimizer, list(OPTIMIZERS)))
        if self.sync not in SYNCS:
            raise ValueError(unknown_name("sync", self.sync, list(SYNCS)))
        if self.recompute is not None and self.recompute not in RECOMPUTE:
            raise ValueError(unknown_name("recompute", self.recompute, [*RECOMPUTE, "None"]))
        if self.length % self.mesh.context:
            raise ValueError(
                f"rows of {self.length} tokens cannot be cut evenly over {self.mesh.context} context ranks; change one of the two."
            )
        object.__setattr__(self, "mesh", self.mesh.sized(self.gpus))

    @property
    def gpus(self) -> int:
        """Ranks of the mesh."""
        mesh = self.mesh
        return mesh.replicate * mesh.shard * mesh.context * mesh.tensor

    @property
    def tokens(self) -> int:
        """Of a micro-batch, that one rank computes."""
        return self.rows * self.length // self.mesh.context

    @property
    def step_tokens(self) -> int:
        """Of an optimizer step, of all ranks."""
        return self.rows * self.length * self.accumulate * self.mesh.replicate * self.mesh.shard

    @property
    def gathers(self) -> bool:
        """Whether units are gathered before they compute, and their gradients summed after."""
        return self.mesh.wrapping in ("fsdp2", "megatron_fsdp")

    @property
    def shards(self) -> int:
        """Ranks over which a parameter is cut, beside tensor ranks."""
        return self.mesh.shard * self.mesh.context if self.gathers else 1
