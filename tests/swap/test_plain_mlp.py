"""MLPs without a gate: found by what they compute, exact, and left alone where they are something else."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

import automodel_accel as accel
from tests.swap import lookalikes as look
from tests.swap.compare import Step, applied, assert_as_good, assert_close, gradients
from tests.swap.test_structure import SCALES, Host, inputs, run


class Plain(nn.Module):
    """fc2(act(fc1(x))) under other names, with hooks for subclasses to differ in one thing."""

    def __init__(self, act: Any = F.gelu, bias: bool = True, out: int = look.SIZE) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(look.SIZE, look.INNER, bias=bias), nn.Linear(look.INNER, out, bias=bias)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(self.act(self.wi(x)))  # type: ignore[no-any-return]


class Gpt2(Plain):
    """GPT-2's linears store their weights (in, out)."""

    def __init__(self) -> None:
        super().__init__(ACT2FN["gelu_new"])
        self.wi, self.wo = Conv1D(look.INNER, look.SIZE), Conv1D(look.SIZE, look.INNER)


class Square(Plain):
    """Two linears of one shape."""

    def __init__(self) -> None:
        super().__init__(F.silu)
        self.wi, self.wo = nn.Linear(look.SIZE, look.SIZE), nn.Linear(look.SIZE, look.SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wi(self.act(self.wo(x)))  # type: ignore[no-any-return]


class WithDropout(Plain):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(super().forward(x))  # type: ignore[no-any-return]


class WithResidual(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Detached(Plain):
    """Right in value, wrong in gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.wi(x)
        return self.wo(self.act(0.5 * inner + 0.5 * inner.detach()))  # type: ignore[no-any-return]


class LastInFloat32(Plain):
    """As T5, whose last linear stays in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(self.act(self.wi(x)).to(self.wo.weight.dtype))  # type: ignore[no-any-return]


class Nested(nn.Module):
    """A gated MLP whose gate and up lie in a module of their own, as CPM-Ant has it."""

    class Inwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_0, self.w_1 = (nn.Linear(look.SIZE, look.INNER, bias=False) for _ in range(2))
            self.act = nn.GELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.w_0(x)) * self.w_1(x)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.inwards, self.outwards = self.Inwards(), nn.Linear(look.INNER, look.SIZE, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outwards(self.inwards(x))  # type: ignore[no-any-return]


NAMES = {
    **{
        "gelu": "gelu",
        "gelu_python": "gelu",
        "silu": "silu",
        "relu": "relu",
        "relu2": "relu2",
        "quick_gelu": "quick_gelu",
    },
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"),
}
SERVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **{name: (lambda name=name: Plain(ACT2FN[name]), f"mlp, {ours}") for name, ours in NAMES.items()},
    "no biases": (lambda: Plain(bias=False), "mlp, gelu"),
    "another size comes out": (lambda: Plain(out=look.SIZE + 4), "mlp, gelu"),
    "Conv1D": (Gpt2, "mlp, gelu_tanh"),
    "square linears": (Square, "mlp, silu"),
    "a sequence": (lambda: nn.Sequential(nn.Linear(look.SIZE, 40), nn.ReLU(), nn.Linear(40, look.SIZE)), "mlp, relu"),
    "a dropout of zero": (lambda: WithDropout(0.0), "mlp, gelu"),
    "linears in modules of their own": (Nested, "gated mlp, gelu"),
}


@pytest.mark.parametrize(("make", "label"), SERVED.values(), ids=SERVED)
def test_mlps_that_are_served(make: Callable[[], nn.Module], label: str) -> None:
    host = Host(make()).train()
    ours = applied(host)
    for scale in SCALES:
        assert_close(run(ours, inputs(scale=scale)), run(host, inputs(scale=scale)))
    report = accel.report(ours)
    labels = [claim.label for claim in report.applied if claim.fusion == "mlp"]
    assert [text.rpartition(" wide")[0].rpartition(", ")[0] for text in labels] == [label]
    assert report.counts.fused["mlp"] == len(SCALES)


UNSERVED: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "nearly gelu": (
        lambda: Plain(lambda z: 0.5 * z * (1 + torch.tanh(0.79788 * (z + 0.0447 * z**3)))),
        "only nearly gelu_tanh: off by ",
    ),
    "nearly quick gelu": (lambda: Plain(lambda z: z * torch.sigmoid(1.7 * z)), "only nearly quick_gelu: off by "),
    "clamped gelu": (lambda: Plain(ACT2FN["gelu_10"]), "only nearly gelu: off by"),
    "activates in float32": (
        lambda: Plain(lambda z: F.gelu(z.float()).to(z.dtype)),
        "as one that activates in float32 is",
    ),
    "another activation": (lambda: Plain(torch.tanh), "computes something else than silu"),
    "a residual": (WithResidual, "computes something else than silu"),
    "dropout": (lambda: WithDropout(0.3), "dropout inside"),
    "a gradient of its own": (Detached, "a gradient of its own"),
    "no activation, a product of low rank": (lambda: Plain(lambda z: z), None),
    "mixes its elements": (lambda: Plain(lambda z: z.softmax(-1)), None),
}


