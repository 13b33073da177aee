"""From the settings of a data set to its loader."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from tqdm import tqdm

from automodel_accel.data.bins import TokenBins
from automodel_accel.data.counts import Counts
from automodel_accel.data.loader import Loader
from automodel_accel.data.mock import MockSamples
from automodel_accel.data.sample import SampleStore
from automodel_accel.data.settings import Batching, BinData, DataSettings, MockData, RowData
from automodel_accel.data.sources import Row, RowStream, is_streamed, open_rows
from automodel_accel.data.tokenising import Encoder
from automodel_accel.data.windows import CHUNK, AtHand, Corpus, Streamed, nothing_left


def open_data(
    settings: DataSettings,
    tokenizer: Any,
    batching: Batching,
    *,
    data_rank: int = 0,
    data_size: int = 1,
    epochs: int | None = 1,
    rows: Sequence[Row] | None = None,
    progress: bool = True,
) -> Loader:
    """The batches of a data set, for one rank. Rows that do not stream are read and tokenised here.

    Args:
        settings: Which data.
        tokenizer: A fast one of transformers; None for token bins and mock data.
        batching: How its samples become batches.
        data_rank: Which of the ranks that see rows of their own this is.
        data_size: How many there are.
        epochs: How often to go through the data; None for without end.
        rows: The rows themselves, instead of what `settings.path` names.
        progress: Whether a bar is shown while rows are tokenised, where that takes more than a second.

    Raises:
        ValueError: the data cannot be read, no row of it can be used, or the settings do not fit the tokenizer.
    """
    corpus, counts = corpus_of(settings, tokenizer, batching, rows, progress)
    return Loader(
        corpus,
        batching,
        padding_token(tokenizer),
        data_rank=data_rank,
        data_size=data_size,
        epochs=epochs,
        counts=counts,
    )


def corpus_of(
    settings: DataSettings, tokenizer: Any, batching: Batching, rows: Sequence[Row] | None = None, progress: bool = True
) -> tuple[Corpus, Counts]:
    """What rows of tokens are made of, and what became of the rows that were read for it; arguments as of `open_data`."""
    if isinstance(settings, BinData):
        if settings.document_end is not None and not batching.packing:
            raise ValueError(
                "document_end keeps documents in a row apart, which padded rows cannot; set packing: true."
            )
        return AtHand(TokenBins(settings, batching.seq_length), batching, settings.shuffle, settings.seed), Counts()
    if isinstance(settings, MockData):
        return AtHand(MockSamples(settings, batching.seq_length), batching, settings.shuffle, settings.seed), Counts()
    encode = Encoder(settings, tokenizer, batching.seq_length)
    opened = open_rows(settings) if rows is None else rows
    check_columns(settings, opened, encode.render.columns)
    if is_streamed(opened):
        return Streamed(RowStream(opened), encode, batching, settings.shuffle, settings.seed), encode.counts
    return AtHand(stored(opened, encode, progress), batching, settings.shuffle, settings.seed), encode.counts


def stored(rows: Iterable[Row], encode: Encoder, progress: bool) -> SampleStore:
    """The samples of all rows, tokenised now.

    Raises:
        ValueError: there are none.
    """
    store = SampleStore()
    bar = tqdm(rows, "tokenising", unit=" rows", delay=1, disable=None if progress else True)
    numbered = enumerate(bar)
    while chunk := list(islice(numbered, CHUNK)):
        for sample in encode(chunk):
            store.add(sample)
    if len(store) == 0:
        raise nothing_left(encode)
    return store


def check_columns(settings: RowData, rows: Any, needed: Sequence[str]) -> None:
    """Stop where no row can have what is needed.

    Raises:
        ValueError: the rows are a table without one of the columns.
    """
    there: Sequence[str] | None = getattr(rows, "column_names", None)
    if there is None:  # rows of any keys: each is looked at when it is read
        return
    missing = [column for column in needed if column not in there]
    if missing:
        raise ValueError(
            f"path {settings.path}: no column {' and '.join(map(repr, missing))}; there are {', '.join(map(repr, there))}. Name the "
            "columns as this data has them, or take another kind of data."
        )


def padding_token(tokenizer: Any) -> int:
    """What fills a row; it is read by no other token and carries no loss."""
    tokens = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return next((int(token) for token in tokens if token is not None), 0)
