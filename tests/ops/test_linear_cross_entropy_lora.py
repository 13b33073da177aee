"""linear_cross_entropy with a low-rank term, as a LoRA'd head has it."""

import pytest
import torch

from automodel_accel.kernels import linear_cross_entropy as package
from tests.ops import checks
from tests.ops.checks_linear_cross_entropy import (
    EXACT,
    IMPLEMENTATIONS,
    LOW_RANK,
    Options,
    check_low_rank_details,
    check_low_rank_memory,
    check_values,
    operation,
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("options", LOW_RANK.values(), ids=LOW_RANK.keys())
def test_every_option(implementation: str, dtype: torch.dtype, options: Options) -> None:
    one = operation(implementation, **options)
    if dtype == torch.float32:
        check_values(one, dtype)
    else:  # the sum of two products is rounded at other places than in torch: luck takes many draws to even out
        checks.check_shape(one, dtype, (9, 16), draws=64 if implementation == "torch" else 12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check", EXACT)
@pytest.mark.parametrize("wide", [False, True])
def test_properties(implementation: str, check: checks.Check, wide: bool) -> None:
    for dtype in checks.DTYPES:
        check(operation(implementation, rank=3, wide=wide, softcap=2.0), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_details(implementation: str) -> None:
    check_low_rank_details(implementation)


def test_memory() -> None:
    check_low_rank_memory(
        "torch" if checks.DEVICE == "cpu" else "triton"
    )  # Triton's interpreter copies what it is given


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_shapes(implementation: str, rows: int) -> None:
    for vocab in (1, 2, 1000):
        checks.check_shape(
            operation(implementation, vocab, rank=2, reduction="none"), torch.bfloat16, (rows, 8), draws=32
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled(implementation: str) -> None:
    checks.check_compiled(operation(implementation, rank=2))


def test_gradients_by_finite_differences() -> None:
    for options in (LOW_RANK["everything"], LOW_RANK["two rows a chunk"]):
        one = operation("torch", 7, **options)
        hidden, weight, bias, target, *low_rank = one.draw((5, 3), torch.float64)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias, *low_rank) if x is not None]
        assert torch.autograd.gradcheck(lambda h, w, b, *more: one.ours(h, w, b, target, *more), leaves)  # noqa: B023


WRONG: tuple[tuple[Options, str], ...] = (
    ({"lora_x": torch.ones(3, 2)}, "one of lora_x and lora_b is missing; expected both, or neither"),
    ({"lora_b": torch.ones(7, 2)}, "one of lora_x and lora_b is missing; expected both, or neither"),
    (
        {"lora_x": torch.ones(4, 2), "lora_b": torch.ones(7, 2)},
        r"lora_x is \(4, 2\) .*, expected \(3, R\) torch.float32",
    ),
    (
        {"lora_x": torch.ones(3, 2).bfloat16(), "lora_b": torch.ones(7, 2).bfloat16()},
        r"lora_x is \(3, 2\) torch.bfloat16 .*, expected \(3, R\) torch.float32",
    ),
    (
        {"lora_x": torch.ones(3, 2), "lora_b": torch.ones(7, 3)},
        r"lora_b is \(7, 3\) .*, expected \(7, 2\) torch.float32",
    ),
    (
        {"lora_x": torch.ones(3, 2), "lora_b": torch.ones(7, 2).double()},
        r"lora_b is .* torch.float64 .*, expected \(7, 2\) torch.float32, as lora_x \(3, 2\)",
    ),
)


@pytest.mark.skipif(checks.DEVICE != "cpu", reason="the tensors are on the CPU")
@pytest.mark.parametrize(("low_rank", "sentence"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_refused_with_a_sentence(low_rank: Options, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        package.linear_cross_entropy(torch.ones(3, 8), torch.ones(7, 8), torch.arange(3), **low_rank)
