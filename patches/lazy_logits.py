"""Logits that are not built unless somebody looks at them.

In a training step with labels the head returns `LazyLogits` in place of logits: a plain object with `__torch_function__` (not a
tensor subclass, which torch.compile breaks on) that stands for

    dtype( after * tanh(scale * (hidden @ weight[:vocab].T + bias[:vocab])) )         without tanh: dtype( scale * (...) )

or for a sum of such products (see head_call.py): an adapter around the head runs its own forward, on lazy products. Slices and
views act on `hidden`; casts, sums, scales and a soft-cap are recorded; `F.cross_entropy` on it runs the fused
`linear_cross_entropy`. Anything else builds the real logits with their ordinary graph, and is counted.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from automodel_accel.patches.head_call import HeadCall, LossRequest, Recipe, call_head
from automodel_accel.patches.vocab import vocab_length

IGNORED = -100


class LazyLogits:
    """Stands for logits [..., vocab] of `hiddens`: one [..., H] per summand of the call; see the module's docstring.

    A view of other lazy logits (`base`: those, and the method and arguments that made it) is built as a view of theirs, so
    that a write into one is seen in the other. `contiguous` says whether the real ones would be.
    """

    def __init__(
        self,
        hiddens: tuple[torch.Tensor, ...],
        call: HeadCall,
        recipe: Recipe,
        base: "tuple[LazyLogits, str, tuple[Any, ...]] | None" = None,
        contiguous: bool = True,
    ) -> None:
        self._hiddens, self._call, self._recipe, self._base, self._contiguous = hiddens, call, recipe, base, contiguous
        self._own: torch.Tensor | None = None

    def _with(self, hiddens: tuple[torch.Tensor, ...] | None = None, **changes: Any) -> "LazyLogits":
        recipe = replace(self._recipe, **changes) if changes else self._recipe
        return LazyLogits(self._hiddens if hiddens is None else hiddens, self._call, recipe)

    def _view(
        self, hiddens: tuple[torch.Tensor, ...], name: str, arguments: tuple[Any, ...], contiguous: bool, vocab: int
    ) -> "LazyLogits":
        recipe = replace(self._recipe, vocab=vocab)
        return LazyLogits(hiddens, self._call, recipe, (self, name, arguments), contiguous)

    @property
    def _hidden(self) -> torch.Tensor:
        return self._hiddens[0]

    @property
    def _real(self) -> torch.Tensor | None:
        """The real logits if these, or those that they are a view of, were built."""
        if self._own is None and self._base is not None:
            of, name, arguments = self._base
            real = of._real
            self._own = None if real is None else getattr(real, name)(*arguments)
        return self._own

    def materialise(self, why: str) -> torch.Tensor:
        """The real logits, built once, with their autograd graph; `why` is counted."""
        real = self._real
        if real is None and self._base is not None:
            self._base[0].materialise(why)
            real = self._real
        if real is None:
            real = self._own = self._call.logits(self._hiddens, self._recipe, why)
        return real

    # metadata, as a tensor has it

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._recipe.vocab))

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self._recipe.dtype

    @property
    def ndim(self) -> int:
        return self._hidden.dim()

    @property
    def requires_grad(self) -> bool:
        linears = [summand.linear for summand in self._call.summands]
        return any(x.requires_grad for x in self._hiddens) or any(
            p.requires_grad for m in linears for p in m.parameters()
        )

    @property
    def is_cuda(self) -> bool:
        return self._hidden.is_cuda

    def dim(self) -> int:
        return self._hidden.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    # recorded operations

    @property
    def _can_scale(self) -> bool:
        return self._real is None and self._recipe.is_rounded

    def add(self, other: Any, *, alpha: Any = 1) -> Any:
        total = self._plus(other) if alpha == 1 else None
        if total is None:
            return torch.add(self.materialise("add"), real(other, "add"), alpha=alpha)
        return total

    def __add__(self, other: Any) -> Any:
        total = self._plus(other)
        return self.materialise("__add__") + real(other, "__add__") if total is None else total

    __radd__ = __add__

    def _plus(self, other: Any) -> "LazyLogits | None":
        """The sum with other lazy logits (such as an adapter's), or with one vector for all rows; None for anything else."""
        if not self._is_sum() or not isinstance(other, LazyLogits | torch.Tensor) or other.device != self.device:
            return None
        dtype = torch.promote_types(self.dtype, other.dtype)
        if isinstance(other, LazyLogits):
            is_product = len(other._call.summands) == 1 and other._call.row is None and other._is_sum(scaled=True)
            if not is_product or other.shape != self.shape:
                return None
            summand = replace(other._call.summands[0], factor=other._recipe.scale)
            call = self._call.plus(summand, self.device)
            recipe = replace(self._recipe, dtype=dtype, summed_in=dtype)
            return None if call is None else LazyLogits((*self._hiddens, *other._hiddens), call, recipe)
        is_row = other.dim() in range(1, self.dim() + 1) and other.shape[-1] == other.numel() == self._recipe.vocab
        if not is_row or dtype != self._recipe.computed_in or not self._recipe.is_rounded:
            return None
        return LazyLogits(self._hiddens, self._call.plus_row(other.reshape(-1)), self._recipe)

    def _is_sum(self, scaled: bool = False) -> bool:
        """Whether this is what the head gave, or a sum with it, and nothing came after that but, if `scaled`, a factor."""
        recipe = self._recipe
        whole = recipe.vocab == vocab_length(self._call.summands[0].linear)
        uncast = recipe.dtype == (recipe.summed_in or recipe.computed_in)
        return self._real is None and whole and uncast and not recipe.tanh and (scaled or recipe.scale == 1.0)

    def mul(self, other: Any) -> Any:
        if not self._can_scale or not _is_factor(other):
            return self.materialise("mul") * real(other, "mul")
        if self._recipe.tanh:
            return self._with(after=self._recipe.after * other)
        return self._with(scale=self._recipe.scale * other)

    def div(self, other: Any, *, rounding_mode: str | None = None) -> Any:
        if not self._can_scale or not _is_factor(other) or rounding_mode is not None:
            return torch.div(self.materialise("div"), real(other, "div"), rounding_mode=rounding_mode)
        return self.mul(1.0 / other)

    __mul__ = __rmul__ = multiply = mul
    __truediv__ = true_divide = divide = div

    def tanh(self) -> Any:
        if not self._can_scale or self._recipe.tanh:
            return self.materialise("tanh").tanh()
        return self._with(tanh=True)

    def float(self) -> Any:
        return self.to(torch.float32)

    def double(self) -> Any:
        return self.to(torch.float64)

    def half(self) -> Any:
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        return self.to(torch.bfloat16)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        dtype, device = _dtype_and_device(args, kwargs)
        moves = (
            device is not None
            and device != self.device
            and not (device.index is None and device.type == self.device.type)
        )
        if self._real is not None or moves or not (dtype is None or dtype.is_floating_point):
            return self.materialise("to").to(*args, **kwargs)
        if dtype is None or dtype == self.dtype:
            return self
        if self._recipe.is_rounded:
            return self._with(dtype=dtype)
        if dtype != self._recipe.computed_in:
            return self.materialise("to").to(*args, **kwargs)
        return self._with(dtype=dtype, summed_in=dtype)

    def type(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.dtype):
            return self.to(args[0])
        return self.materialise("type").type(*args, **kwargs)

    def contiguous(self, *args: Any, **kwargs: Any) -> Any:
        return self if self._contiguous else self.clone()

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return self._with() if self._real is None else self._real.clone()

    def detach(self) -> Any:
        return self.materialise("detach").detach()

    def view(self, *shape: Any, **named: Any) -> Any:
        sizes = _sizes(shape, named)
        if self._real is not None or not self._keeps_vocab(sizes):
            return self.materialise("view").view(*shape, **named)
        hiddens = tuple(hidden.reshape(*sizes[:-1], hidden.shape[-1]) for hidden in self._hiddens)
        return self._view(hiddens, "view", sizes, self._contiguous, self._recipe.vocab)

    def reshape(self, *shape: Any, **named: Any) -> Any:
        sizes = _sizes(shape, named)
        if self._real is not None or not self._keeps_vocab(sizes):
            return self.materialise("reshape").reshape(*shape, **named)
        return self.contiguous().view(*sizes)

    def _keeps_vocab(self, sizes: tuple[Any, ...]) -> bool:
        if not all(isinstance(size, int) for size in sizes):
            return False
        if sizes[-1] == -1:
            return -1 not in sizes[:-1] and math.prod(sizes[:-1]) * self._recipe.vocab == self.numel()
        return bool(sizes[-1] == self._recipe.vocab)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        end = end_dim if end_dim >= 0 else self.dim() + end_dim
        if self._real is not None or end >= self.dim() - 1:
            return self.materialise("flatten").flatten(start_dim, end_dim)
        hidden = self._hidden.flatten(start_dim, end)
        return self.reshape(*hidden.shape[:-1], self._recipe.vocab)

    def __getitem__(self, index: Any) -> Any:
        lazy = self._index(index) if self._real is None else None
        return self.materialise("indexing")[index] if lazy is None else lazy

    def _index(self, index: Any) -> "LazyLogits | None":
        """Index the leading dimensions of `hidden`, and take a prefix of the vocabulary; None for anything else."""
        parts = index if isinstance(index, tuple) else (index,)
        used = sum(_dims_used(part) for part in parts)
        if used > self.dim() or any(part is None or isinstance(part, bool) for part in parts):
            return None
        if any(part is Ellipsis for part in parts):
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            parts = (*parts[:at], *(slice(None),) * (self.dim() - used), *parts[at + 1 :])
            used = self.dim()
        vocab: int | None = self._recipe.vocab
        leading = parts
        if used == self.dim():
            vocab, leading = _prefix(parts[-1], self._recipe.vocab), parts[:-1]
        if vocab is None:
            return None
        hiddens = tuple(hidden[leading] for hidden in self._hiddens) if leading else self._hiddens
        if not all(isinstance(part, int | slice) for part in parts):
            return self._with(hiddens, vocab=vocab)  # a copy
        contiguous = self._contiguous and vocab == self._recipe.vocab and _keeps_rows_together(leading)
        return self._view(hiddens, "__getitem__", (index,), contiguous, vocab)

    # the loss

    def _cross_entropy(self, target: Any, **kwargs: Any) -> torch.Tensor | None:
        """The fused loss, or None where these arguments need the logits."""
        weight, reduction = kwargs.pop("weight", None), kwargs.pop("reduction", "mean")
        ignore_index, smoothing = kwargs.pop("ignore_index", -100), kwargs.pop("label_smoothing", 0.0)
        z_loss = kwargs.pop("z_loss", 0.0)
        classes = isinstance(target, torch.Tensor) and target.dim() == 1 and target.dtype == torch.long
        legacy = any(value is not None for value in kwargs.values())  # size_average, reduce
        if not self._can_scale or self.dim() != 2 or not classes or weight is not None or legacy:
            return None
        head, *others = self._call.summands
        if not all(summand.is_whole for summand in others):
            return None
        low_rank = tuple(zip(others, self._hiddens[1:], strict=True))
        request = LossRequest(
            self._recipe, target, ignore_index, reduction, smoothing, z_loss, low_rank, self._call.row
        )
        loss: torch.Tensor = call_head(head.linear, self._hidden, request)
        self._call.loss_taken = True
        self._call.note_versions()
        # autocast computes cross_entropy in float32; otherwise it has the dtype of the logits
        return loss.float() if torch.is_autocast_enabled(self.device.type) else loss.to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy:
            names = (
                "input",
                "target",
                "weight",
                "size_average",
                "ignore_index",
                "reduce",
                "reduction",
                "label_smoothing",
            )
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            logits = named.pop("input")
            loss = logits._cross_entropy(named.pop("target"), **named) if isinstance(logits, cls) else None
            if loss is not None:
                return loss
        name = function.__name__
        if args and isinstance(args[0], cls) and name in _RECORDED:
            return getattr(args[0], name)(*args[1:], **kwargs)
        if name in ("mul", "add") and len(args) == 2 and isinstance(args[1], cls) and not kwargs:
            return getattr(args[1], name)(args[0])
        return function(*tree_map(lambda x: real(x, name), args), **tree_map(lambda x: real(x, name), kwargs))

    # what cannot be answered after the loss, as it had no logits to differentiate by

    def register_hook(self, hook: Callable[..., Any]) -> Any:
        return self._watched("register_hook").register_hook(hook)  # type: ignore[no-untyped-call]

    def retain_grad(self) -> None:
        self._watched("retain_grad").retain_grad()

    def _watched(self, why: str) -> torch.Tensor:
        if self._call.loss_taken:
            raise RuntimeError(
                f"{why}: the loss was computed without logits, so these have no gradient of it; "
                "to have one, apply(model, loss=False)."
            )
        return self.materialise(why)

    # everything else builds the logits

    def __setitem__(self, index: Any, value: Any) -> None:
        self.materialise("writing into logits")[index] = value

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.materialise("iteration"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"'LazyLogits' stands for a tensor, and a tensor has no attribute {name!r}")
        return getattr(self.materialise(name), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.Tensor.clone, (self.materialise("pickle").detach(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialise("deepcopy").detach().clone()


def cross_entropy(
    logits: Any,
    target: torch.Tensor,
    *,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """`F.cross_entropy` of lazy or of real logits, with z_loss * lse^2 added to the loss of each token that counts.

    Args:
        logits: [N, V].
        target: [N], int64; `ignore_index` does not count.
        ignore_index: As torch's.
        reduction: "mean" over the targets that count, or "sum".
        label_smoothing: As torch's.
        z_loss: The factor (Chowdhery et al., "PaLM", 2022, section 5).
    """
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    loss = logits._cross_entropy(target, z_loss=z_loss, **options) if isinstance(logits, LazyLogits) else None
    if loss is not None:
        return loss
    logits = real(logits, "cross_entropy")
    found = F.cross_entropy(logits, target, **options)
    if not z_loss:
        return found
    counts = target != ignore_index
    squares = torch.where(counts, torch.logsumexp(logits, -1).square(), 0.0).sum()
    return found + z_loss * (squares / counts.sum() if reduction == "mean" else squares)


def real(value: Any, why: str) -> Any:
    """The value itself, or real logits for lazy ones."""
    return value.materialise(why) if isinstance(value, LazyLogits) else value


def _dtype_and_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.dtype | None, torch.device | None]:
    dtype = device = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.device | str):
            device = torch.device(value)
        elif isinstance(value, torch.Tensor | LazyLogits):
            dtype, device = value.dtype, value.device
    return dtype, device


def _is_factor(value: Any) -> bool:
    """A number that scales, and that can be divided by."""
    return isinstance(value, int | float) and value != 0 and math.isfinite(value)


def _sizes(shape: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """The sizes given to view or reshape, in any of their spellings."""
    given = (*shape, *named.values())
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else given


def _keeps_rows_together(leading: tuple[Any, ...]) -> bool:
    """Whether basic indices of the leading dimensions take one block of memory."""
    first_is_block = not leading or isinstance(leading[0], int) or leading[0].step in (None, 1)
    return first_is_block and all(part == slice(None) for part in leading[1:])


def _dims_used(part: Any) -> int:
    if part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, torch.Tensor) and part.dtype == torch.bool else 1


def _prefix(part: Any, vocab: int) -> int | None:
    """How much of the vocabulary a slice from its start takes, or None for another index."""
    if not isinstance(part, slice) or part.step not in (None, 1) or part.start not in (None, 0):
        return None
    if part.stop is None:
        return vocab
    return int(min(part.stop, vocab) if part.stop >= 0 else max(vocab + part.stop, 0))


_RECORDED = frozenset(
    {"add", "tanh", "mul", "div", "true_divide", "multiply", "divide", "flatten", "reshape", "clone", "detach"}
)

_OPERATORS = "sub rsub rtruediv floordiv rfloordiv mod rmod pow rpow neg pos abs matmul rmatmul ge gt le lt eq ne"
_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow"

for _name in f"{_OPERATORS} {_IN_PLACE} bool float int".split():

    def _operator(self: LazyLogits, *args: Any, _name: str = f"__{_name}__") -> Any:
        return getattr(self.materialise(_name), _name)(*(real(arg, _name) for arg in args))

    setattr(LazyLogits, f"__{_name}__", _operator)
LazyLogits.__hash__ = object.__hash__  # type: ignore[method-assign]
