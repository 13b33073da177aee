"""Mock data: random tokens that are the same for the same seed."""

import random
from collections.abc import Sequence

import torch

from automodel_accel.data.sample import IGNORED, Sample
from automodel_accel.data.settings import MockData


class MockSamples:
    """Samples of random tokens, all but the first of which carry loss; made when they are asked for.

    Args:
        settings: Of the data.
        seq_length: The most tokens of a sample.

    Raises:
        ValueError: the shortest sample is to be longer than that.
    """

    def __init__(self, settings: MockData, seq_length: int) -> None:
        shortest = seq_length if settings.shortest is None else settings.shortest
        if shortest > seq_length:
            raise ValueError(f"shortest is {shortest}, but a row holds {seq_length} tokens; expected no more.")
        draw = random.Random(settings.seed)
        self._lengths = [draw.randint(shortest, seq_length) for _ in range(settings.samples)]
        self._settings = settings

    def __len__(self) -> int:
        return len(self._lengths)

    def length(self, number: int) -> int:
        """Tokens of a sample."""
        return self._lengths[number]

    def documents(self, number: int) -> Sequence[Sample]:
        """The sample, as a list of one."""
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + number)
        tokens = torch.randint(self._settings.vocab_size, (self._lengths[number],), generator=generator).tolist()
        return [Sample(tokens, [IGNORED, *tokens[1:]])]
