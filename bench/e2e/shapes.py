"""Shapes of real models, for models with random weights; nothing is downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder with gated MLPs, as in the published config of the model of that name.

    Attributes:
        architecture: `model_type` in transformers.
        hidden: Hidden size.
        intermediate: Size between the projections of an MLP.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Size of a head.
        vocab: Words.
        tied: Whether head and embedding are one weight.
        rope_theta: Base of the rotary position embedding.
        eps: Of the norms.
    """

    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    rope_theta: float
    eps: float

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a layer's linears: q, k, v, the attention's output, gate, up, down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        into_attention = ((self.hidden, q), (self.hidden, kv), (self.hidden, kv))
        mlp = ((self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden))
        return (*into_attention, (q, self.hidden), *mlp)

    @property
    def parameters(self) -> int:
        """Parameters, norms apart."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * sum(one * other for one, other in self.projections)

    def config(self) -> Any:
        """The config for transformers."""
        from transformers import CONFIG_MAPPING

        config: Any = CONFIG_MAPPING[self.architecture]
        return config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            rms_norm_eps=self.eps,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=131072,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


_LLAMA_3_8B = Shape(
    architecture="llama",
    hidden=4096,
    intermediate=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    tied=False,
    rope_theta=500000.0,
    eps=1e-5,
)
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "tiny": replace(
            _LLAMA_3_8B, hidden=64, intermediate=160, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=320
        ),
        "Qwen3-0.6B": Shape(
            architecture="qwen3",
            hidden=1024,
            intermediate=3072,
            layers=28,
            heads=16,
            kv_heads=8,
            head_dim=128,
            vocab=151936,
            tied=True,
            rope_theta=1000000.0,
            eps=1e-6,
        ),
        "Llama-3.2-1B": replace(_LLAMA_3_8B, hidden=2048, intermediate=8192, layers=16, head_dim=64, tied=True),
        "Llama-3-8B": _LLAMA_3_8B,
    }
)


def shape_of(model: str, layers: int | None = None) -> Shape:
    """The shape of a model, with another number of layers where one is given.

    Raises:
        ValueError: no shape of that name.
    """
    if model not in SHAPES:
        raise ValueError(f"no model named {model!r}; there are {', '.join(SHAPES)}.")
    return replace(SHAPES[model], layers=layers) if layers else SHAPES[model]
