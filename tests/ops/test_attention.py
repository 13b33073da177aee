"""attention against its definition: values, gradients, who sees whom, what is never built, and mistakes that must be caught."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_accel.kernels import attention as package
from automodel_accel.kernels.attention import measure
from automodel_accel.kernels.attention.reference import visible_pairs
from tests.ops import checks
from tests.ops.mutants_attention import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

TILED = ("packed", "torch")  # on a CPU
DTYPES = (torch.float32, torch.bfloat16)
# batch, query heads, key heads, tokens, width, width of values
SHAPES = (
    (2, 4, 2, 24, 16, 16),
    (1, 1, 1, 1, 8, 8),
    (2, 3, 1, 301, 5, 5),
    (1, 4, 4, 259, 8, 8),
    (3, 6, 2, 33, 24, 8),
    (1, 2, 2, 130, 8, 24),
    (1, 8, 1, 65, 64, 64),
)
USUAL = SHAPES[0]
# how documents end, as shares of the tokens; one row of numbers for the batch, or one for each of its rows
DOCUMENTS = {"one for all": ((0.3, 0.35),), "of each row": ((0.3, 0.35), (0.6,), ())}


def numbered(kind: str, batch: int, tokens: int) -> torch.Tensor:
    """Document numbers of packed rows."""
    ends = DOCUMENTS[kind]
    rows = [sum((torch.arange(tokens) >= int(end * tokens)).int() for end in row) for row in ends]
    rows = [row if isinstance(row, torch.Tensor) else torch.zeros(tokens, dtype=torch.int32) for row in rows]
    return torch.stack(rows[:1] if len(rows) == 1 else [rows[i % len(rows)] for i in range(batch)])


def operation(
    implementation: str,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    documents: str | None = None,
    masked: bool = False,
    scale: float | None = 0.3,
    attention_package: ModuleType = package,
) -> checks.Operation:
    """attention with its options fixed."""

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        batch, heads, key_heads, tokens, width, value_width = shape if len(shape) == 6 else USUAL
        query = checks.normal(generator, (batch, heads, tokens, width), dtype)
        key = checks.normal(generator, (batch, key_heads, tokens, width), dtype)
        value = checks.normal(generator, (batch, key_heads, tokens, value_width), dtype)
        return (query, key, value, checks.normal(generator, (heads,), dtype)) if sinks else (query, key, value)

    def options(query: torch.Tensor) -> dict[str, Any]:
        numbers = numbered(documents, query.shape[0], query.shape[2]).to(query.device) if documents else None
        mask = None
        if masked:
            tokens = torch.arange(query.shape[2], device=query.device)
            mask = (-0.05 * (tokens[:, None] - tokens).abs())[None, None].to(query.dtype)
        return {"causal": causal, "window": window, "softcap": softcap, "documents": numbers, "mask": mask}

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *sink: torch.Tensor) -> torch.Tensor:
        output = attention_package.attention(
            *(query, key, value),
            sinks=sink[0] if sink else None,
            scale=scale,
            implementation=implementation,
            **options(query),
        )
        assert isinstance(output, torch.Tensor)
        return output

    def theirs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *sink: torch.Tensor) -> torch.Tensor:
        said = options(query)
        factor = scale or query.shape[-1] ** -0.5
        if implementation == "torch" or query.dtype == torch.float64:
            sinks_H = sink[0] if sink else None
            options_of_scores = factor, causal, window, softcap, sinks_H
            if query.dtype == torch.float64 or said["documents"] is None:
                return package.reference.attention(
                    query, key, value, *options_of_scores, said["documents"], said["mask"]
                )
            return by_document(partial(_reference, options_of_scores), (query, key, value), said["documents"])
        # what torch's own fused attention makes of the dense mask, in this dtype
        visible = visible_pairs(query.shape[2], key.shape[2], causal, window, said["documents"], query.device)
        bias = torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill(~visible, float("-inf"))
        dense = bias if said["mask"] is None else bias + said["mask"]
        if implementation == "packed" and query.device.type == "cpu":
            return dense_flash(query, key, value, dense, factor)
        return F.scaled_dot_product_attention(query, key, value, dense, scale=factor, enable_gqa=True)

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs, activations=3)


def _reference(options: tuple[Any, ...], *tensors: torch.Tensor) -> torch.Tensor:
    return package.reference.attention(*tensors, *options)


def by_document(
    function: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...], documents: torch.Tensor
) -> torch.Tensor:
    """The documents of each row run alone, in torch's precision for sums of their length."""
    rows = []
    for row in range(tensors[0].shape[0]):
        lengths = torch.unique_consecutive(documents[row % documents.shape[0]], return_counts=True)[1].tolist()
        alone = zip(*(x[row : row + 1].split(lengths, 2) for x in tensors), strict=True)
        rows.append(torch.cat([function(*given) for given in alone], 2))
    return torch.cat(rows)


def dense_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """torch's own flash kernel of the CPU, with grouped key heads, under a dense mask."""
    width, value_width = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    mask = mask.expand(query.shape[0], -1, -1, -1)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: torch.Tensor = flash(query, key, value, attn_mask=mask, scale=scale)[0]
    return output[..., :value_width]


