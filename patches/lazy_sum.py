"""A residual sum that is not computed before somebody looks at it.

While a layer runs, what its branches return is handed out as `LazySum`: a plain object with `__torch_function__` (not a tensor
subclass, which torch.compile breaks on) that stands for

    residual + scale * branch                    or, before the sum, for   scale * branch   or   branch

A norm that receives the sum computes both in one kernel; anything else computes the sum with its ordinary graph. Every other
operation is torch's own, on real tensors.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from automodel_accel.kernels.recompute import region

Parts = tuple[torch.Tensor, torch.Tensor, float]  # branch, residual, scale


class LazySum:
    """Stands for a tensor; see the module's docstring.

    Either the tensor is known (`_known`), or what it is to be computed from: `_branch`, `_residual` (None for none), `_scale`.
    """

    def __init__(self, branch: torch.Tensor, residual: torch.Tensor | None = None, scale: float = 1.0) -> None:
        self._known: torch.Tensor | None = branch if residual is None and scale == 1.0 else None
        self._branch: torch.Tensor | None = branch
        self._residual, self._scale = residual, scale
        self._versions = _versions(branch, residual)
        self._region = region()

    @property
    def parts(self) -> Parts | None:
        """(branch, residual, scale) of a sum that was not computed yet, and made in this region (see there); else None."""
        if self._known is not None or self._residual is None or self._branch is None or self._region != region():
            return None
        self._check_versions()
        return self._branch, self._residual, self._scale

    def settle(self, known: torch.Tensor) -> None:
        """Give the value, computed by somebody else; what it came from is let go."""
        self._known, self._branch, self._residual = known, None, None

    @property
    def tensor(self) -> torch.Tensor:
        """The value, computed once, with its autograd graph.

        Raises:
            RuntimeError: a part was written to since, or a custom autograd function was given this object for a tensor.
        """
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _inside_a_function():
            raise RuntimeError(
                "a custom autograd function received a lazy residual sum in place of a tensor, and would lose its gradient; "
                "apply(model, residual=False)."
            )
        if self._known is None:
            self._check_versions()
            if torch.is_grad_enabled():
                self.settle(self._compute())
            else:
                with torch.enable_grad():  # as when it was recorded
                    self.settle(self._compute())
        assert self._known is not None
        return self._known

    def _compute(self) -> torch.Tensor:
        assert self._branch is not None
        scaled = self._branch if self._scale == 1.0 else self._branch * self._scale
        return scaled if self._residual is None else self._residual + scaled

    def _check_versions(self) -> None:
        if self._branch is not None and self._versions != _versions(self._branch, self._residual):
            raise RuntimeError(
                "a tensor was written to in place between a residual sum and its first use, which waits for the norm; "
                "apply(model, residual=False)."
            )

    # metadata, as a tensor has it

    def _like(self) -> torch.Tensor:
        known = self._branch if self._known is None else self._known
        assert known is not None
        return known

    @property
    def shape(self) -> torch.Size:
        return self._like().shape

    @property
    def device(self) -> torch.device:
        return self._like().device

    @property
    def dtype(self) -> torch.dtype:
        if self._known is not None or self._residual is None:
            return self._like().dtype
        return torch.promote_types(self._like().dtype, self._residual.dtype)

    @property
    def ndim(self) -> int:
        return self._like().dim()

    def dim(self) -> int:
        return self._like().dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazySum(shape={tuple(self.shape)}, dtype={self.dtype})"

    # recorded operations

    def add(self, other: Any, *, alpha: Any = 1) -> Any:
        if alpha != 1 or not _is_addend(self, other):
            return torch.add(self.tensor, tensor(other), alpha=alpha)
        if isinstance(other, LazySum) and other._is_scaled_branch() and not self._is_scaled_branch():
            return other.add(self)
        residual = tensor(other)
        if self._is_scaled_branch():
            assert self._branch is not None
            return LazySum(self._branch, residual, self._scale)
        branch = self.tensor
        if residual.dtype != branch.dtype == torch.promote_types(residual.dtype, branch.dtype):
            branch, residual = residual, branch  # the residual stream is the wider one
        return LazySum(branch, residual)

    def mul(self, other: Any) -> Any:
        if isinstance(other, int | float) and not isinstance(other, bool) and torch.is_grad_enabled():
            return LazySum(self.tensor, None, float(other))
        return lazy(self.tensor * tensor(other))

    def div(self, other: Any, *, rounding_mode: str | None = None) -> Any:
        return lazy(torch.div(self.tensor, tensor(other), rounding_mode=rounding_mode))

    __add__ = __radd__ = add
    __mul__ = __rmul__ = multiply = mul
    __truediv__ = true_divide = divide = div

    def _is_scaled_branch(self) -> bool:
        return self._known is None and self._residual is None

    def _dropout(self, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if p == 0.0 or not training:
            return self
        return lazy(F.dropout(self.tensor, p, training, inplace))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout and args and isinstance(args[0], cls):
            return args[0]._dropout(*args[1:], **kwargs)
        name = function.__name__
        if name in _RECORDED and args and isinstance(args[0], cls):
            return getattr(args[0], name)(*args[1:], **kwargs)
        if name in _COMMUTATIVE and len(args) == 2 and not kwargs and isinstance(args[1], cls):
            return getattr(args[1], name)(args[0])
        return function(*tree_map(tensor, args), **tree_map(tensor, kwargs))

    # everything else is done to the tensor

    def __getitem__(self, index: Any) -> Any:
        return self.tensor[tree_map(tensor, index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tensor[tree_map(tensor, index)] = tensor(value)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tensor)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"'LazySum' stands for a tensor, and a tensor has no attribute {name!r}")
        return getattr(self.tensor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.tensor, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.tensor.__reduce_ex__(2)  # type: ignore[no-any-return, no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.tensor.__deepcopy__(memo)  # type: ignore[no-any-return, no-untyped-call]


def lazy(value: Any) -> Any:
    """A branch's output that may become part of a lazy sum; anything but a plain floating tensor of rows stays what it is."""
    plain = type(value) is torch.Tensor and value.dim() > 1 and value.is_floating_point()
    return LazySum(value) if plain and torch.is_grad_enabled() else value


