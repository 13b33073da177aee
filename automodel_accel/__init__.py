"""One line makes any Hugging Face model train faster and leaner, in place, and proves that it still computes the same thing.

import automodel_accel as accel

accel.apply(model)             # in place, and returns the model
print(accel.report(model))     # what was swapped, what was refused and why, what it was proved to
accel.revert(model)            # bit-exact undo
"""

import importlib
from typing import TYPE_CHECKING, Any

from automodel_accel.api import RefusedError, accelerated, apply, parallelize, plan, report, revert
from automodel_accel.config import AccelConfig
from automodel_accel.sharding import gather_fp8

if TYPE_CHECKING:
    from automodel_accel.callback import AccelCallback
    from automodel_accel.models import AutoModelForCausalLM, AutoModelForImageTextToText
    from automodel_accel.parallel import Mesh, accumulate, clip_grad_norm_, draw_sharded, load_sharded

__version__ = "0.1.0"
__all__ = [
    "AccelCallback",
    "AccelConfig",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "Mesh",
    "RefusedError",
    "accelerated",
    "accumulate",
    "apply",
    "clip_grad_norm_",
    "draw_sharded",
    "gather_fp8",
    "load_sharded",
    "parallelize",
    "plan",
    "report",
    "revert",
]

# imported when they are asked for: they bring transformers or torch.distributed, which `import automodel_accel` must not
_LATER = {
    "AccelCallback": "automodel_accel.callback",
    "AutoModelForCausalLM": "automodel_accel.models",
    "AutoModelForImageTextToText": "automodel_accel.models",
    "Mesh": "automodel_accel.parallel",
    "accumulate": "automodel_accel.parallel",
    "clip_grad_norm_": "automodel_accel.parallel",
    "draw_sharded": "automodel_accel.parallel",
    "load_sharded": "automodel_accel.parallel",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