PATTERNS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": False},
    {"window": 5},
    {"window": 300},
    {"documents": "one for all"},
    {"documents": "of each row", "window": 7},
    {"documents": "of each row", "causal": False},
    {"scale": None},
)
SCORES: tuple[dict[str, Any], ...] = (
    {"softcap": 2.0},
    {"sinks": True},
    {"softcap": 1.5, "sinks": True, "window": 6, "documents": "of each row"},
    {"sinks": True, "causal": False},
    {"masked": True, "causal": False},
    {"masked": True, "sinks": True, "softcap": 3.0},
)
CASES = [
    *(("packed", pattern) for pattern in PATTERNS),
    *(("torch", pattern) for pattern in (*PATTERNS, *SCORES)),
    *(("sdpa", pattern) for pattern in ({}, {"causal": False}, {"masked": True, "causal": False})),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("implementation", "pattern"), CASES, ids=str)
def test_every_pattern(implementation: str, pattern: dict[str, Any], dtype: torch.dtype) -> None:
    one = operation(implementation, **pattern)
    for shape in SHAPES:
        checks.check_shape(one, dtype, shape, draws=6)


@pytest.mark.parametrize(("implementation", "pattern"), CASES, ids=str)
def test_in_float64_it_is_the_definition(implementation: str, pattern: dict[str, Any]) -> None:
    one = operation(implementation, **pattern)
    for shape in SHAPES:
        inputs = one.draw(shape, torch.float64)
        for result in checks.results(one, inputs):
            torch.testing.assert_close(result.ours, result.truth, rtol=1e-10, atol=1e-12, msg=result.name)


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize(
    "check",
    [
        checks.check_nothing_overwritten,
        checks.check_backward_twice,
        checks.check_repeatable,
        checks.check_frozen_inputs,
        checks.check_double_backward,
    ],
    ids=lambda check: check.__name__,
)
def test_properties(implementation: str, check: checks.Check) -> None:
    pattern: dict[str, Any] = {"window": 9, "documents": "of each row", "sinks": implementation == "torch"}
    check(operation(implementation, **pattern), torch.float32)


@pytest.mark.parametrize("implementation", TILED)
def test_large_scores_and_strides(implementation: str) -> None:
    one = operation(implementation, documents="one for all")
    query, key, value = (x for x in one.draw(USUAL, torch.float32) if x is not None)
    checks.check_values(one, (query * 8, key * 8, value))
    by_token = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    checks.check_values(one, by_token)
    wide = torch.cat([query, query], -1)
    checks.check_values(one, (wide[..., ::2], key, value))


@pytest.mark.parametrize("implementation", TILED)
def test_a_large_sink_takes_all_the_weight(implementation: str) -> None:
    if implementation == "packed":
        with pytest.raises(ValueError, match="does not do sinks"):
            package.attention(*_ones(3), sinks=torch.zeros(2), implementation="packed")
        return
    output = package.attention(*_ones(3), sinks=torch.full((2,), 200.0), implementation="torch")
    assert output.abs().max() < 1e-30


@pytest.mark.parametrize("implementation", TILED)
@pytest.mark.parametrize("pattern", [{}, {"documents": "of each row", "window": 5}], ids=str)
def test_registered(implementation: str, pattern: dict[str, Any]) -> None:
    one = operation(implementation, **pattern)
    checks.check_compiled(one)
    query, key, value = one.draw(USUAL, torch.float32)
    arguments = (query, key, value, None, None, None, 0.3, True, 5, None, implementation)
    checks.check_registered("attention", *arguments)


def test_the_transposed_output_is_contiguous() -> None:
    for implementation in TILED:
        assert package.attention(*_ones(5), implementation=implementation).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("implementation", TILED)
