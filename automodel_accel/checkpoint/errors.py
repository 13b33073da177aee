"""What a checkpoint can fail with, beside a ValueError for what the caller asked."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; says which file, and what is left."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was written; says which file, and how it differs."""
