"""The shapes of real models, from which the cases of the benchmark are made."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the operations of one model's layers look like.

    Attributes:
        name: As its makers call it.
        hidden: Width of a token.
        intermediate: Width inside the MLP.
        vocab: Rows of the output head.
        heads: Query heads.
        key_heads: Key heads.
        head_dim: Width of a head.
        eps: Of its norms.
        offset: Added to the weight of a norm.
        order: Where its norm rounds, in the words of `rms_norm`.
        activation: Of its MLP.
        softcap: Of its logits; None for none.
    """

    name: str
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    key_heads: int
    head_dim: int
    eps: float = 1e-6
    offset: float = 0.0
    order: str = "cast_then_mul"
    activation: str = "silu"
    softcap: float | None = None


_ALL = (
    Model(
        name="Llama-3.2-1B",
        hidden=2048,
        intermediate=8192,
        vocab=128256,
        heads=32,
        key_heads=8,
        head_dim=64,
        eps=1e-5,
    ),
    Model(
        name="Llama-3-8B",
        hidden=4096,
        intermediate=14336,
        vocab=128256,
        heads=32,
        key_heads=8,
        head_dim=128,
        eps=1e-5,
    ),
    Model(name="Qwen3-0.6B", hidden=1024, intermediate=3072, vocab=151936, heads=16, key_heads=8, head_dim=128),
    Model(name="Qwen3-1.7B", hidden=2048, intermediate=6144, vocab=151936, heads=16, key_heads=8, head_dim=128),
    Model(name="Qwen3-8B", hidden=4096, intermediate=12288, vocab=151936, heads=32, key_heads=8, head_dim=128),
    Model(
        name="Gemma-2-2B",
        hidden=2304,
        intermediate=9216,
        vocab=256000,
        heads=8,
        key_heads=4,
        head_dim=256,
        offset=1.0,
        order="mul_then_cast",
        activation="gelu_tanh",
        softcap=30.0,
    ),
    # LayerNorm and MLPs without a gate
    Model(
        name="GPT-2-XL",
        hidden=1600,
        intermediate=6400,
        vocab=50257,
        heads=25,
        key_heads=25,
        head_dim=64,
        eps=1e-5,
        activation="gelu_tanh",
    ),
    Model(
        name="Nemotron-Mini-4B",
        hidden=3072,
        intermediate=9216,
        vocab=256000,
        heads=24,
        key_heads=8,
        head_dim=128,
        eps=1e-5,
        activation="relu2",
    ),
)
MODELS: Mapping[str, Model] = {model.name: model for model in _ALL}
GATED = ("Llama-3.2-1B", "Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B", "Gemma-2-2B", "Llama-3-8B")
PLAIN = ("GPT-2-XL", "Nemotron-Mini-4B")