def tensor(value: Any) -> Any:
    """The value itself, or the tensor that a lazy sum stands for."""
    return value.tensor if isinstance(value, LazySum) else value


def tensors(values: Any) -> Any:
    """The same value, with tensors for lazy sums in it; lists and dicts, of any class, stay the same objects."""
    if isinstance(values, LazySum):
        return values.tensor
    if isinstance(values, tuple):
        return tree_map(tensor, values)
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for place, value in list(items):
        if isinstance(value, LazySum | tuple | list | dict):
            values[place] = tensors(value)
    return values


def _is_addend(ours: LazySum, other: Any) -> bool:
    """Whether `ours + other` is a residual sum: the same shape, on the same device, and with a graph."""
    plain = isinstance(other, LazySum) or type(other) is torch.Tensor
    return (
        plain
        and torch.is_grad_enabled()
        and other.shape == ours.shape
        and other.device == ours.device
        and other.dtype.is_floating_point
    )


def _versions(branch: torch.Tensor, residual: torch.Tensor | None) -> tuple[int, int] | None:
    """How often each was written to; None while torch.compile traces, which does not know."""
    if torch.compiler.is_compiling():
        return None
    return _version(branch), 0 if residual is None else _version(residual)


def _version(part: torch.Tensor) -> int:
    return 0 if part.is_inference() else part._version


def _inside_a_function() -> bool:
    """Whether a custom autograd function's forward is running: the one place where torch turns forward mode off."""
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


_OWN = frozenset({"_known", "_branch", "_residual", "_scale", "_versions", "_region"})
_COMMUTATIVE = frozenset({"add", "__add__", "__radd__", "mul", "__mul__", "__rmul__", "multiply"})
_RECORDED = _COMMUTATIVE | {"div", "__truediv__", "true_divide", "divide"}

_OPERATORS = "sub rsub rtruediv floordiv rfloordiv mod rmod pow rpow neg pos abs matmul rmatmul ge gt le lt eq ne and or xor invert"
_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow"

for _name in f"{_OPERATORS} {_IN_PLACE} bool float int".split():

    def _operator(self: LazySum, *args: Any, _name: str = f"__{_name}__") -> Any:
        return getattr(self.tensor, _name)(*map(tensor, args))

    setattr(LazySum, f"__{_name}__", _operator)
LazySum.__hash__ = object.__hash__  # type: ignore[method-assign]
