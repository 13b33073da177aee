"""Packing: which samples share a row."""

from collections.abc import Sequence


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put things into as few boxes as the rule finds: the longest first, each into the first box that has room for it.

    The rule never takes more than 11/9 of the fewest boxes possible, plus one (Johnson, "Near-optimal bin packing algorithms",
    1973). Boxes are found through a tree of the most room below each node: n log n.

    Args:
        lengths: One a thing, each from 1 to `capacity`.
        capacity: Of a box.

    Returns:
        The boxes, each with the indices of its things, longest first, and of equal ones the earlier first.

    Raises:
        ValueError: a length that no box holds.
    """
    if lengths and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths from {min(lengths)} to {max(lengths)}; expected from 1 to the capacity, {capacity}.")
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)  # node i has the children 2 i and 2 i + 1; leaf `leaves + box`
    boxes: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[index] else 2 * node + 1
        if node - leaves == len(boxes):
            boxes.append([])
        boxes[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return boxes
