"""Which cases a run has: the whole list on a GPU, what takes seconds on a CPU, and almost nothing with --quick."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from automodel_accel.kernels.contract import unknown_name
from bench.case import Case, Operation, Sizes
from bench.models import MODELS
from bench.operations import OPERATIONS

TOKENS = (512, 2048, 8192, 32768)
TYPICAL = 8192
ALL_LENGTHS = ("Llama-3-8B", "GPT-2-XL")  # measured at every number of tokens; all others at the typical one
ALL_IGNORED = ("Llama-3.2-1B",)  # measured with every share of ignored labels
ON_CPU = ("Qwen3-0.6B", "Gemma-2-2B", "GPT-2-XL")
CPU_TOKENS = 512
QUICK = ("Qwen3-0.6B", "GPT-2-XL")
QUICK_TOKENS = 64
LINEAR = dict.fromkeys(("in_features", "out_features", "out_features_2", "out_features_3"), 16)
QUICK_DIVISORS = {"hidden": 8, "intermediate": 8, "vocab": 64, "heads": 4, "key_heads": 4, **LINEAR}


def pick(names: Sequence[str]) -> list[Operation]:
    """The operations of these names, all for none.

    Raises:
        ValueError: there is no such operation.
    """
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(unknown_name("operation", name, OPERATIONS))
    return [OPERATIONS[name] for name in names or OPERATIONS]


def cases(
    operation: Operation,
    device: str,
    dtype: str,
    models: Sequence[str] = (),
    tokens: Sequence[int] = (),
    quick: bool = False,
) -> list[Case]:
    """The cases of an operation, the most telling one first.

    Args:
        operation: Which.
        device: "cuda" or "cpu"; on a CPU sizes are cut, and each case says how.
        dtype: Of the activations.
        models: Only these; where given, at every number of tokens that is asked for.
        tokens: Only these numbers of tokens.
        quick: Sizes that take no time, to see that it works.

    Raises:
        ValueError: there is no such model.
    """
    for name in models:
        if name not in MODELS:
            raise ValueError(unknown_name("model", name, MODELS))
    found = []
    for name in operation.models:
        if models and name not in models:
            continue
        for length, ignored in _variations(operation, name, device, quick, bool(models), tokens):
            parts = (operation.parts or (lambda model: (operation.sizes(model),)))(MODELS[name])
            for part in parts:
                found += with_beside(operation, _case(operation, name, part, device, dtype, length, ignored, quick))
    return sorted(found, key=lambda case: case.model not in ALL_LENGTHS or case.sizes["tokens"] != TYPICAL)


def custom(operation: Operation, sizes: Sizes, dtype: str) -> Case:
    """One case of sizes of your own, with the options of the operation's first model."""
    return Case(operation.name, "custom", dict(sizes), operation.options(MODELS[operation.models[0]]), dtype)


def with_beside(operation: Operation, case: Case) -> list[Case]:
    """The case, and the one that is measured beside it."""
    return [case, replace(case, sizes={**case.sizes, **operation.beside})] if operation.beside else [case]


def _variations(
    operation: Operation, model: str, device: str, quick: bool, named: bool, tokens: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """(tokens, share of ignored labels) of a model's cases."""
    if quick or device == "cpu":
        few = [name for name in (QUICK if quick else ON_CPU) if name in operation.models] or operation.models[:1]
        if not named and model not in few:
            return
        for length in tokens or (QUICK_TOKENS if quick else CPU_TOKENS,):
            one = quick or model != ON_CPU[0]
            yield from ((length, ignored) for ignored in (operation.ignored[:1] if one else operation.ignored))
        return
    lengths = tokens or (TOKENS if named or model in ALL_LENGTHS else (TYPICAL,))
    for length in lengths:
        every = model in ALL_IGNORED or (named and length == TYPICAL)
        yield from ((length, ignored) for ignored in (operation.ignored if every else operation.ignored[:1]))


def _case(
    operation: Operation,
    model: str,
    part: Sizes,
    device: str,
    dtype: str,
    tokens: int,
    ignored: float,
    quick: bool,
) -> Case:
    sizes: dict[str, int | float] = {"tokens": tokens, **part}
    divisors = QUICK_DIVISORS if quick else operation.cpu_cut if device == "cpu" else {}
    cuts = []
    for name, divisor in divisors.items():
        if name in sizes:
            whole, sizes[name] = sizes[name], max(int(sizes[name]) // divisor, 1)
            cuts.append(f"{name} {whole} -> {sizes[name]}")
    if "ignored" in operation.custom:
        sizes["ignored"] = ignored
    return Case(operation.name, model, sizes, operation.options(MODELS[model]), dtype, ", ".join(cuts))
