"""experts against its definition: values, gradients, properties, and mistakes that must be caught."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from automodel_accel.kernels import experts as package
from automodel_accel.kernels.experts import grouped
from tests.ops import checks
from tests.ops.allocations import Allocations
from tests.ops.mutants_experts import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

IMPLEMENTATIONS = package.KERNEL.names()
FLOAT32_SHARE = 1e-5


def clamped(packed: torch.Tensor) -> torch.Tensor:
    """A gate of the caller's own, interleaved and clamped."""
    gate, up = packed[..., ::2].clamp(max=2), packed[..., 1::2].clamp(-2, 2)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


@dataclass(frozen=True, slots=True)
class Form:
    """Options of a call, and its sizes beside those of the hidden states."""

    activation: str = "silu"
    layout: str = "gate_up"
    is_transposed: bool = False
    has_bias: bool = False
    own_gate: bool = False
    router: torch.dtype | None = None
    count: int = 5
    top_k: int = 2
    inner: int = 24

    def options(self) -> dict[str, Any]:
        """The keywords of the call."""
        options = {"activation": self.activation, "layout": self.layout, "is_transposed": self.is_transposed}
        return {**options, "gate": clamped if self.own_gate else None}

    def index(self, tokens: int) -> torch.Tensor:
        """The experts of each token, all different; the last one of several gets none."""
        generator = torch.Generator().manual_seed(tokens)
        chosen = self.count - 1 if self.count > self.top_k else self.count
        drawn = [torch.randperm(chosen, generator=generator)[: self.top_k] for _ in range(tokens)]
        return torch.stack(drawn) if drawn else torch.zeros(0, self.top_k, dtype=torch.int64)


MIXTRAL = Form()


