"""Plausible mistakes in delayed scaling; none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

KERNEL = "fp8_linear/delayed_fused.py"
HISTORY = "fp8_linear/history.py"
NODE = "fp8_linear/__init__.py"

MUTANTS: tuple[Mutant, ...] = ()
