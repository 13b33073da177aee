"""Places are found by what they compute: whatever they are called, and nothing that only looks alike."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import automodel_accel as accel
from tests.swap import lookalikes as look
from tests.swap.compare import Step, applied, assert_as_good, assert_close, gradients
from tests.tiny import tiny


class Host(nn.Module):
    """Calls one module, with whatever else it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, *more: torch.Tensor, **named: float) -> torch.Tensor:
        return self.inner(x, *more, **named)  # type: ignore[no-any-return]


def inputs(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (
        torch.randn(*(shape or (2, 7, look.SIZE)), generator=torch.Generator().manual_seed(0)) * scale
    ).requires_grad_()


def run(host: nn.Module, x: torch.Tensor, *more: torch.Tensor, **named: float) -> Step:
    """Output and the gradient of the input and of every parameter."""
    host.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(5)
    y = host(x, *more, **named)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum().backward()
    assert x.grad is not None
    return Step(y.detach(), {"x": x.grad, **gradients(host)})


SCALES = (1.0, 0.0, 1e-6, 1e-3, 1e3)


def assert_same_everywhere(inner: nn.Module, *more: torch.Tensor, **named: float) -> accel.report:  # type: ignore[valid-type]
    """Ours and the original agree on inputs of all magnitudes; returns the report."""
    host = Host(inner).train()
    ours = applied(host)
    for scale in SCALES:
        assert_close(run(ours, inputs(scale=scale), *more, **named), run(host, inputs(scale=scale), *more, **named))
    return accel.report(ours)


SERVED_NORMS: dict[str, Callable[[], nn.Module]] = {
    "weight": look.Rms,
    "large eps": lambda: look.Rms(eps=5e-3),
    "no eps": lambda: look.Rms(eps=0.0),
    "weight + 1": lambda: look.PrivateSwitch(True),
    "eps of an attribute that is not the first": look.SmallNamedEps,
    "by keyword": look.ByKeyword,
    "torch's": lambda: nn.RMSNorm(look.SIZE),
    "torch's, with eps": lambda: nn.RMSNorm(look.SIZE, eps=1e-5),
    "torch's, without weight": lambda: nn.RMSNorm(look.SIZE, eps=1e-5, elementwise_affine=False),
}


@pytest.mark.parametrize("make", SERVED_NORMS.values(), ids=SERVED_NORMS)
def test_norms_that_are_served(make: Callable[[], nn.Module]) -> None:
    report = assert_same_everywhere(make())
    assert report.places("norm") == 1
    assert report.counts.fused["norm"] == len(SCALES) - (1 if report.counts.passed_on else 0)


UNSERVED_NORMS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "a group norm": (look.Grouped, "not root mean square"),
    "eps outside the root": (look.EpsOutside, "not root mean square"),
    "eps as a floor": (look.EpsAsFloor, "not root mean square"),
    "subtracts the mean, rounds, then scales": (look.Centred, "bit comparison in bfloat16"),
    "divides by one less": (look.Unbiased, "not root mean square"),
    "unit length": (look.UnitLength, "not root mean square"),
    "a part of the row": (look.Partial, "not root mean square"),
    "a matrix for a weight": (look.ScaledByMatrix, None),
    "a bias": (look.WithBias, "a norm with a bias"),
    "the weight's square": (look.Squared, "not root mean square"),
    "clamped inputs": (look.Clamped, None),
    "clamped outputs": (look.ClampedOutput, "not root mean square"),
    "noise in training": (look.Noisy, "in training"),
    "a constant root mean square": (look.StraightThrough, "a gradient of its own"),
    "a weight at half speed": (look.ScaledGradient, "a gradient of its own"),
    "squares in bfloat16": (look.RoundedTwice, "bit comparison in bfloat16"),
    "a tuple": (look.Tuple, None),
    "an eps that nothing names": (look.HiddenEps, "not root mean square"),
    "torch's GroupNorm": (lambda: nn.GroupNorm(1, 7), None),
}


