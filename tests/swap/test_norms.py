"""Norms beyond root mean square: LayerNorm under any name, norms without weight, norms with a gate; and what only looks alike."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import automodel_accel as accel
from automodel_accel.kernels.contract import Refusal
from automodel_accel.patches.norm_probe import NormForm, recognise_norm
from tests.swap import lookalikes as look
from tests.swap.compare import Step, applied, assert_as_good, assert_close, assert_equal
from tests.swap.test_structure import SCALES, Host, inputs, run


class LayerNorm(nn.Module):
    """By hand, with hooks for subclasses to differ in one thing."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(look.SIZE) + 0.5)
        self.beta = nn.Parameter(torch.randn(look.SIZE)) if bias else None
        self.variance_epsilon = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.scale().float() * self.normed(x.float())
        return (y if self.beta is None else y + self.beta.float()).to(x.dtype)

    def scale(self) -> torch.Tensor:
        return self.gamma

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class OnePlus(LayerNorm):
    def scale(self) -> torch.Tensor:
        return self.gamma + 1


class FixedWidth(nn.Module):
    """OLMo's: no weight, and a width that only an attribute tells."""

    def __init__(self) -> None:
        super().__init__()
        self.normalized_shape = (look.SIZE,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, eps=1e-5).to(x.dtype)


class AnyWidth(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)


SERVED: dict[str, Callable[[], nn.Module]] = {
    "torch's": lambda: nn.LayerNorm(look.SIZE),
    "torch's, large eps": lambda: nn.LayerNorm(look.SIZE, eps=5e-3),
    "torch's, no bias": lambda: nn.LayerNorm(look.SIZE, bias=False),
    "torch's, no parameters": lambda: nn.LayerNorm(look.SIZE, elementwise_affine=False),
    "by hand": LayerNorm,
    "by hand, no bias": lambda: LayerNorm(bias=False),
    "1 + weight": OnePlus,
    "fixed width": FixedWidth,
    "any width": AnyWidth,
    "root mean square, fixed width": lambda: nn.RMSNorm(look.SIZE, eps=1e-6, elementwise_affine=False),
}


def shaken(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0, 0.3, generator=torch.Generator().manual_seed(3))
    return module


@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED)
def test_served_exactly(make: Callable[[], nn.Module]) -> None:
    host = Host(shaken(make())).train()
    ours = applied(host)
    for scale in SCALES:
        assert_close(run(ours, inputs(scale=scale)), run(host, inputs(scale=scale)))
    report = accel.report(ours)
    places = 2 if isinstance(host.inner, AnyWidth) else 1  # its host computes the same
    assert (report.places("norm"), report.counts.fused["norm"]) == (places, len(SCALES))
    assert not report.counts.passed_on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED)
def test_served_in_low_precision(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    host = Host(shaken(make()).to(dtype)).train()
    ours = applied(host)
    x = inputs(16, 50, look.SIZE).detach().to(dtype)
    truth = run(copy.deepcopy(host).float(), x.float())
    assert_as_good(run(ours, x), run(host, x), truth, dtype)
    assert accel.report(ours).counts.fused["norm"] == 1


@pytest.mark.parametrize("make", [SERVED["torch's"], SERVED["by hand"], SERVED["1 + weight"]])
def test_compiled_checkpointed_copied_pickled_reverted(make: Callable[[], nn.Module]) -> None:
    host = Host(shaken(make())).train()
    expected = run(host, inputs())
    ours = applied(host)
    compiled: Any = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_close(run(compiled, inputs()), renamed(expected, "_orig_mod."))
    assert_close(run(Checkpointed(ours), inputs()), renamed(expected, "body."))
    assert_close(run(copy.deepcopy(ours), inputs()), expected)
    assert type(pickle.loads(pickle.dumps(ours.inner))) is type(host.inner)
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs()), host(inputs()))
    assert_equal(run(accel.revert(ours), inputs()), expected)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)  # type: ignore[no-any-return]


def renamed(step: Step, prefix: str) -> Step:
    """As a wrapper names the parameters."""
    return Step(step.loss, {name if name == "x" else prefix + name: grad for name, grad in step.gradients.items()})


def test_on_cpu_torchs_layer_norm_is_torchs() -> None:
    host = Host(shaken(nn.LayerNorm(look.SIZE)))
    assert_equal(run(applied(host), inputs()), run(host, inputs()))


