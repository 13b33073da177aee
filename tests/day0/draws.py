"""Random training steps: (type, weights, dtype, ignored labels, shape of the batch) drawn at random; each must have vanilla's gradients."""

import multiprocessing
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from automodel_accel.patches.probe import PROBE_ERRORS
from tests.day0.checks import CHECKS, NotApplicable, case_of
from tests.day0.zoo import Type, Unbuildable


@dataclass(frozen=True, slots=True)
class Draw:
    """One training step, and what came of it: None where it is right, else what differs."""

    type: Type
    seed: int
    dtype: torch.dtype
    rows: int
    tokens: int
    share_ignored: float
    wrong: str | None = None
    not_applicable: str | None = None

    def __str__(self) -> str:
        batch = f"{self.rows} x {self.tokens} tokens, {self.share_ignored:.0%} of the labels ignored"
        return f"{self.type.kind}/{self.type.name}, seed {self.seed}, {self.dtype}, {batch}"


def draws(types: Sequence[Type], count: int, seed: int = 0, processes: int = 2) -> Iterator[Draw]:
    """`count` draws, as they come."""
    generator = random.Random(seed)
    wanted = [_draw(types, generator) for _ in range(count)]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_try, wanted)


def _draw(types: Sequence[Type], generator: random.Random) -> Draw:
    dtype = generator.choice((torch.float32, torch.float32, torch.bfloat16))
    rows, tokens = generator.randint(1, 3), generator.randint(6, 32)
    return Draw(generator.choice(types), generator.randrange(10**6), dtype, rows, tokens, generator.uniform(0, 0.9))


def _try(draw: Draw) -> Draw:
    wrong = not_applicable = None
    try:
        case = case_of(draw.type, seed=draw.seed, rows=draw.rows, tokens=draw.tokens, ignored=0)
        _ignore(case.batch["labels"], draw)
        case.vanilla_step  # noqa: B018  # vanilla must take this batch
    except (Unbuildable, *PROBE_ERRORS) as error:
        not_applicable = f"vanilla fails: {error}"
    else:
        try:
            CHECKS["parity" if draw.dtype is torch.float32 else "bfloat16"](case)
        except NotApplicable as reason:
            not_applicable = str(reason)
        except (AssertionError, *PROBE_ERRORS) as error:
            if case.is_repeatable:
                wrong = f"{type(error).__name__}: {error}"
            else:
                not_applicable = "vanilla draws a seed of its own, and gives another loss each time"
    return Draw(draw.type, draw.seed, draw.dtype, draw.rows, draw.tokens, draw.share_ignored, wrong, not_applicable)


def _ignore(labels: torch.Tensor, draw: Draw) -> None:
    """Ignore a share of the labels, in place; the last one stays, so that there is something to learn."""
    chosen = torch.rand(labels.shape, generator=torch.Generator().manual_seed(draw.seed)) < draw.share_ignored
    chosen[..., -1] = False
    labels[chosen] = -100