def by_expert(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *leaves: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The definition, with the tokens of each expert in one product: torch's rounding of sums depends on how many there are."""
    up, down, *biases = leaves
    y = x.new_zeros(*index.shape, x.shape[1])
    for expert in range(up.shape[0]):
        token, slot = torch.where(index == expert)
        own = [tensor[expert : expert + 1] for tensor in (up, down, *biases)]
        y = y.index_put((token, slot), _one_expert(x[token], *own, **options))
    return (y * weights[..., None]).sum(1).to(x.dtype)


def _one_expert(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    flipped = (lambda w: w[0]) if options["is_transposed"] else (lambda w: w[0].T)
    inner = x @ flipped(up)
    inner = inner if up_bias is None else inner + up_bias
    gate, form = options["gate"], (options["activation"], options["layout"])
    y = (gate(inner) if gate else package.reference.activate(inner, *form)) @ flipped(down)
    return y if down_bias is None else y + down_bias


def operation(
    implementation: str,
    form: Form = MIXTRAL,
    experts_package: ModuleType = package,
) -> checks.Operation:
    """Experts with their options fixed: (hidden states, router's weights, up, down, biases)."""

    indices: dict[int, torch.Tensor] = {}

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        hidden = shape[-1]
        width = form.inner if form.layout == "plain" else 2 * form.inner
        up, down = (width, hidden), (hidden, form.inner)
        if form.is_transposed:
            up, down = up[::-1], down[::-1]
        tokens = torch.Size(shape[:-1]).numel()
        indices[tokens] = form.index(tokens).to(checks.DEVICE)
        top_k_weights = torch.rand(tokens, form.top_k, generator=generator) + 0.1
        drawn = [
            checks.normal(generator, (tokens, hidden), dtype),
            top_k_weights.to(form.router or dtype),
            (torch.randn(form.count, *up, generator=generator) * up[form.is_transposed - 1] ** -0.5).to(dtype),
            (torch.randn(form.count, *down, generator=generator) * form.inner**-0.5).to(dtype),
        ]
        biases = [checks.normal(generator, (form.count, size), dtype) for size in (width, hidden)]
        return (*drawn, *(biases if form.has_bias else ()))

    def call(function: Any, x: torch.Tensor, weights: torch.Tensor, *leaves: torch.Tensor, **more: str) -> torch.Tensor:
        return function(x, indices[x.shape[0]], weights, *leaves, **form.options(), **more)  # type: ignore[no-any-return]

    ours = partial(call, experts_package.experts, implementation=implementation)
    return checks.Operation(ours=ours, theirs=partial(call, by_expert), inputs=inputs)


# every branch: packed or not, both orientations, biases, a gate of the caller's, a router in float32, one expert of one
VARIANTS: dict[str, tuple[Form, torch.dtype]] = {
    "mixtral": (MIXTRAL, torch.bfloat16),
    "router in float32": (Form(router=torch.float32), torch.bfloat16),
    "transposed, biases": (Form(is_transposed=True, has_bias=True, layout="up_gate"), torch.float16),
    "own gate, biases": (Form(own_gate=True, has_bias=True), torch.bfloat16),
    "own gate, transposed": (Form(own_gate=True, is_transposed=True), torch.bfloat16),
    "no gate": (Form("relu2", "plain", has_bias=True), torch.bfloat16),
    "gelu, many experts": (Form("gelu", count=40, top_k=5), torch.bfloat16),
    "one expert": (Form("gelu_tanh", count=1, top_k=1), torch.bfloat16),
}
EVERY_OPTION = ("router in float32", "transposed, biases", "own gate, biases", "no gate")
SHAPES = ((1, 16), (7, 16), (19, 40), (3, 5), (0, 16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values(implementation: str, variant: str) -> None:
    form, dtype = VARIANTS[variant]
    checks.check_shape(operation(implementation, form), dtype, (7, 16), draws=16)
    checks.check_shape(operation(implementation, form), dtype, (19, 40), draws=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32(implementation: str, variant: str) -> None:
    form, _ = VARIANTS[variant]
    for shape in SHAPES:
        check_float32(operation(implementation, form), shape)


def check_float32(one: checks.Operation, shape: tuple[int, ...]) -> None:
    """Within 1e-5 of the largest element: how torch rounds a sum of float32 depends on how it is written."""
    for name, ours, _, truth in checks.results(one, one.draw(shape, torch.float32)):
        largest = truth.abs().max().item() if truth.numel() else 0.0
        torch.testing.assert_close(ours, truth.float(), rtol=0, atol=FLOAT32_SHARE * largest, msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "check", [checks.check_backward_twice, checks.check_repeatable], ids=lambda check: check.__name__
)
@pytest.mark.parametrize("variant", EVERY_OPTION)
def test_properties(implementation: str, check: checks.Check, variant: str) -> None:
    form, dtype = VARIANTS[variant]
    check(operation(implementation, form), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_second_differentiation_is_refused(implementation: str) -> None:
    checks.check_double_backward(operation(implementation), torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", EVERY_OPTION)
def test_frozen_inputs(implementation: str, variant: str) -> None:
    """Each input may be the only one that needs a gradient, or the only one that needs none."""
    form, dtype = VARIANTS[variant]
    one = operation(implementation, form)
    inputs = one.draw((5, 16), dtype)
    everything = checks.floating(inputs)
    output, *expected = checks.differentiate(one.ours, inputs, everything)
    for index in everything:
        for wanted in ([index], [other for other in everything if other != index]):
            found = checks.differentiate(one.ours, inputs, wanted, checks.grad_output_for(output))
            assert all(map(torch.equal, found, [output, *(expected[i] for i in wanted)]))
    assert not one.ours(*inputs).requires_grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", EVERY_OPTION)
def test_nothing_is_overwritten(implementation: str, variant: str) -> None:
    form, dtype = VARIANTS[variant]
    one = operation(implementation, form)
    inputs = one.draw((5, 16), dtype)
    leaves = [checks._tensor(x).clone().requires_grad_() for x in inputs]
    output = one.ours(*leaves)
    grad_output = checks.grad_output_for(output)
    visible = [*leaves, grad_output, output]
    before = [x.detach().clone() for x in visible]
    torch.autograd.grad(output, leaves, grad_output)
    assert all(torch.equal(x, was) for x, was in zip(visible, before, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", EVERY_OPTION)
def test_strided_inputs_and_incoming_gradients(implementation: str, variant: str) -> None:
    """In float32, by the rule of `check_float32`: torch's products add up in another order where a factor is strided."""
    form, _ = VARIANTS[variant]
    one = operation(implementation, form)
    inputs = one.draw((7, 16), torch.float32)
    everything = checks.floating(inputs)
    grad_output = checks.grad_output_for(one.theirs(*inputs))
    expected = checks.differentiate(one.ours, inputs, everything, grad_output)
    for index in everything:
        for laid_out in checks.layouts(checks._tensor(inputs[index])):
            given = tuple(laid_out if i == index else x for i, x in enumerate(inputs))
            for found, wanted in zip(checks.differentiate(one.ours, given, everything, grad_output), expected):
                atol = FLOAT32_SHARE * wanted.abs().max().item()
                torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
    for laid_out in checks.layouts(grad_output):
        assert all(map(torch.equal, checks.differentiate(one.ours, inputs, everything, laid_out), expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(
    tokens=st.integers(0, 9),
    hidden=st.integers(1, 40),
    count=st.integers(1, 9),
    inner=st.integers(1, 30),
    variant=st.sampled_from(sorted(VARIANTS)),
    data=st.data(),
)
def test_drawn_sizes(
    implementation: str, tokens: int, hidden: int, count: int, inner: int, variant: str, data: st.DataObject
) -> None:
    form, _ = VARIANTS[variant]
    top_k = data.draw(st.integers(1, count))
    sized = Form(
        form.activation, form.layout, form.is_transposed, form.has_bias, form.own_gate, form.router, count, top_k, inner
    )
    check_float32(operation(implementation, sized), (tokens, hidden))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", EVERY_OPTION)
def test_compiled(implementation: str, variant: str) -> None:
    torch._dynamo.reset()
    checks.check_compiled(operation(implementation, VARIANTS[variant][0]))


def opcheck(name: str, *arguments: Any) -> None:
    """Torch's own checks, with a gradient for every floating input."""
    wanted = tuple(
        x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in arguments
    )
    library.opcheck(getattr(torch.ops.automodel_accel, name).default, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_definition_is_each_expert_on_its_own_tokens(variant: str) -> None:
    form, _ = VARIANTS[variant]
    x, weights, *leaves = (
        checks._tensor(tensor).double() for tensor in operation("torch", form).draw((9, 16), torch.float32)
    )
    arguments = (x, form.index(9).to(x.device), weights, *leaves)
    expected = by_expert(*arguments, **form.options())
    torch.testing.assert_close(package.reference.experts(*arguments, **form.options()), expected)
    ours = package.experts(*arguments, **form.options(), implementation="torch")
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_registered(implementation: str) -> None:
    form = Form(has_bias=True)
    x, weights, up, down, up_bias, down_bias = operation(implementation, form).draw((4, 16), torch.float32)
    routing = package.route(form.index(4).to(checks.DEVICE), form.count)
    opcheck("experts_up", x, up, up_bias, *routing, False, implementation)
    inner = torch.randn(8, 48, device=checks.DEVICE)
    named = ("silu", "gate_up", False, torch.float32, implementation)
    opcheck("experts_down", inner, down, down_bias, weights, *routing, *named)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_without_tokens_has_gradients_of_zero(implementation: str) -> None:
    form = Form(has_bias=True)
    one = operation(implementation, form)
    inputs = one.draw((6, 16), torch.float32)
    _, _, _, *of_experts = checks.differentiate(one.ours, inputs, checks.floating(inputs))
    for grad in of_experts:
        assert grad.shape[0] == form.count
        assert grad[:-1].abs().sum() > 0
        assert not grad[-1].any()


def test_what_is_saved_is_the_hidden_states_and_the_first_product() -> None:
    tokens, hidden, form = 32, 64, Form(inner=128)
    one = operation("torch", form)
    inputs = [checks._tensor(x).requires_grad_() for x in one.draw((tokens, hidden), torch.float32)]
    own, saved = {x.data_ptr() for x in inputs}, dict[int, int]()

    def note(x: torch.Tensor) -> torch.Tensor:
        saved[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        one.ours(*inputs)
    rows = tokens * form.top_k
    numbers = 3 * rows * 8 + form.count * 4  # expert, order, inverse and offsets
    assert sum(size for address, size in saved.items() if address not in own) == rows * 2 * form.inner * 4 + numbers


def test_routing_sorts_by_expert_and_asks_nothing_of_the_host() -> None:
    index = torch.tensor([[2, 0], [0, 3], [3, 2]])
    with Allocations() as watched:
        routing = package.route(index, 5)
    assert routing.order.tolist() == [1, 2, 0, 5, 3, 4]
    assert routing.inverse[routing.order].tolist() == list(range(6))
    assert routing.offsets.tolist() == [2, 2, 4, 6, 6]
    forbidden = ("item", "_local_scalar_dense", "nonzero", "unique", "bincount")
    assert not [name for name in watched.operations if any(word in name for word in forbidden)]


def test_grouped_products_by_group() -> None:
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 3, 4, dtype=torch.float64)
    expected = torch.cat([x[:2] @ weight[0], x[2:] @ weight[2]])
    torch.testing.assert_close(grouped.multiply(x, weight, offsets), expected)
    sums = grouped.outer(x, expected, offsets)
    torch.testing.assert_close(sums[0], x[:2].T @ expected[:2])
    assert not sums[1].any()
    torch.testing.assert_close(sums[2], x[2:].T @ expected[2:])


def test_bad_input_is_refused_with_a_sentence() -> None:
    x, weights, up, down = operation("torch").draw((4, 16), torch.float32)
    index = Form().index(4).to(checks.DEVICE)
    arguments: tuple[Any, ...] = (x, index, weights, up, down)
    call = partial(package.experts, implementation="torch")
    with pytest.raises(ValueError, match=r"unknown activation 'siluu'. Did you mean 'silu'"):
        call(*arguments, activation="siluu")
    with pytest.raises(ValueError, match=r"unknown activation 'relu2'.* Known: silu, gelu, gelu_tanh"):
        call(*arguments, activation="relu2")
    with pytest.raises(ValueError, match=r"unknown layout 'gateup'. Did you mean 'gate_up'"):
        call(*arguments, layout="gateup")
    with pytest.raises(ValueError, match=r"hidden_states are \(1, 4, 16\), top_k_index is \(4, 2\); expected \[T, D\]"):
        call(x[None], index, weights, up, down)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"top_k_weights are \(4, 1\), top_k_index is \(4, 2\)"):
        call(x, index, weights[:, :1], up, down)  # type: ignore[index]
    with pytest.raises(
        ValueError, match=r"up is \(5, 48, 16\) torch.float32, down is \(5, 16, 24\) torch.bfloat16; expected one"
    ):
        call(x, index, weights, up, down.bfloat16())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="Did you mean 'torch'"):
        package.experts(*arguments, implementation="tourch")


def check_package(implementation: str, experts_package: ModuleType) -> None:
    """What a mutant must not survive: every branch, rows of several tiles, groups of several blocks of rows."""
    for form, _ in VARIANTS.values():
        check_float32(operation(implementation, form, experts_package), (7, 16))
    for form in (MIXTRAL, Form(has_bias=True, is_transposed=True)):
        wide = Form(form.activation, form.layout, form.is_transposed, form.has_bias, count=3, inner=1100)
        check_float32(operation(implementation, wide, experts_package), (5, 16))
    many = operation(implementation, Form(count=2, has_bias=True), experts_package)
    check_float32(many, (70, 8))
    checks.check_shape(many, torch.bfloat16, (7, 16), draws=1)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    implementation = "torch" if "eager" in mutant.file else "triton"
    check_caught(mutant, partial(check_package, implementation), tmp_path)


@pytest.mark.parametrize("file", ["fused.py", "eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"experts/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as experts_package:
        check_package("torch" if file == "eager.py" else "triton", experts_package)
