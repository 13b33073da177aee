"""Things made ahead: a thread makes the next few while the last one is used."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Thing = TypeVar("Thing")


def made_ahead(things: Iterator[Thing], number: int) -> Generator[Thing, None, None]:
    """The same things, up to `number` of them made ahead by a thread. Its errors are raised here, in their turn.

    Args:
        things: Nobody else may take from it. It is left where the thread is when the iteration here ends.
        number: 0 makes each when it is asked for, without a thread.
    """
    if number == 0:
        yield from things
        return
    end = object()
    pool = ThreadPoolExecutor(1, "data made ahead")
    try:
        coming = deque(pool.submit(next, things, end) for _ in range(number))
        while (thing := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, things, end))
            yield thing  # type: ignore[misc]  # not the end, so a Thing
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
