"""What every operation is held to, whatever implements it: one function a property, `check_everything` for all of them.

An `Operation` names ours, theirs (the reference) and a maker of inputs. Every comparison of values is `numerics.judge` against the
reference in float64; the other properties (nothing overwritten, repeatable, once differentiable...) are exact.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import library

from automodel_accel.kernels.numerics import judge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows and lengths that divide nothing, one element, no row at all; few programs, for the interpreter takes 1 ms for each
SHAPES = ((2, 4, 64), (1, 1), (3, 7), (5, 63), (2, 3, 100), (7, 257), (2, 1000), (33, 3), (0, 8), (2, 0, 5), (9,))

Tensors = tuple[torch.Tensor | None, ...]
Check = Callable[["Operation", torch.dtype], None]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation with its options fixed.

    Attributes:
        ours: The implementation under test, (*inputs) -> output.
        theirs: The reference, likewise.
        inputs: (generator, shape of the activations, dtype of the activations) -> inputs on the CPU; None for an absent one.
        activations: How many leading inputs are activations [..., H]; the others are parameters.
    """

    ours: Callable[..., torch.Tensor]
    theirs: Callable[..., torch.Tensor]
    inputs: Callable[[torch.Generator, tuple[int, ...], torch.dtype], Tensors]
    activations: int = 1

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensors:
        """Inputs on the tested device; the same for the same seed."""
        inputs = self.inputs(torch.Generator().manual_seed(seed), shape, dtype)
        return tuple(None if x is None else x.to(DEVICE) for x in inputs)


class Result(NamedTuple):
    """One output or gradient, three times."""

    name: str
    ours: torch.Tensor
    theirs: torch.Tensor
    truth: torch.Tensor


def normal(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Standard normal values, on the CPU."""
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def check_everything(operation: Operation, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
    """All properties, the most telling first."""
    for shape in shapes:
        check_shape(operation, dtype, shape)
    for check in PROPERTIES:
        check(operation, dtype)


def check_shape(operation: Operation, dtype: torch.dtype, shape: tuple[int, ...], draws: int | None = None) -> None:
    """Values at one shape; over several draws where it has few elements, lest luck decide."""
    draws = draws or min(max(256 // max(math.prod(shape), 1), 1), 16)
    judge_results([results(operation, operation.draw(shape, dtype, seed)) for seed in range(draws)])


def check_values(
    operation: Operation,
    inputs: Tensors,
    grad_output: torch.Tensor | None = None,
    wanted: Sequence[int] | None = None,
) -> None:
    """The output and the gradient of every input in `wanted` (of all floating ones where None) pass `judge`."""
    judge_results([results(operation, inputs, grad_output, wanted)])


def results(
    operation: Operation,
    inputs: Tensors,
    grad_output: torch.Tensor | None = None,
    wanted: Sequence[int] | None = None,
) -> list[Result]:
    wanted = floating(inputs) if wanted is None else wanted
    ours = differentiate(operation.ours, inputs, wanted, grad_output)
    grad_output = grad_output_for(
        ours[0], grad_output
    ).contiguous()  # torch's own precision depends on strides: ours must not
    plain = tuple(x if x is None else x.contiguous() for x in inputs)
    theirs = differentiate(operation.theirs, plain, wanted, grad_output)
    wide = tuple(x.double() if x is not None and x.is_floating_point() else x for x in plain)
    truth = differentiate(operation.theirs, wide, wanted, grad_output.double())
    names = ["output", *(f"gradient of input {index}" for index in wanted)]
    return [Result(*result) for result in zip(names, ours, theirs, truth, strict=True)]


def floating(inputs: Tensors) -> list[int]:
    """Positions of the inputs that can have a gradient."""
    return [i for i, x in enumerate(inputs) if x is not None and x.is_floating_point()]


def differentiate(
    function: Callable[..., torch.Tensor],
    inputs: Tensors,
    wanted: Sequence[int],
    grad_output: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The output, then the gradients of the wanted inputs; the strides of inputs and incoming gradient are kept."""
    leaves = _leaves(inputs, wanted)
    output = function(*leaves)
    if not wanted:
        return [output]
    variables = [_tensor(leaves[i]) for i in wanted]
    grads = torch.autograd.grad(output, variables, grad_output_for(output, grad_output), allow_unused=True)
    assert all(grad is not None for grad in grads), "an input that needs a gradient has none"
    return [output.detach(), *grads]


def _leaves(inputs: Tensors, wanted: Sequence[int]) -> Tensors:
    return tuple(x if x is None else x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs))


