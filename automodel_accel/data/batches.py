"""Batches: rows of samples as tensors.

Packed rows hold samples one behind the other: position_ids start at 0 with each, which is how transformers and automodel_accel
tell documents apart. transformers looks at them only where neither an attention_mask nor a cache of keys is given, and models make a
cache unless they are told not to: so a packed batch says use_cache=False, and no mask. The first label of a sample is IGNORED, so nothing is
learned over an edge. What is left of a row is a document of its own without labels.
"""

from collections.abc import Sequence
from typing import Any

import torch

from automodel_accel.data.sample import IGNORED, Sample
from automodel_accel.data.settings import Batching

Batch = dict[str, Any]  # keyword arguments of a model: tensors, and the bool use_cache
Documents = Sequence[Sample]  # of one row


def packed(rows: Sequence[Documents], seq_length: int, pad_token_id: int, flat: bool = False) -> Batch:
    """Rows of `seq_length` tokens.

    Args:
        rows: One a row of the batch, whose documents fit into it; an empty one becomes a row without labels.
        seq_length: Tokens a row.
        pad_token_id: What fills a row.
        flat: Whether the rows are laid behind each other.

    Returns:
        input_ids, labels and position_ids, each [rows, seq_length] (flat: [1, rows * seq_length]), int64; and use_cache, False.
    """
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for documents in rows:
        lengths = [len(document.input_ids) for document in documents]
        left = seq_length - sum(lengths)
        tokens = [token for document in documents for token in document.input_ids]
        labels = [label for document in documents for label in document.labels]
        columns["input_ids"].append(tokens + [pad_token_id] * left)
        columns["labels"].append(labels + [IGNORED] * left)
        columns["position_ids"].append([position for length in [*lengths, left] for position in range(length)])
    made = {name: torch.tensor(column) for name, column in columns.items()}
    if flat:
        made = {name: column.view(1, -1) for name, column in made.items()}
    return {**made, "use_cache": False}


def padded(rows: Sequence[Documents], multiple: int, pad_token_id: int) -> Batch:
    """One sample a row, padded on the right to the longest of them.

    Args:
        rows: One sample in each; an empty one becomes a row without labels.
        multiple: What the length of the batch is a multiple of.
        pad_token_id: What fills a row.

    Returns:
        input_ids, attention_mask and labels, each [rows, length], int64.
    """
    samples = [row[0] if row else Sample([pad_token_id], [IGNORED]) for row in rows]
    longest = max(len(sample.input_ids) for sample in samples)
    length = -(-longest // multiple) * multiple
    left = [length - len(sample.input_ids) for sample in samples]
    columns = {
        "input_ids": [sample.input_ids + [pad_token_id] * pad for sample, pad in zip(samples, left)],
        "attention_mask": [[1] * (length - pad) + [0] * pad for pad in left],
        "labels": [sample.labels + [IGNORED] * pad for sample, pad in zip(samples, left)],
    }
    return {name: torch.tensor(column) for name, column in columns.items()}


def batched(rows: Sequence[Documents], batching: Batching, pad_token_id: int) -> Batch:
    """Rows as the settings want them."""
    if batching.packing:
        return packed(rows, batching.seq_length, pad_token_id, batching.flat)
    return padded(rows, batching.pad_to_multiple_of, pad_token_id)
