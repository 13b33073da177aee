"""Input that is degenerate, poisoned or does not fit, given to every operation: the same few rules for all of them."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from automodel_accel.kernels import (
    activation,
    attention,
    contract,
    cross_entropy,
    experts,
    gated_linear,
    gated_norm,
    layer_norm,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    rope,
)
from tests.ops import checks
from tests.ops.test_contract import CPU, H100

EPS = 0.5  # large, so that the norm of one element is no constant
VOCAB, IGNORED = 11, -100
Maker = Callable[[str], checks.Operation]


def both(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The outputs of an operation one after another."""
    return torch.cat([output.flatten() for output in outputs])


def made(
    kernel_inputs: Callable[[int, int], tuple[tuple[int, ...], ...]],
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
) -> Maker:
    """An operation for (N, H): the shapes of its inputs, and the two functions of them; ours also takes an implementation."""

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        return tuple(checks.normal(generator, size, dtype) for size in kernel_inputs(*shape))

    def make(implementation: str) -> checks.Operation:
        return checks.Operation(lambda *x: ours(*x, implementation=implementation), theirs, inputs)

    return make


def targets(rows: torch.Tensor, classes: int) -> torch.Tensor:
    """A class for each row."""
    return torch.arange(rows.shape[0], device=rows.device) % classes


def tables(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [S, R]."""
    angles = torch.arange(q.shape[2] * q.shape[3], device=q.device).view(q.shape[2:])
    return angles.cos().to(q.dtype), angles.sin().to(q.dtype)


def routed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts for each token, and their weights."""
    tokens = torch.arange(x.shape[0], device=x.device)
    index = torch.stack((tokens % 3, (tokens + 1) % 3), 1)
    return index, torch.full(index.shape, 0.5, dtype=x.dtype, device=x.device)


OPERATIONS: Mapping[str, Maker] = {
    "rms_norm": made(
        lambda n, h: ((n, h), (h,)),
        lambda x, w, **o: rms_norm.rms_norm(x, w, EPS, **o),
        lambda x, w: rms_norm.reference.rms_norm(x, w, EPS),
    ),
    "add_rms_norm": made(
        lambda n, h: ((n, h), (n, h), (h,)),
        lambda x, r, w, **o: both(rms_norm.add_rms_norm(x, r, w, EPS, **o)),
        lambda x, r, w: both(rms_norm.reference.add_rms_norm(x, r, w, EPS)),
    ),
    "layer_norm": made(
        lambda n, h: ((n, h), (h,), (h,)),
        lambda x, w, b, **o: layer_norm.layer_norm(x, w, b, EPS, **o),
        lambda x, w, b: layer_norm.reference.layer_norm(x, w, b, EPS),
    ),
    "add_layer_norm": made(
        lambda n, h: ((n, h), (n, h), (h,), (h,)),
        lambda x, r, w, b, **o: both(layer_norm.add_layer_norm(x, r, w, b, EPS, **o)),
        lambda x, r, w, b: both(layer_norm.reference.add_layer_norm(x, r, w, b, EPS)),
    ),
    "gated_rms_norm": made(
        lambda n, h: ((n, h), (n, h), (h,)),
        lambda x, g, w, **o: gated_norm.gated_rms_norm(x, g, w, EPS, **o),
        lambda x, g, w: gated_norm.reference.gated_rms_norm(x, g, w, EPS),
    ),
    "gated_linear": made(
        lambda n, h: ((n, h), (n, h)),
        lambda g, u, **o: gated_linear.gated_linear(g, u, **o),
        lambda g, u: gated_linear.reference.gated_linear(g, u),
    ),
    "activation": made(
        lambda n, h: ((n, h),),
        lambda x, **o: activation.activation(x, "relu2", **o),
        lambda x: activation.reference.activation(x, "relu2"),
    ),
    "rope": made(
        lambda n, h: ((1, 2, n, 2 * h), (1, 1, n, 2 * h)),
        lambda q, k, **o: both(rope.rope(q, k, *tables(q), **o)),  # type: ignore[arg-type]
        lambda q, k: both(tuple(rope.reference.rotate(x, *tables(q)) for x in (q, k))),
    ),
    "qk_norm_rope": made(
        lambda n, h: ((1, 2, n, 2 * h), (1, 1, n, 2 * h), (2 * h,), (2 * h,)),
        lambda q, k, v, w, **o: both(qk_norm_rope.qk_norm_rope(q, k, v, w, *tables(q), EPS, **o)),
        lambda q, k, v, w: both(
            tuple(qk_norm_rope.reference.normalise_and_rotate(*side, *tables(q), EPS) for side in ((q, v), (k, w)))
        ),
    ),
    "cross_entropy": made(
        lambda n, h: ((n, h),),
        lambda z, **o: cross_entropy.cross_entropy(z, targets(z, z.shape[1]), reduction="none", **o),
        lambda z: cross_entropy.reference.cross_entropy(z, targets(z, z.shape[1]), reduction="none"),
    ),
    "linear_cross_entropy": made(
        lambda n, h: ((n, h), (VOCAB, h)),
        lambda x, w, **o: linear_cross_entropy.linear_cross_entropy(x, w, targets(x, VOCAB), reduction="sum", **o),
        lambda x, w: linear_cross_entropy.reference.linear_cross_entropy(x, w, targets(x, VOCAB), reduction="sum"),
    ),
    "attention": made(
        lambda n, h: ((1, 2, n, h), (1, 1, n, h), (1, 1, n, h)),
        lambda q, k, v, **o: attention.attention(q, k, v, **o),
        lambda q, k, v: attention.reference.attention(q, k, v, q.shape[-1] ** -0.5, True),
    ),
    "experts": made(
        lambda n, h: ((n, h), (3, 8, h), (3, h, 4)),
        lambda x, up, down, **o: experts.experts(x, *routed(x), up, down, **o),
        lambda x, up, down: experts.reference.experts(x, *routed(x), up, down),
    ),
}
KERNELS: Mapping[str, contract.Kernel] = {
    "rms_norm": rms_norm.KERNEL,
    "add_rms_norm": rms_norm.ADD_KERNEL,
    "layer_norm": layer_norm.KERNEL,
    "gated_rms_norm": gated_norm.KERNEL,
    "gated_linear": gated_linear.KERNEL,
    "activation": activation.KERNEL,
    "rope": rope.KERNEL,
    "qk_norm_rope": qk_norm_rope.KERNEL,
    "cross_entropy": cross_entropy.KERNEL,
    "linear_cross_entropy": linear_cross_entropy.KERNEL,
    "experts": experts.KERNEL,
}
OF_ATTENTION = ("sdpa", "torch")  # what "packed" calls for each document is torch's
EVERY = [
    (name, implementation)
    for name in OPERATIONS
    for implementation in (OF_ATTENTION if name == "attention" else ("triton", "torch"))
]
ONE_BLOCK = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "gated_rms_norm")  # hold a row in registers