@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters(names: tuple[str, ...]) -> None:
    host = Host(shaken(nn.LayerNorm(look.SIZE)))
    for name in names:
        getattr(host.inner, name).requires_grad_(False)
    ours = applied(host)
    assert_close(run(ours, inputs()), run(host, inputs()))
    assert len(run(ours, inputs()).gradients) == 3 - len(names)


def test_weights_of_another_dtype() -> None:
    """bfloat16 rows and float32 weights, as accelerate's or an old checkpoint's mixed precision has."""
    host = Host(shaken(nn.LayerNorm(look.SIZE)))
    ours = applied(host)
    x = inputs(16, 50, look.SIZE).detach().bfloat16()
    assert_as_good(run(ours, x), run(host, x), run(host, x.float()), torch.bfloat16)
    assert accel.report(ours).counts.fused["norm"] == 1


def test_calls_that_go_to_the_original() -> None:
    host = Host(shaken(nn.LayerNorm(look.SIZE)))
    ours = applied(host)
    x = inputs()
    torch.testing.assert_close(ours.inner(input=x), host.inner(input=x))
    torch.testing.assert_close(ours(x.double().float()), host(x))
    host.double(), ours.double()
    assert_close(run(ours, x.double()), run(host, x.double()))
    counts = accel.report(ours).counts
    assert counts.fused["norm"] == 1
    assert sum(counts.passed_on.values()) == 2
    with pytest.raises(RuntimeError, match="normalized_shape"):
        ours(torch.ones(2, look.SIZE + 1, dtype=torch.float64))


class GatedNorm(nn.Module):
    """Qwen3-Next's, with hooks for subclasses to differ in one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(look.SIZE) + 0.5)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return (self.weight * self.normed(x.float()).to(x.dtype) * F.silu(gate.float())).to(x.dtype)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class InFloat32(GatedNorm):
    """Kimi Linear's."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        assert gate is not None
        return (self.weight.float() * self.normed(x.float()) * torch.sigmoid(gate.float())).to(x.dtype)


class GateFirst(GatedNorm):
    """Mamba 2's; with one input a plain norm."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        wide = x.float() if gate is None else x.float() * F.silu(gate.float())
        return self.weight * self.normed(wide).to(x.dtype)


GATED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gate last": (GatedNorm, "silu(gate) last"),
    "in float32": (InFloat32, "sigmoid(gate) last"),
    "gate first": (GateFirst, "silu(gate) first"),
}


@pytest.mark.parametrize(("make", "label"), GATED.values(), ids=GATED)
def test_gated_norms_that_are_served(make: Callable[[], nn.Module], label: str) -> None:
    host = Host(make()).train()
    ours = applied(host)
    gate = torch.randn(2, 7, look.SIZE, generator=torch.Generator().manual_seed(4)) * 3
    for scale in SCALES:
        assert_close(run(ours, inputs(scale=scale), gate), run(host, inputs(scale=scale), gate))
    report = accel.report(ours)
    assert report.counts.fused["norm"] == len(SCALES)
    assert label in report.applied[0].label
    bf16_host = copy.deepcopy(host).bfloat16()
    x, gate = inputs(16, 50, look.SIZE).detach().bfloat16(), torch.randn(16, 50, look.SIZE).bfloat16()
    truth = run(copy.deepcopy(bf16_host).float(), x.float(), gate.float())
    bf16 = applied(bf16_host)
    assert_as_good(run(bf16, x, gate), run(bf16_host, x, gate), truth, torch.bfloat16)
    assert accel.report(bf16).counts.fused["norm"] == 1


def test_gradient_of_the_gate() -> None:
    for make, _ in GATED.values():
        host = Host(make())
        gates = []
        for module in (applied(host), host):
            gate = torch.randn(2, 7, look.SIZE, generator=torch.Generator().manual_seed(4)).requires_grad_()
            run(module, inputs(), gate)
            gates.append(gate.grad)
        torch.testing.assert_close(*gates)


def test_a_gated_norm_called_otherwise_is_the_original() -> None:
    host = Host(GateFirst())
    ours = applied(host)
    gate = torch.randn(2, 7, look.SIZE)
    assert_equal(run(ours, inputs()), run(host, inputs()))
    assert_equal(run(ours, inputs(), gate=gate), run(host, inputs(), gate=gate))
    assert_equal(run(ours, inputs(), gate[:1]), run(host, inputs(), gate[:1]))
    assert_equal(run(ours, inputs(), gate.bfloat16()), run(host, inputs(), gate.bfloat16()))
    counts = accel.report(ours).counts
    assert counts.fused["norm"] == 0
    assert counts.passed_on["norm: called without a gate, with more than a gate, or by keyword"] == 2
    assert sum(counts.passed_on.values()) == 4


class Unbiased(LayerNorm):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (look.SIZE - 1) + self.variance_epsilon)


class EpsOutside(LayerNorm):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class HeldMean(LayerNorm):
    """Right in value, wrong in gradient."""

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return super().normed(x - x.mean(-1, keepdim=True).detach())


class HeldVariance(LayerNorm):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()


class Noisy(LayerNorm):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        y = super().normed(x)
        return y + torch.randn_like(y) * 0.1 if self.training else y


class RoundsFirst(LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.gamma * self.normed(x.float()).to(x.dtype)
        return y if self.beta is None else y + self.beta


class InHalfPrecision(LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.gamma * self.normed(x)
        return y if self.beta is None else y + self.beta


class ChannelsFirst(nn.LayerNorm):
    """SAM's, over dimension 1 of an image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupedGate(GatedNorm):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return super().normed(x.unflatten(-1, (4, -1))).flatten(-2)


