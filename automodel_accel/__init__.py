"""One line makes any Hugging Face model train faster and leaner, in place, and proves that it still computes the same thing.

import automodel_accel as accel

accel.apply(model)             # in place, and returns the model
print(accel.report(model))     # what was swapped, what was refused and why, what it was proved to
accel.revert(model)            # bit-exact undo
"""

import importlib
from typing import TYPE_CHECKING, Any

from automodel_accel.api import RefusedError, accelerated, apply, plan, report, revert
from automodel_accel.config import AccelConfig
from automodel_accel.sharding import gather_fp8

if TYPE_CHECKING:
    from automodel_accel.callback import AccelCallback
    from automodel_accel.models import AutoModelForCausalLM, AutoModelForImageTextToText

__version__ = "0.1.0"
__all__ = [
    "AccelCallback",
    "AccelConfig",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "RefusedError",
    "accelerated",
    "apply",
    "gather_fp8",
    "plan",
    "report",
    "revert",
]

# imported when they are asked for: they bring transformers, which `import automodel_accel` must not
_LATER = {
    "AccelCallback": "automodel_accel.callback",
    "AutoModelForCausalLM": "automodel_accel.models",
    "AutoModelForImageTextToText": "automodel_accel.models",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