every_operation = pytest.mark.parametrize(("name", "implementation"), EVERY)


@every_operation
def test_no_token(name: str, implementation: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        checks.check_shape(OPERATIONS[name](implementation), dtype, (0, 8))


@every_operation
def test_one_element(name: str, implementation: str) -> None:
    """A hidden size (for rope, half a head; for the loss, a vocabulary) of 1."""
    checks.check_shape(OPERATIONS[name](implementation), torch.float32, (3, 1), draws=8)


@pytest.mark.parametrize(("name", "implementation"), [one for one in EVERY if one[0] != "attention"])
def test_what_is_not_finite_goes_where_torch_lets_it_go(name: str, implementation: str) -> None:
    """NaN or infinity in one element of one input: NaN wherever torch has it, and nowhere else."""
    one = OPERATIONS[name](implementation)
    inputs = one.draw((4, 8), torch.float32)
    for index, value in ((i, v) for i in range(len(inputs)) for v in (float("nan"), float("inf"))):
        poisoned = [x.clone() for x in inputs if x is not None]
        poisoned[index].view(-1)[poisoned[index].numel() // 2] = value
        for what, ours, theirs, truth in checks.results(one, tuple(poisoned)):
            assert not (theirs.isnan() & truth.isnan() & ours.isfinite()).any(), f"{what}: a NaN was dropped"
            assert not (theirs.isfinite() & truth.isfinite() & ~ours.isfinite()).any(), f"{what}: a NaN spread"


@pytest.mark.parametrize("implementation", OF_ATTENTION)
@pytest.mark.parametrize("index", range(3))
def test_whoever_sees_a_nan_in_attention_gets_it(implementation: str, index: int) -> None:
    """A NaN in the query, the key or the value of one token; definitions differ in what reaches those that do not see it."""
    inputs = [x.clone() for x in OPERATIONS["attention"](implementation).draw((4, 8), torch.float32) if x is not None]
    inputs[index][:, :, 1] = float("nan")
    output = OPERATIONS["attention"](implementation).ours(*inputs)
    if implementation == "sdpa":  # torch's own call: on a CPU it makes zeros of a query that is NaN
        query, key, value = inputs
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert torch.equal(output.nan_to_num(3.0), expected.nan_to_num(3.0))
    else:
        assert output[:, :, 1 : 2 if index == 0 else None].isnan().all()


@pytest.mark.slow
@every_operation
def test_strides(name: str, implementation: str) -> None:
    """Inputs and incoming gradients that are columns of something wider, transposed in memory, or one value expanded."""
    one = OPERATIONS[name](implementation)
    seeds = 8 if "linear_cross" in name else 1  # where a row has one number, luck must even out
    draws = [tuple(x for x in one.draw((2, 6), torch.bfloat16, seed) if x is not None) for seed in range(seeds)]

    def judge(change: Callable[[int, torch.Tensor], torch.Tensor], grad_output: torch.Tensor | None = None) -> None:
        changed = [tuple(change(i, x) for i, x in enumerate(inputs)) for inputs in draws]
        checks.judge_results([checks.results(one, inputs, grad_output) for inputs in changed])

    for index in range(len(draws[0])):
        for form in (columns, transposed, lambda x: x[..., :1].expand(x.shape)):
            judge(lambda i, x: form(x) if i == index else x)  # noqa: B023
    output = one.theirs(*draws[0])
    ones = torch.ones_like(output[..., :1] if output.dim() else output)
    judge(lambda _, x: x, ones.expand(output.shape))


def columns(x: torch.Tensor) -> torch.Tensor:
    """The same values between columns of NaN."""
    return next(checks.layouts(x))


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values with the last dimension outermost in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"attention", "experts"}))
def test_a_row_of_65537_elements(name: str) -> None:
    """Where Triton holds a row in registers it refuses by name and "auto" takes torch; elsewhere any length will do."""
    inputs = OPERATIONS[name]("triton").draw((2, 65537), torch.bfloat16)
    if name not in ONE_BLOCK:
        if name not in ("rope", "qk_norm_rope"):  # of heads
            checks.check_values(OPERATIONS[name]("triton"), inputs)
        return
    with pytest.raises(ValueError, match=r"takes rows of at most 65536 elements; these have 65537.*'auto'"):
        OPERATIONS[name]("triton").ours(*inputs)
    checks.check_values(OPERATIONS[name]("auto"), inputs)