class GeluGate(GatedNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return (self.weight * self.normed(x.float()).to(x.dtype) * F.gelu(gate.float())).to(x.dtype)


class RoundedGate(GatedNorm):
    """Activates in the dtype of the gate."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.weight * self.normed(x.float()).to(x.dtype) * F.silu(gate)


class HeldGate(GatedNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x, gate.detach())


UNSERVED: dict[str, tuple[Callable[[], nn.Module], int, str | None]] = {
    "unbiased": (Unbiased, 1, "not the mean subtracted"),
    "eps outside": (EpsOutside, 1, "not the mean subtracted"),
    "variance held": (HeldVariance, 1, "a gradient of its own"),
    "in training": (Noisy, 1, "in training"),
    "rounds first": (RoundsFirst, 1, "bit comparison in bfloat16"),
    "squares in bfloat16": (InHalfPrecision, 1, "bit comparison in bfloat16"),
    "groups with a gate": (GroupedGate, 2, "not root mean square with a gate"),
    "gelu gate": (GeluGate, 2, "not root mean square with a gate"),
    "rounded gate": (RoundedGate, 2, "bit comparison in bfloat16"),
    "gate without gradient": (HeldGate, 2, "a gradient of its own"),
}


@pytest.mark.parametrize(("make", "count", "reason"), UNSERVED.values(), ids=UNSERVED)
def test_norms_that_only_look_like_it(make: Callable[[], nn.Module], count: int, reason: str) -> None:
    host = Host(make()).eval()
    ours = applied(host)
    host.train(), ours.train()
    gate = [torch.randn(2, 7, look.SIZE)] * (count - 1)
    for scale in SCALES:
        assert_close(run(ours, inputs(scale=scale), *gate), run(host, inputs(scale=scale), *gate))
    report = accel.report(ours)
    assert report.places("norm") == 0
    (refusal,) = [refusal for fusion, refusal in report.refusals if fusion == "norm"]
    assert reason in refusal.reason


def test_a_mean_held_constant_is_the_same_function() -> None:
    """Where the mean is subtracted twice, holding the first changes nothing: it is served, and right."""
    host = Host(HeldMean())
    ours = applied(host)
    assert_close(run(ours, inputs()), run(host, inputs()))
    assert accel.report(ours).places("norm") == 1


def test_channels_first() -> None:
    host = Host(ChannelsFirst(look.SIZE))
    ours = applied(host)
    image = torch.randn(2, look.SIZE, 5, 5)
    torch.testing.assert_close(ours(image), host(image), rtol=0, atol=0)
    assert accel.report(ours).places("norm") == 0


def test_what_other_patches_may_ask() -> None:
    form = recognise_norm("", nn.LayerNorm(48, eps=1e-6), {})
    assert isinstance(form, NormForm)
    assert (form.kind, form.weight, form.bias, form.eps, form.eps_name) == ("layer", "weight", "bias", 1e-6, "eps")
    assert (form.offset, form.order, form.size) == (0.0, "mul_then_cast", 48)
    rms = recognise_norm("", look.Rms(), {})
    assert isinstance(rms, NormForm)
    assert (rms.kind, rms.bias, rms.order) == ("rms", None, "cast_then_mul")
    gated = recognise_norm("", GatedNorm(), {})
    assert isinstance(gated, NormForm)
    assert (gated.kind, gated.activation, gated.gate_first) == ("gated", "silu", False)
    assert isinstance(recognise_norm("", look.Grouped(), {}), Refusal)
    assert recognise_norm("", nn.Linear(4, 4), {}) is None