@pytest.mark.parametrize(("make", "reason"), UNSERVED_NORMS.values(), ids=UNSERVED_NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_norms_that_only_look_like_it(make: Callable[[], nn.Module], reason: str | None, training: bool) -> None:
    inner = make().train(training)
    host = Host(inner)
    ours = applied(host)
    report = accel.report(ours)
    assert report.places("norm") == 0, report.applied
    host.train(), ours.train()
    for scale in SCALES:
        assert_close(run(ours, inputs(scale=scale)), run(host, inputs(scale=scale)))
    if reason is not None:
        (refusal,) = [refusal for fusion, refusal in report.refusals if fusion == "norm"]
        assert reason in refusal.reason
        assert refusal.what == "inner"
        assert refusal.remedy == "the original forward stays"


def test_a_norm_called_with_two_inputs_is_the_original() -> None:
    for inner, named in ((look.Gated(), "gate"), (look.ByKeyword(), "residual")):
        host = Host(inner)
        ours = applied(host)
        gate = torch.randn(2, 7, look.SIZE)
        assert_close(run(ours, inputs(), gate), run(host, inputs(), gate))
        assert_close(run(ours, inputs(), **{named: gate}), run(host, inputs(), **{named: gate}))
        assert accel.report(ours).counts.passed_on == {"norm: called with more than one input, or by keyword": 2}


@pytest.mark.parametrize(
    "shape", [(look.SIZE,), (3, look.SIZE), (2, 4, 7, look.SIZE), (0, look.SIZE), (2, 1, look.SIZE)]
)
@pytest.mark.parametrize("make", [look.Rms, look.PerHead])
def test_norms_of_every_dimension(shape: tuple[int, ...], make: Callable[[], nn.Module]) -> None:
    host = Host(make())
    ours = applied(host)
    assert_close(run(ours, inputs(*shape)), run(host, inputs(*shape)))


def test_norms_that_differ_only_in_a_private_attribute() -> None:
    model = nn.Sequential(look.PrivateSwitch(False), look.PrivateSwitch(True), look.PrivateSwitch(False))
    ours = applied(model)
    assert_close(run(ours, inputs()), run(model, inputs()))
    assert [claim.label.split(", ")[1] for claim in accel.report(ours).applied] == ["weight", "1 + weight", "weight"]


def test_eps_changed_after_apply_is_used() -> None:
    host = Host(look.SmallNamedEps())
    ours = applied(host)
    for m in (host, ours):
        m.inner.eps = 0.3
    assert_close(run(ours, inputs()), run(host, inputs()))


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": nn.GELU(approximate="tanh"), "a module": nn.SiLU()}
SERVED_MLPS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda act=act: look.Mlp(act)) for name, act in ACTIVATIONS.items()},
    "biases": lambda: look.Mlp(bias=True),
    "gate and up swapped": look.Swapped,
    "square linears": look.Square,
    "one linear, gate first": lambda: look.Fused("gate_up"),
    "one linear, up first": lambda: look.Fused("up_gate"),
    "one linear, square": lambda: look.Fused("up_gate", square=True),
    "an unused keyword": look.WithExtraKeyword,
    "a dropout of zero": lambda: look.WithDropout(0.0),
    "a record": look.Recording,
}


@pytest.mark.parametrize("make", SERVED_MLPS.values(), ids=SERVED_MLPS)
def test_mlps_that_are_served(make: Callable[[], nn.Module]) -> None:
    report = assert_same_everywhere(make())
    assert report.places("mlp") == 1
    assert report.counts.fused["mlp"] == len(SCALES)


UNSERVED_MLPS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "relu squared": (lambda: look.Mlp(look.relu_squared), "computes something else"),
    "relu": (lambda: look.Mlp(F.relu), "computes something else"),
    "sigmoid": (lambda: look.Mlp(torch.sigmoid), "computes something else"),
    "quick gelu": (lambda: look.Mlp(look.quick_gelu), "computes something else"),
    "nearly silu": (lambda: look.Mlp(look.nearly_silu), "computes something else"),
    "clamped silu": (lambda: look.Mlp(look.clamped_silu), "computes something else"),
    "rounded gelu": (
        lambda: look.Mlp(look.tanh_gelu_of_rounded_constant),
        "only nearly a gated mlp with gelu_tanh: off by ",
    ),
    "activates in float32": (look.ActivatesInFloat32, "as one that activates in float32 is"),
    "no activation": (look.NoActivation, "computes something else"),
    "a residual": (look.WithResidual, "computes something else"),
    "dropout": (lambda: look.WithDropout(0.3), "dropout inside"),
    "a scale": (look.WithScale, None),
    "interleaved halves": (look.Interleaved, None),
    "reads weights, ignores biases": (look.ReadsWeights, "computes something else"),
    "a gate without gradient": (look.DetachedGate, "a gradient of its own"),
}