@pytest.mark.parametrize("name", KERNELS)
def test_cpu_tensors_are_refused_by_triton_where_it_is_not_interpreted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "this_machine", lambda: CPU)
    contract.implementation_module.cache_clear()
    inputs = [x.cpu() for x in OPERATIONS[name]("triton").draw((2, 8), torch.float32) if x is not None]
    try:
        with pytest.raises(ValueError, match=r"triton: runs on cuda and xpu; the tensors are on cpu.*'auto'"):
            OPERATIONS[name]("triton").ours(*inputs)
    finally:
        contract.implementation_module.cache_clear()


@pytest.mark.parametrize("name", KERNELS)
def test_no_operation_refuses_a_gpu_what_torch_can_do(name: str) -> None:
    for size in (1, 4096, 65537):
        choice = contract.choose(KERNELS[name], H100, contract.Spec("cuda", torch.bfloat16, size))
        expected = "torch" if size == 65537 and name in ONE_BLOCK else "triton"
        assert choice.winner is not None
        assert choice.winner.name == expected


X, WIDE, INTEGERS = torch.ones(3, 8).bfloat16(), torch.ones(3, 8), torch.ones(3, 8, dtype=torch.int64)
MIXED: Mapping[str, tuple[Callable[[], Any], str | torch.dtype]] = {
    "a wider weight of a norm": (lambda: rms_norm.rms_norm(X, WIDE[0], EPS), torch.float32),
    "the same, rounded at the end": (
        lambda: rms_norm.rms_norm(X, WIDE[0], EPS, order="mul_then_cast"),
        torch.bfloat16,
    ),
    "a wider residual": (lambda: rms_norm.add_rms_norm(X, WIDE, X[0], EPS)[1], torch.float32),
    "a wider gate": (lambda: gated_norm.gated_rms_norm(X, WIDE, X[0], EPS), "gate"),
    "a wider up": (lambda: gated_linear.gated_linear(X, WIDE), "up"),
    "integers to activate": (lambda: activation.activation(INTEGERS, "relu2"), "torch.int64"),
    "integers to normalise": (lambda: rms_norm.rms_norm(INTEGERS, X[0], EPS), "torch.int64"),
    "a wider head": (
        lambda: linear_cross_entropy.linear_cross_entropy(X, WIDE, targets(X, 3)),
        "weight is .* torch.float32",
    ),
    "integer logits": (lambda: cross_entropy.cross_entropy(INTEGERS, targets(X, 3)), "torch.int64"),
    "integers for experts": (
        lambda: experts.experts(INTEGERS, *routed(X), torch.ones(3, 8, 8), torch.ones(3, 8, 4)),
        "hidden_states are torch.int64",
    ),
    "a wider key": (
        lambda: rope.rope(X[None, None], WIDE[None, None], *tables(WIDE[None, None])),
        "k is .* torch.float32",
    ),
}


