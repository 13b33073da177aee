"""What a user may ask `apply` for."""

from dataclasses import dataclass, fields, replace
from typing import Any

from automodel_accel.kernels.contract import AUTO, unknown_name

RECOMPUTE = ("selective", "mlp", "full")
OTHERS = ("recompute", "fp8", "fp8_layers", "strict", "implementation")  # settings that are no fusion
FP8 = ("tensorwise", "rowwise", "tensorwise_e5m2", "delayed")  # how values are rounded to 8 bits; kernels/fp8_linear
FP8_ENGINES = ("te",)  # which round in a way of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class AccelConfig:
    """Which fusions to apply. Every fusion takes "auto" (or True), False, or the name of an implementation.

    Attributes:
        implementation: For every fusion that says "auto" and has an implementation of this name: "triton", "te", "liger", ...
        norm: Norms: "auto", "triton", "torch", "te", "liger", False.
        mlp: MLPs, gated and plain: "auto", "triton", "torch", "liger" (gated), False.
        experts: Mixtures of experts: "auto", "triton", "torch", False.
        rope: Rotary position embeddings: "auto", "triton", "torch", False.
        attention: Attention: "auto", the name of a backend, False.
        residual: Residual sum and norm in one kernel: "auto", "triton", "torch", False.
        loss: The loss without logits: "auto", "triton", "torch", False.
        linear: Linears of one input in one node of autograd: "auto", "torch", False.
        quantised: LoRA around linears that bitsandbytes or transformers quantised: "auto", "torch", False.
        fp8: Products of 8-bit values in linears: False, "auto" (where it pays), "tensorwise" (one scale a tensor), "rowwise" (one a
            row), "tensorwise_e5m2" (gradients in E5M2), "delayed" (tensorwise, by scales of the calls before); the last four
            everywhere but in heads, routers and adapters.
        fp8_layers: Patterns of dotted names, such as "*.mlp.*": only these linears, whether they pay or not. Separated by commas, or
            a list.
        recompute: What is computed again in backward instead of kept: None (nothing), "selective" (outputs of norms and of
            activations, in about 1 % of the time), "mlp" (each MLP as a whole as well) or "full" (each layer).
        strict: Turn an explicit request that is refused into a `RefusedError`. Without it the refusal is logged and reported.

    Raises:
        ValueError: an unknown setting, with the nearest right one; or a value of another type.
    """

    implementation: str = AUTO
    norm: str | bool = AUTO
    mlp: str | bool = AUTO
    experts: str | bool = AUTO
    rope: str | bool = AUTO
    attention: str | bool = AUTO
    residual: str | bool = AUTO
    loss: str | bool = AUTO
    linear: str | bool = AUTO
    quantised: str | bool = AUTO
    fp8: str | bool = False
    fp8_layers: tuple[str, ...] = ()
    recompute: str | None = None
    strict: bool = False

    def __new__(cls, **settings: Any) -> "AccelConfig":
        """Checked here, before the generated `__init__` would raise a TypeError that names no way out."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise ValueError(unknown_name("setting", name, known))
        return object.__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fp8_layers", _patterns(self.fp8_layers))
        if self.recompute is not None and self.recompute not in RECOMPUTE:
            raise ValueError(unknown_name("recompute", str(self.recompute), [*RECOMPUTE, "None"]))
        if self.fp8 not in (True, False, AUTO, *FP8, *FP8_ENGINES):
            raise ValueError(unknown_name("fp8", str(self.fp8), [AUTO, *FP8, *FP8_ENGINES, "False"]))
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict={self.strict!r}: expected True or False.")
        if not isinstance(self.implementation, str):
            raise ValueError(
                f'implementation={self.implementation!r}: expected "auto" or the name of an implementation.'
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in OTHERS and not isinstance(value, str | bool):
                raise ValueError(f'{field.name}={value!r}: expected "auto", False, or the name of an implementation.')

    @classmethod
    def build(cls, config: "AccelConfig | dict[str, Any] | None" = None, **fusions: Any) -> "AccelConfig":
        """A config from another one or a dict, with single settings given by name on top."""
        if isinstance(config, AccelConfig):
            return replace(config, **fusions)
        if config is not None and not isinstance(config, dict):
            raise ValueError(
                f"config is a {type(config).__name__}; expected an AccelConfig, a dict, or settings by name."
            )
        return cls(**{**(config or {}), **fusions})

    def fp8_recipe(self) -> str | None:
        """How values are rounded to 8 bits: "auto", a recipe's name, or None where nothing is."""
        return None if self.fp8 is False else AUTO if self.fp8 is True else self.fp8

    def wanted(self, fusion: str) -> str | None:
        """The implementation to ask for, or None where the fusion is off."""
        value = getattr(self, fusion)
        if fusion == "fp8" and value in FP8:
            return self.implementation
        return None if value is False else self.implementation if value in (AUTO, True) else str(value)

    def is_explicit(self, fusion: str) -> bool:
        """Whether the user named an implementation or said True."""
        return getattr(self, fusion) not in (AUTO, False)


def _patterns(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(
            f'fp8_layers={value!r}: expected patterns of names, such as "*.mlp.*,*.self_attn.*", or a list of them.'
        )
    return tuple(name.strip() for name in names)
