"""All benchmarks, by name."""

from collections.abc import Mapping

from bench import linear_cross_entropy
from bench.case import Case

CASES: Mapping[str, Case] = {case.name: case for case in (linear_cross_entropy.CASE,)}
