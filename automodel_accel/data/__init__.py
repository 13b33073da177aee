"""Data: rows of many kinds as batches of tokens with labels, packed, sharded over ranks, and resumable to the sample."""

from automodel_accel.data.counts import Counts
from automodel_accel.data.loader import Loader
from automodel_accel.data.opening import open_data
from automodel_accel.data.sample import IGNORED, Sample
from automodel_accel.data.settings import (
    Batching,
    BinData,
    ChatData,
    DataSettings,
    HellaSwagData,
    InstructionData,
    MockData,
    SquadData,
    TextData,
)

__all__ = [
    "IGNORED",
    "Batching",
    "BinData",
    "ChatData",
    "Counts",
    "DataSettings",
    "HellaSwagData",
    "InstructionData",
    "Loader",
    "MockData",
    "Sample",
    "SquadData",
    "TextData",
    "open_data",
]
