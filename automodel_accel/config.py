"""What a user may ask `apply` for."""

from dataclasses import dataclass, fields, replace
from typing import Any

from automodel_accel.kernels.contract import AUTO, unknown_name


@dataclass(frozen=True, slots=True)
class AccelConfig:
    """Which fusions to apply. Every fusion takes "auto" (or True), False, or the name of an implementation.

    Attributes:
        norm: RMS norms: "auto", "triton", "torch", False.
        mlp: Gated MLPs: "auto", "triton", "torch", False.
        loss: The loss without logits: "auto", "triton", "torch", False.
        strict: Turn an explicit request that is refused into a `RefusedError`. Without it the refusal is logged and reported.
    """

    norm: str | bool = AUTO
    mlp: str | bool = AUTO
    loss: str | bool = AUTO
    strict: bool = False

    @classmethod
    def build(cls, config: "AccelConfig | dict[str, Any] | None" = None, **fusions: Any) -> "AccelConfig":
        """A config from another one or a dict, with single fusions given by name.

        Raises:
            ValueError: an unknown key, with the nearest right one; or a value that is no string or bool.
        """
        given = {**config, **fusions} if isinstance(config, dict) else fusions
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known:
                raise ValueError(unknown_name("setting", name, known))
            expected = bool if name == "strict" else str | bool
            if not isinstance(value, expected):
                raise ValueError(f"{name}={value!r}: expected " + ("True or False." if name == "strict" else _EXPECTED))
        if config is not None and not isinstance(config, AccelConfig | dict):
            raise ValueError(f"config is a {type(config).__name__}; expected an AccelConfig, a dict, or settings by name.")
        return replace(config, **given) if isinstance(config, AccelConfig) else cls(**given)

    def wanted(self, fusion: str) -> str | None:
        """The implementation to ask for, or None where the fusion is off."""
        value = getattr(self, fusion)
        return None if value is False else AUTO if value is True else str(value)

    def is_explicit(self, fusion: str) -> bool:
        """Whether the user named an implementation or said True."""
        return getattr(self, fusion) not in (AUTO, False)


_EXPECTED = '"auto", False, or the name of an implementation such as "torch" or "triton".'