def test_documents_are_bit_equal_whatever_their_neighbours_hold(implementation: str) -> None:
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))
    documents = (torch.arange(40) >= 23).int()[None]
    others = tuple(torch.cat([torch.randn(1, 2, 23, 8), x[:, :, 23:]], 2) for x in (query, key, value))
    first, second = (
        package.attention(*given, documents=documents, implementation=implementation)
        for given in ((query, key, value), others)
    )
    assert torch.equal(first[:, :, 23:], second[:, :, 23:])
    assert not torch.equal(first[:, :, :23], second[:, :, :23])


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize(("implementation", "pattern"), [*itertools.product(TILED, ("documents", "window"))])
def test_4096_tokens_never_see_a_dense_mask(implementation: str, pattern: str) -> None:
    tokens = 4096
    options: dict[str, Any] = {"window": 128}
    if pattern == "documents":
        options = {"documents": (torch.arange(tokens) // 512)[None]}
    query, key, value = (torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3))
    with Largest() as seen:
        output = package.attention(query, key, value, implementation=implementation, **options)
        torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    # the scores of one tile and the mask of one window, and nothing near 4096 x 4096
    assert seen.elements <= 512 * 512


def test_bad_input_is_refused_with_a_sentence() -> None:
    query, key, value = _ones(6)
    for arguments, options, message in (
        ((query, key[:, :, :3], value[:, :, :3]), {}, "as many keys as queries"),
        ((query, key[..., :3], value), {}, r"expected \[B, H, S, D\]"),
        ((query, key, value), {"window": 3, "causal": False}, "window=3 with causal=False"),
        ((query, key, value), {"window": 0}, "at least 1"),
        ((query, key, value), {"sinks": torch.ones(5)}, r"expected \(2,\), one a head"),
        ((query, key, value), {"documents": torch.ones(6)}, r"expected \[B or 1, S\]"),
        ((query, key, value), {"implementation": "sdp"}, "Did you mean 'sdpa'"),
        ((query, key, value), {"implementation": "sdpa", "softcap": 2.0}, "sdpa: does not do soft-caps"),
        ((query, key, value), {"dropout_p": 0.5, "softcap": 2.0}, "does not do dropout"),
        ((query, key, value), {"mask": torch.ones(6, 6, requires_grad=True)}, "detach it"),
    ):
        with pytest.raises(ValueError, match=message):
            package.attention(*arguments, **options)


def test_auto_takes_the_fastest_and_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timings(kind: measure.Kind, names: tuple[str, ...]) -> dict[str, list[float]]:
        asked.append((kind, names))
        return {name: [1.0 - 0.3 * names.index(name)] * measure.ROUNDS for name in names}

    monkeypatch.setattr(measure, "timings", timings)
    monkeypatch.setattr(package, "_TILED", frozenset(package.BY_NAME))  # which one is called is told by its name
    called = []
    monkeypatch.setattr(package, "_call", lambda *inputs: called.append(inputs[-1]) or (inputs[0],))
    measure.fastest.cache_clear()
    package.attention(*_ones(7))  # the tests ask for deterministic algorithms, and a clock is none
    torch.use_deterministic_algorithms(False)
    for _ in range(2):
        package.attention(*_ones(7))
    package.attention(*_ones(7), among=("sdpa", "packed"))
    package.attention(*_ones(7), among=("packed",))
    package.attention(*_ones(7), softcap=3.0)
    torch.use_deterministic_algorithms(True)
    measure.fastest.cache_clear()
    assert called == ["sdpa", "torch", "torch", "packed", "packed", "torch"]
    assert [names for _, names in asked] == [("sdpa", "packed", "torch"), ("sdpa", "packed")]


@pytest.mark.parametrize(
    ("rounds", "chosen"),
    [([0.7, 0.7, 0.7, 0.7, 9.0], "torch"), ([0.7, 0.7, 0.7, 1.1, 1.2], "sdpa"), ([0.98] * 5, "sdpa")],
    ids=["one slow round", "noise", "too small a gain"],
)
def test_what_else_the_machine_does_decides_nothing(
    rounds: list[float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "timings", lambda kind, names: {"sdpa": [1.0, 1.0, 1.0, 5.0, 6.0], "torch": rounds})
    kind = measure.Kind(torch.device("cpu"), torch.float32, 2, (8, 8), 128, True, frozenset())
    assert measure.fastest.__wrapped__(kind, ("sdpa", "torch")) == chosen


@pytest.mark.parametrize("features", [frozenset(), frozenset({"windows"}), frozenset({"documents"})], ids=str)
def test_every_kind_of_call_can_be_timed(features: frozenset[str]) -> None:
    kind = measure.Kind(torch.device("cpu"), torch.float32, 2, (8, 8), 128, True, features)
    names = package.able("cpu", torch.float32, 8, features, tuple(package.BY_NAME))
    before = torch.get_rng_state()
    assert measure.fastest(kind, names) in names
    assert all(rounds[0] > 0 for rounds in measure.timings(kind, names).values())
    assert torch.equal(before, torch.get_rng_state())


def _ones(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (torch.ones(1, 2, tokens, 4) for _ in range(3))
    return query, key, value


def check_package(implementation: str, attention_package: ModuleType) -> None:
    """What a mutant must not survive: every branch, several tiles."""
    patterns = PATTERNS if implementation == "packed" else (*PATTERNS, *SCORES)
    for pattern in patterns:
        one = operation(implementation, attention_package=attention_package, **pattern)
        for shape in (SHAPES[0], SHAPES[2]):
            checks.check_shape(one, torch.float32, shape, draws=2)
    query, key, value = (x * 40 for x in operation("torch").draw(USUAL, torch.float32) if x is not None)
    checks.check_values(operation(implementation, attention_package=attention_package), (query, key, value))
    if implementation == "torch":
        sinks = torch.full((4,), 120.0)
        checks.check_values(
            operation("torch", sinks=True, attention_package=attention_package), (query, key, value, sinks)
        )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_caught(mutant, partial(check_package, "packed" if "packed" in mutant.file else "torch"), tmp_path)


@pytest.mark.parametrize("file", ["blocks.py", "packed.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"attention/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as attention_package:
        check_package("packed" if file == "packed.py" else "torch", attention_package)