@pytest.mark.parametrize(("make", "reason"), UNSERVED.values(), ids=UNSERVED)
def test_mlps_that_only_look_like_it(make: Callable[[], nn.Module], reason: str | None) -> None:
    host = Host(make()).train()
    ours = applied(host)
    assert_close(run(ours, inputs()), run(host, inputs()))
    report = accel.report(ours)
    assert report.places("mlp") == 0
    found = [refusal.reason for fusion, refusal in report.refusals if fusion == "mlp" and refusal.what == "inner"]
    assert (len(found) == 1 and reason in found[0]) if reason else not found


@pytest.mark.parametrize("name", ["gelu_new", "relu2", "quick_gelu", "relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    host = Host(Plain(ACT2FN[name])).to(dtype)
    ours = applied(host)
    mine, theirs = run(ours, inputs().to(dtype)), run(host, inputs().to(dtype))
    truth = run(host.double(), inputs().to(dtype).double())
    assert_as_good(mine, theirs, truth, dtype)
    assert accel.report(ours).counts.fused == {"mlp": 1}


@pytest.mark.parametrize("name", ["gelu_new", "relu2", "quick_gelu", "relu", "gelu"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    host = Host(Plain(ACT2FN[name])).train()
    ours = applied(host)
    found = run(torch.compile(ours, backend="aot_eager", fullgraph=True), inputs())  # type: ignore[arg-type]
    assert_close(Step(found.loss, {"x": found.gradients["x"], **gradients(ours)}), run(host, inputs()))


def test_a_last_linear_in_another_dtype_is_the_original() -> None:
    host = Host(LastInFloat32()).bfloat16()
    host.inner.wo.float()
    ours = applied(host)
    x = inputs().bfloat16()
    assert_close(run(ours, x), run(host, x))
    assert accel.report(ours).counts.passed_on == {"mlp: its linears have weights of several dtypes": 1}


def test_what_is_kept_for_backward_is_no_more_than_in_the_original() -> None:
    """The input, what the first linear yields or the activation, and what the last linear takes."""

    def kept(host: nn.Module) -> int:
        found: dict[int, int] = {}
        own = {parameter.data_ptr() for parameter in host.parameters()}

        def note(x: torch.Tensor) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            host(inputs())
        return sum(size for address, size in found.items() if address not in own)

    for name in NAMES:
        host = Host(Plain(ACT2FN[name])).train()
        assert kept(applied(host)) <= kept(host), name
    host = Host(Plain(ACT2FN["gelu_new"])).train()
    assert kept(applied(copy.deepcopy(host))) * 2 < kept(host)