@pytest.mark.parametrize(("call", "outcome"), MIXED.values(), ids=MIXED)
def test_mixed_dtypes_are_torchs_or_refused(call: Callable[[], Any], outcome: str | torch.dtype) -> None:
    if isinstance(outcome, torch.dtype):
        assert call().dtype == outcome
        return
    with pytest.raises(ValueError, match=outcome):
        call()


LOSSES: Mapping[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": lambda x, w, target, **o: cross_entropy.cross_entropy(F.linear(x, w), target, **o),
    "linear_cross_entropy": linear_cross_entropy.linear_cross_entropy,
}
every_loss = pytest.mark.parametrize("implementation", ["triton", "torch"])


@pytest.mark.parametrize("name", LOSSES)
@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [4, 0])
def test_no_label_counts(name: str, implementation: str, reduction: str, tokens: int) -> None:
    """As in torch: the mean of nothing is NaN, the sum 0, and every gradient 0."""
    x, w = (torch.randn(n, 8, device=checks.DEVICE, requires_grad=True) for n in (tokens, VOCAB))
    target = torch.full((tokens,), IGNORED, device=checks.DEVICE)
    loss = LOSSES[name](x, w, target, reduction=reduction, implementation=implementation)
    expected = F.cross_entropy(F.linear(x, w), target, reduction=reduction)
    assert loss.shape == expected.shape
    assert torch.equal(loss.isnan(), expected.isnan())
    assert not loss.nan_to_num().any()
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert w.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.skipif(
    checks.DEVICE != "cpu", reason="a GPU is not waited for; each loss has a test of what it does there"
)
@pytest.mark.parametrize("name", LOSSES)
@every_loss
@pytest.mark.parametrize("label", [VOCAB, -1, 2**40])
def test_a_label_out_of_range_is_named(name: str, implementation: str, label: int) -> None:
    target = torch.tensor([1, label, IGNORED])
    with pytest.raises(
        ValueError, match=f"^{name}: target {label} is no class; expected 0 to {VOCAB - 1}, or ignore_index=-100"
    ):
        LOSSES[name](torch.ones(3, 8), torch.ones(VOCAB, 8), target, implementation=implementation)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_loss
def test_what_an_ignored_token_holds_is_not_seen(implementation: str, value: float) -> None:
    """Its loss and gradient are exactly 0 and the other rows the same bits; in torch its gradient would be NaN."""
    target = torch.tensor([1, IGNORED, 2], device=checks.DEVICE)
    for name in LOSSES:
        leaves = []
        for held in (0.5, value):
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(checks.DEVICE)
            x[1] = held
            if name == "linear_cross_entropy" and checks.DEVICE != "cpu":
                continue  # a GPU multiplies it before it is dropped, where it does not know how many count
            w = torch.linspace(-1, 1, VOCAB * 8, device=checks.DEVICE).view(VOCAB, 8)
            leaves.append(x.requires_grad_())
            if name == "cross_entropy":
                cross_entropy.cross_entropy(x, target, implementation=implementation).backward()  # type: ignore[no-untyped-call]
            else:
                LOSSES[name](x, w, target, implementation=implementation).backward()  # type: ignore[no-untyped-call]
        for x in leaves:
            assert x.grad is not None
            assert not x.grad[1].any()
            assert torch.equal(x.grad, leaves[0].grad)  # type: ignore[arg-type]
