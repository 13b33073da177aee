"""Norms and MLPs that look like the ones we serve. Each states what a probe could overlook."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

SIZE = 32
INNER = 48


class Rms(nn.Module):
    """Llama's norm, with hooks for subclasses to differ in one thing."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.normed(x.float()).to(x.dtype)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Gated(Rms):
    """With one input a plain norm, with two a gated one."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x if gate is None else x * F.silu(gate))


class ByKeyword(Rms):
    """Takes its input by name, and a residual."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden_states if residual is None else hidden_states + residual)


class Grouped(Rms):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (4, -1))
        return super().normed(groups).flatten(-2)


class EpsOutside(Rms):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class EpsAsFloor(Rms):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.pow(2).mean(-1, keepdim=True).clamp_min(self.eps).sqrt()


class Centred(Rms):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return super().normed(x - x.mean(-1, keepdim=True))


class Unbiased(Rms):
    """Divides by one less."""

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (SIZE - 1) + self.eps)


class UnitLength(Rms):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1)


class Partial(Rms):
    """The mean square of the first half."""

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x[..., : SIZE // 2].pow(2).mean(-1, keepdim=True) + self.eps)


class ScaledByMatrix(Rms):
    """A weight of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, SIZE) + 0.5)


class WithBias(Rms):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.bias


class Squared(Rms):
    """The weight's square."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.square() * self.normed(x)


class Clamped(Rms):
    """Differs far out only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-50, 50))


class ClampedOutput(Rms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-4, 4)


class Noisy(Rms):
    """Differs in training only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + torch.randn_like(y) * 0.1 if self.training else y


class StraightThrough(Rms):
    """Right in value, wrong in gradient: the root mean square is held constant."""

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()


class ScaledGradient(Rms):
    """The weight learns at half speed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        return (0.5 * weight + 0.5 * weight.detach()) * self.normed(x)


class RoundedTwice(Rms):
    """Squares in the dtype of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Tuple(Rms):
    """Returns the residual too."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), x


class PerHead(Rms):
    """Takes four dimensions in another way than three."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2) if x.dim() == 4 else super().forward(x)


class SmallNamedEps(Rms):
    """A dropout rate that comes first among the attributes, and an eps that only a zero row shows."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.dropout = 0.0
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.eps = 1e-12


class HiddenEps(Rms):
    """An eps that no attribute holds."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 3e-6)


class PrivateSwitch(Rms):
    """Two instances of one class and shape that differ in a private attribute."""

    def __init__(self, plus_one: bool) -> None:
        super().__init__()
        self._plus_one = plus_one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight + 1.0 if self._plus_one else self.weight) * self.normed(x.float()).to(x.dtype)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def nearly_silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.00001 * x)


def clamped_silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x).clamp(max=7.0)


def tanh_gelu_of_rounded_constant(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.79788 * (x + 0.044715 * x**3)))


class Mlp(nn.Module):
    """SwiGLU under other names, with hooks for subclasses to differ in one thing."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor] = F.silu, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(SIZE, INNER, bias=bias), nn.Linear(SIZE, INNER, bias=bias)
        self.w2 = nn.Linear(INNER, SIZE, bias=bias)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Swapped(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.w1(x) * self.act(self.w3(x)))


class Square(Mlp):
    """Three linears of one shape: their sizes say nothing of their roles."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(SIZE, SIZE) for _ in range(3))
        del self.w1, self.w2, self.w3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.c(x) * F.gelu(self.a(x)))


class Fused(Mlp):
    """Gate and up from one linear, in either order."""

    def __init__(self, order: str, square: bool = False) -> None:
        super().__init__()
        self.order = order
        inner = SIZE if square else INNER
        self.both, self.down = nn.Linear(SIZE, 2 * inner), nn.Linear(inner, SIZE)
        del self.w1, self.w2, self.w3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.both(x).chunk(2, -1)
        gate, up = (first, second) if self.order == "gate_up" else (second, first)
        return self.down(F.silu(gate) * up)


class Interleaved(Fused):
    def __init__(self) -> None:
        super().__init__("gate_up")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.both(x)
        return self.down(F.silu(both[..., ::2]) * both[..., 1::2])


class WithResidual(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class WithDropout(Mlp):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.dropout(self.act(self.w1(x)) * self.w3(x)))


class WithExtraKeyword(Mlp):
    """A keyword at call time changes what is computed."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * scale


class WithScale(Mlp):
    """A learned scale beside the linears."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((SIZE,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class ReadsWeights(Mlp):
    """Multiplies by the weights itself and so ignores biases, hooks and adapters of its linears."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        for linear in (self.w1, self.w2, self.w3):
            nn.init.normal_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, self.w1.weight), F.linear(x, self.w3.weight)
        return F.linear(self.act(gate) * up, self.w2.weight)


class ActivatesInFloat32(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.w1(x), self.w3(x)
        return self.w2((self.act(gate.float()) * up.float()).to(gate.dtype))


class NoActivation(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.w1(x) * self.w3(x))


class DetachedGate(Mlp):
    """Right in value, wrong in gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act(self.w1(x)).detach() * self.w3(x))


class Recording(Mlp):
    """Keeps a record of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        self.calls += 1
        return super().forward(x)
