"""Attentions whose rotary function rotates, or only looks as if it did; each calls it as a global of this file."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8
SIZE = HEADS * HEAD_DIM
Pair = tuple[torch.Tensor, torch.Tensor]


def half_turn(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Pair:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + half_turn(q) * sin, k * cos + half_turn(k) * sin


def rotary_scaled(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    q, k = rotary(q, k, cos, sin)
    return q * 1.0001, k


def rotary_of_one_sign(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half_turn(q).abs() * sin, k * cos + half_turn(k) * sin


def rotary_clamped(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    q, k = rotary(q, k, cos, sin)
    return q.clamp(-100, 100), k.clamp(-100, 100)


def rotary_detached(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half_turn(q.detach()) * sin, k * cos + half_turn(k) * sin


def rotary_in_place(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    new_q, new_k = rotary(q, k, cos, sin)
    return q.copy_(new_q), k.copy_(new_k)


def rotary_of_keys(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    return q, rotary(q, k, cos, sin)[1]


def rotary_in_low_precision(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    rotated = rotary(*(x.bfloat16() for x in (q, k, cos, sin)))
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


def rotary_later(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float = 1.0, unsqueeze_dim: int = 1
) -> Pair:
    return rotary(q * scale, k * scale, cos, sin, unsqueeze_dim)


class Attention(nn.Module):
    """Makes its own cos and sin."""

    def __init__(self, dtype: torch.dtype | None = None, learned: bool = False) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.k, self.v = (nn.Linear(SIZE, KEY_HEADS * HEAD_DIM) for _ in range(2))
        self.frequencies = nn.Parameter(0.3 ** torch.arange(HEAD_DIM // 2), requires_grad=learned)
        self.dtype = dtype

    def tables(self, x: torch.Tensor) -> Pair:
        angles = torch.arange(x.shape[1])[None, :, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(self.dtype or x.dtype), angles.sin().to(self.dtype or x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.rotate(q, k, *self.tables(x))
        k, v = (y.repeat_interleave(HEADS // KEY_HEADS, 1) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary(q, k, cos, sin)


class Inherited(Attention):
    """Calls its rotary function in a method of its base."""


class ByKeyword(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary(q=q, k=k, sin=sin, cos=cos, unsqueeze_dim=1)


class InsideExpression(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return next(rotary(q, one, cos, sin) for one in (k,))


class TokenMajor(Attention):
    """Rotates before the heads are moved."""

    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        q, k = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
        return q.transpose(1, 2), k.transpose(1, 2)


class ByRow(Attention):
    """Rotates without a batch."""

    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        rows = [rotary(a, b, cos[0], sin[0], unsqueeze_dim=0) for a, b in zip(q, k, strict=True)]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


class UnknownKeyword(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary_later(q, k, cos, sin, scale=0.5)


class UnknownByPosition(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary_later(q, k, cos, sin, 0.5)


class OtherTables(Attention):
    """One row of cos and sin for all tokens, which torch broadcasts."""

    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary(q, k, cos[:, -1:], sin[:, -1:])


class WideKeys(Attention):
    """q and k of different dtypes."""

    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary(q, k.double(), cos, sin)


class Scaled(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary_scaled(q, k, cos, sin)


class OneSign(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary_of_one_sign(q, k, cos, sin)


class Clamped(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary_clamped(q, k, cos, sin)


class Detached(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary_detached(q, k, cos, sin)


class InPlace(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary_in_place(q * 1, k * 1, cos, sin)


class OnlyKeys(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary_of_keys(q, k, cos, sin)


class LowPrecision(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary_in_low_precision(q, k, cos, sin)


def decorated(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any) -> Any:
        return method(*args)

    return wrapper


class Decorated(Attention):
    @decorated
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotary(q, k, cos, sin)


class Static(Attention):
    @staticmethod
    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:  # type: ignore[override]
        return rotary(q, k, cos, sin)


CALLS = 0


class WritesGlobals(Attention):
    def rotate(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        global CALLS
        CALLS += 1
        return rotary(q, k, cos, sin)
