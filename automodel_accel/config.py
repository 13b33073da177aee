"""What a user may ask `apply` for."""

from dataclasses import dataclass, fields, replace
from typing import Any

from automodel_accel.kernels.contract import AUTO, unknown_name

RECOMPUTE = ("selective", "mlp", "full")


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
        quantised: LoRA around 4-bit and 8-bit linears of bitsandbytes: "auto", "torch", False.
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
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "recompute":
                if value is not None and value not in RECOMPUTE:
                    raise ValueError(unknown_name("recompute", str(value), [*RECOMPUTE, "None"]))
            elif field.name == "strict":
                if not isinstance(value, bool):
                    raise ValueError(f"strict={value!r}: expected True or False.")
            elif field.name == "implementation":
                if not isinstance(value, str):
                    raise ValueError(f'implementation={value!r}: expected "auto" or the name of an implementation.')
            elif not isinstance(value, str | bool):
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

    def wanted(self, fusion: str) -> str | None:
        """The implementation to ask for, or None where the fusion is off."""
        value = getattr(self, fusion)
        return None if value is False else self.implementation if value in (AUTO, True) else str(value)

    def is_explicit(self, fusion: str) -> bool:
        """Whether the user named an implementation or said True."""
        return getattr(self, fusion) not in (AUTO, False)
