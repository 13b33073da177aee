"""A model as numbers: its weights, with how they are cut and gathered, and the widths of its layers."""

import math
from dataclasses import dataclass

ROOT = "root"


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter.

    Attributes:
        name: Dotted.
        shape: Of the whole.
        itemsize: Bytes of an element at rest.
        trains: Whether it has a gradient.
        unit: Path of the module that FSDP2 gathers it with; "" for the root.
        kind: Of that unit: "layer", "embedding", "head", "root".
        cut: The dimension that tensor ranks cut; None where each holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trains: bool
    unit: str = ""
    kind: str = ROOT
    cut: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Widths of one layer, in elements a token.

    Attributes:
        query: Of the queries of all heads; 0 where the layer has no attention that is known.
        key: Of the keys of all heads.
        value: Of the values of all heads.
        output: Of what attention gives: query heads times the width of a value.
        heads: Number of query heads.
        kv_heads: Number of heads of keys.
        mlp: Inner width of the MLP that every token passes, shared experts included; 0 for none.
        gated: Whether that MLP has a gate.
        experts: Number of experts; 0 for none.
        chosen: Experts that a token is sent to.
        expert: Inner width of one expert.
        norms: Norms over the hidden size.
        plain_norms: How many of them compute in the dtype of the model (nn.LayerNorm); others widen to float32.
        qk_norm: Whether queries and keys have a norm.
        rank_attention: Sum of the ranks of adapters in the attention.
        rank_mlp: Sum of the ranks of adapters in the MLP.
    """

    query: int = 0
    key: int = 0
    value: int = 0
    output: int = 0
    heads: int = 0
    kv_heads: int = 0
    mlp: int = 0
    gated: bool = True
    experts: int = 0
    chosen: int = 0
    expert: int = 0
    norms: int = 2
    plain_norms: int = 0
    qk_norm: bool = False
    rank_attention: int = 0
    rank_mlp: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model.

    Attributes:
        name: Its class.
        hidden: Width of the residual stream.
        vocab: Rows of the head; 0 for none.
        itemsize: Bytes of an element of activations.
        frozen: Whether the weights that adapters do not bring are frozen.
        head_trains: Whether the weight of the head has a gradient.
        layers: In the order of the model.
        weights: All of them, each once.
        notes: What is not counted, in sentences.
    """

    name: str
    hidden: int
    vocab: int
    itemsize: int
    frozen: bool
    head_trains: bool
    layers: tuple[Layer, ...]
    weights: tuple[Weight, ...]
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Their number, of elements."""
        return sum(math.prod(weight.shape) for weight in self.weights)
