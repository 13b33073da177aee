"""Checkpoints: what a run needs to go on, and what others can load."""

from automodel_accel.checkpoint.checkpoints import Checkpoints, Restored
from automodel_accel.checkpoint.errors import CheckpointError, DamagedError
from automodel_accel.checkpoint.export import export

__all__ = ["CheckpointError", "Checkpoints", "DamagedError", "Restored", "export"]