def _tensor(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return x


def grad_output_for(output: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
    """The given incoming gradient, or a random one that the output's shape alone decides."""
    if given is not None:
        return given
    return normal(torch.Generator().manual_seed(1), output.shape, output.dtype).to(output.device)


def judge_results(draws: list[list[Result]]) -> None:
    """Judge the finite values; where the truth is infinite or NaN, ours is that or what torch makes of it; shape and dtype agree."""
    for same in zip(*draws, strict=True):
        for name, ours, theirs, _ in same:
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), f"{name}: {ours.shape} {ours.dtype}"
        ours, theirs, truth = (torch.cat([result[i].flatten() for result in same]) for i in (1, 2, 3))
        undefined = ~truth.isfinite()
        as_torch = (ours == theirs) | (ours.isnan() & theirs.isnan())
        as_truth = (ours == truth) | (ours.isnan() & truth.isnan())
        what = f"{same[0].name} of {tuple(same[0].ours.shape)} {ours.dtype}"
        assert (as_torch | as_truth)[undefined].all(), (
            f"{what}: {ours[undefined]} where the truth is {truth[undefined]}"
        )
        judged = ~undefined & theirs.isfinite()
        verdict = judge(ours[judged], theirs[judged], truth[judged])
        assert verdict.passed, f"{what}: {verdict}"


def check_magnitudes(operation: Operation, dtype: torch.dtype) -> None:
    """Activations up to 1e4 and down to 1e-8, all equal in a row, all zero; a gradient of 1e4, of 1e-4 and of zero."""
    inputs = operation.draw((6, 200), dtype)
    for change in (
        lambda x: x * 1e4 / x.abs().max(),
        lambda x: x * 1e-2,
        lambda x: x * 1e-4,
        lambda x: x * 1e-8,
        lambda x: x[:, :1].expand_as(x),
        torch.zeros_like,
    ):
        check_values(operation, _on_activations(operation, inputs, change))
    output = operation.theirs(*inputs)
    for scale in (1e4, 1e-4, 0.0):
        check_values(operation, inputs, grad_output_for(output, None) * scale)


def _on_activations(operation: Operation, inputs: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    return tuple(change(_tensor(x)) if i < operation.activations else x for i, x in enumerate(inputs))


def check_not_finite(operation: Operation, dtype: torch.dtype) -> None:
    """One NaN or infinity, in each input and in the incoming gradient, reaches what it reaches in torch, and nothing else."""
    inputs = operation.draw((4, 50), dtype)
    for value, index in itertools.product((float("nan"), float("inf"), -float("inf")), floating(inputs)):
        check_values(operation, tuple(_poisoned(x, value) if i == index else x for i, x in enumerate(inputs)))
    check_values(operation, inputs, _poisoned(grad_output_for(operation.theirs(*inputs), None), float("nan")))


def _poisoned(x: torch.Tensor | None, value: float) -> torch.Tensor:
    x = _tensor(x).clone(memory_format=torch.contiguous_format)
    x.view(-1)[x.numel() // 2] = value
    return x


def layouts(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values of `x` [..., H] in other memory: columns of a wider tensor (the rest NaN), every other column, transposed, off by one."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 7), float("nan"))
    yield wide[..., 4:-3].copy_(x)
    yield x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))[..., ::2].copy_(x)
    yield x.new_full(x.shape[::-1], float("nan")).permute(*reversed(range(x.dim()))).copy_(x)
    yield x.new_full((x.numel() + 1,), float("nan"))[1:].view(x.shape).copy_(x)


def check_layouts(operation: Operation, dtype: torch.dtype) -> None:
    """Inputs and incoming gradients that are strided, transposed, misaligned or expanded."""
    inputs = operation.draw((2, 3, 100), dtype)
    grad_output = grad_output_for(operation.theirs(*inputs), None)
    for index in floating(inputs):
        for laid_out in layouts(_tensor(inputs[index])):
            check_values(operation, tuple(laid_out if i == index else x for i, x in enumerate(inputs)), grad_output)
        first = _tensor(inputs[index])[..., :1].expand_as(_tensor(inputs[index]))
        check_values(operation, tuple(first if i == index else x for i, x in enumerate(inputs)), grad_output)
    rows = _on_activations(operation, inputs, lambda x: x[:, :1].expand_as(x))
    for laid_out in (*layouts(grad_output), torch.ones_like(grad_output[..., :1]).expand_as(grad_output)):
        check_values(operation, inputs, laid_out)
        check_values(operation, rows, laid_out)


def check_nothing_overwritten(operation: Operation, dtype: torch.dtype) -> None:
    """Inputs and incoming gradient are the same bits afterwards, and no result shares memory with them or with another."""
    inputs = operation.draw((5, 100), dtype)
    wanted, leaves = floating(inputs), _leaves(inputs, floating(inputs))
    output = operation.ours(*leaves)
    grad_output = grad_output_for(output, None)
    visible = [_tensor(inputs[i]) for i in wanted] + [grad_output, output.detach()]
    before = [x.clone() for x in visible]
    grads = torch.autograd.grad(output, [_tensor(leaves[i]) for i in wanted], grad_output)
    assert all(torch.equal(x, was) for x, was in zip(visible, before, strict=True)), (
        "a tensor of the caller was overwritten"
    )
    memory = [x.untyped_storage().data_ptr() for x in (*visible, *grads)]
    assert len(set(memory)) == len(memory), "two results, or a result and an input, share memory"


def check_backward_twice(operation: Operation, dtype: torch.dtype) -> None:
    """With retain_graph the second backward gives the bits of the first."""
    inputs = operation.draw((5, 100), dtype)
    leaves = _leaves(inputs, floating(inputs))
    output = operation.ours(*leaves)
    wanted = [_tensor(leaves[i]) for i in floating(inputs)]
    first = torch.autograd.grad(output, wanted, grad_output_for(output, None), retain_graph=True)
    second = torch.autograd.grad(output, wanted, grad_output_for(output, None))
    assert all(map(torch.equal, first, second)), "the second backward of one forward differs"


def check_repeatable(operation: Operation, dtype: torch.dtype) -> None:
    """The same call gives the same bits."""
    inputs = operation.draw((33, 100), dtype)
    first, second = (differentiate(operation.ours, inputs, floating(inputs)) for _ in range(2))
    assert all(map(torch.equal, first, second)), "two equal calls give different results"


def check_frozen_inputs(operation: Operation, dtype: torch.dtype) -> None:
    """Each subset of the inputs may need a gradient, and only these get one."""
    inputs = operation.draw((5, 100), dtype)
    for count in range(len(floating(inputs))):
        for wanted in itertools.combinations(floating(inputs), count):
            check_values(operation, inputs, wanted=wanted)
    assert not operation.ours(*inputs).requires_grad


def check_double_backward(operation: Operation, dtype: torch.dtype) -> None:
    """A gradient to be differentiated again is refused; it never comes without its graph."""
    inputs = operation.draw((5, 100), dtype)
    leaves = _leaves(inputs, floating(inputs))
    wanted = [_tensor(leaves[i]) for i in floating(inputs)]
    output = operation.ours(*leaves).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(output, wanted, create_graph=True)


def check_rounding(operation: Operation, dtype: torch.dtype) -> None:
    """The output is rounded where torch rounds it: its bits are torch's, but for the rare value that lies next to a tie."""
    inputs = operation.draw((16, 256), dtype)
    same = (operation.ours(*inputs) == operation.theirs(*inputs)).float().mean().item()
    assert dtype == torch.float32 or same > 0.99, f"{1 - same:.1%} of the output is rounded elsewhere than in torch"


PROPERTIES: tuple[Check, ...] = (
    check_rounding,
    check_magnitudes,
    check_layouts,
    check_not_finite,
    check_frozen_inputs,
    check_nothing_overwritten,
    check_backward_twice,
    check_repeatable,
    check_double_backward,
)


def check_compiled(operation: Operation) -> None:
    """Under torch.compile, without a graph break, output and gradients are the bits of the eager call."""
    inputs = operation.draw((3, 20), torch.float32)
    compiled = torch.compile(operation.ours, backend="aot_eager", fullgraph=True)
    eager, traced = (differentiate(function, inputs, floating(inputs)) for function in (operation.ours, compiled))
    assert all(map(torch.equal, eager, traced)), "torch.compile changes the result"


def check_registered(name: str, *arguments: Any) -> None:
    """The registered operation passes torch's own checks: schema, fake implementation, autograd, tracing."""
    wanted = tuple(x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments)
    library.opcheck(getattr(torch.ops.automodel_accel, name).default, wanted)


def check_functorch(operation: Operation) -> None:
    """Transforms of `torch.func`, which no implementation serves, say so."""
    x, *others = operation.draw((3, 20), torch.float32)
    call = lambda x: operation.ours(x, *others)  # noqa: E731
    for transform in (
        lambda: torch.func.vmap(call)(_tensor(x)[None]),
        lambda: torch.func.jvp(call, (x,), (x,)),
        lambda: torch.func.grad(lambda x: call(x).sum())(x),
    ):
        with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
            transform()