@pytest.mark.parametrize(("make", "reason"), UNSERVED_MLPS.values(), ids=UNSERVED_MLPS)
def test_mlps_that_only_look_like_it(make: Callable[[], nn.Module], reason: str | None) -> None:
    report = assert_same_everywhere(make())
    assert report.places("mlp") == 0
    if reason is not None:
        (refusal,) = [refusal for fusion, refusal in report.refusals if fusion == "mlp"]
        assert reason in refusal.reason


class Attention(nn.Module):
    """Three square linears, as a gated MLP may have."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(look.SIZE, look.SIZE) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            linear(x).view(*x.shape[:2], 4, look.SIZE // 4).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


NEITHER = (
    nn.Softmax(-1),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softsign(),
    nn.Hardtanh(),
    nn.ReLU(),
    nn.Dropout(0.1),
    nn.Flatten(),
    Attention(),
)


@pytest.mark.parametrize("inner", NEITHER, ids=lambda inner: type(inner).__name__)
def test_what_is_neither_is_not_spoken_of(inner: nn.Module) -> None:
    assert {str(refusal) for _, refusal in accel.plan(Host(inner)).refusals} == {
        "model: has no such place; nothing to do"
    }


def test_an_mlp_called_with_an_extra_keyword_is_the_original() -> None:
    host = Host(look.WithExtraKeyword())
    ours = applied(host)
    assert_close(run(ours, inputs(), scale=0.5), run(host, inputs(), scale=0.5))
    assert accel.report(ours).counts.passed_on == {"mlp: called with more than one input, or by keyword": 1}


def test_dropout_switched_on_after_apply_is_served_by_the_original() -> None:
    host = Host(look.WithDropout(0.0)).train()
    ours = applied(host)
    for m in (host, ours):
        m.inner.dropout.p = 0.5
    assert_close(run(ours, inputs()), run(host, inputs()))
    assert accel.report(ours).counts.fused["mlp"] == 0
    ours.eval(), host.eval()
    assert_close(run(ours, inputs()), run(host, inputs()))
    assert accel.report(ours).counts.fused["mlp"] == 1


def test_activation_replaced_after_apply_is_used() -> None:
    host = Host(look.Mlp(nn.SiLU()))
    ours = applied(host)
    for m in (host, ours):
        m.inner.act = nn.Tanh()
    assert_close(run(ours, inputs()), run(host, inputs()))


@pytest.mark.parametrize("make", [look.Mlp, look.Swapped, lambda: look.Fused("up_gate"), look.Rms])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    host = Host(make()).to(dtype)
    ours = applied(host)
    mine, theirs = run(ours, inputs().to(dtype)), run(host, inputs().to(dtype))
    truth = run(host.double(), inputs().to(dtype).double())
    assert_as_good(mine, theirs, truth, dtype)
    assert accel.report(ours).counts.fused


def test_planning_writes_nothing_and_draws_nothing() -> None:
    """Not into records that a module keeps, not into the random state, and no hook fires."""
    host = Host(nn.Sequential(look.Recording(), look.WithDropout(0.3), look.Noisy(), look.Rms())).train()
    fired: list[nn.Module] = []
    for module in host.modules():
        module.register_forward_hook(lambda module, inputs, output: fired.append(module))
    state = torch.get_rng_state()
    accel.plan(host)
    accel.apply(host)
    assert torch.equal(torch.get_rng_state(), state)
    assert (host.inner[0].seen, host.inner[0].calls) == ([], 0)
    assert not fired


class Caught(nn.Module):
    """Raises what it likes when it does not like its input."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 5:
            raise self.error("an input of another kind")
        return x


ERRORS = (UnboundLocalError, NameError, KeyError, StopIteration, NotImplementedError, AssertionError, ZeroDivisionError)


@pytest.mark.parametrize("error", ERRORS)
def test_a_module_that_raises_when_probed_is_left_alone(error: type[Exception]) -> None:
    model = nn.Sequential(Caught(error), look.Rms())
    assert accel.report(accel.apply(model)).places("norm") == 1


AMBIENT: dict[str, Callable[[], object]] = {
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("ambient", AMBIENT.values(), ids=AMBIENT)
def test_the_callers_modes_do_not_matter(ambient: Callable[[], torch.no_grad]) -> None:
    expected = accel.report(accel.apply(tiny())).to_dict()
    model = tiny()
    with ambient():
        accel.apply(model)
    assert accel.report(model).to_dict() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    expected = accel.report(accel.apply(tiny())).to_dict()
    model = tiny()
    torch.set_default_dtype(dtype)
    try:
        accel.apply(model)
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert accel.report(model).to_dict() == expected
