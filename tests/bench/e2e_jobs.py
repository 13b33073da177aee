"""A job of a tiny model and the texts that it trains on, for the tests of the end-to-end benchmark."""

from bench.e2e import documents
from bench.e2e.job import Job

JOB = Job(
    model="tiny",
    method="full",
    layout="packed",
    rows=2,
    length=80,
    steps=4,
    warmup=1,
    dtype="float32",
    learning_rate=1e-3,
    rank=4,
)
TEXTS = documents.Documents("a hundred paragraphs", documents.paragraphs_in_bytes().tokens[:100])
