"""One line makes any Hugging Face model train faster and leaner, in place, and proves that it still computes the same thing.

import automodel_accel as accel

accel.apply(model)             # in place, and returns the model
print(accel.report(model))     # what was swapped, what was refused and why, what it was proved to
accel.revert(model)            # bit-exact undo
"""

from automodel_accel.api import RefusedError, accelerated, apply, plan, report, revert
from automodel_accel.config import AccelConfig

__version__ = "0.1.0"
__all__ = ["AccelConfig", "RefusedError", "accelerated", "apply", "plan", "report", "revert"]
