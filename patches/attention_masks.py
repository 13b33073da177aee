"""Masks that are not built: what a causal mask says about a row, as the models' own mask functions would have said it.

A `LazyMask` stands in for the dense [B, 1, S, S] tensor of `create_causal_mask` and its kin. Attention reads from it the window
and the documents of a packed row; anything else that touches it gets the real mask, built by the original function.
"""

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._pytree import tree_map

from automodel_accel.patches.contract import Counts
from automodel_accel.patches.rebind import loaded_globals, named_in, rebind_within

SERVED = ("sdpa", "eager")
MASK_MAKERS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")
_READ = frozenset({"config", "inputs_embeds", "input_embeds", "attention_mask", "past_key_values", "position_ids"})
_TOKENS = frozenset({"input_ids", "inputs_embeds", "labels", "shift_labels", "num_items_in_batch"})
_WITHOUT_EFFECT = frozenset({"layer_idx", "cache_position"})  # on the mask of a row that nothing was cached before


_COUNTS: ContextVar[Any] = ContextVar("method that counts positions", default=None)  # while it runs on tokens alone


class LazyMask:
    """A causal mask that is built only when somebody looks.

    Args:
        window: Tokens that a query sees, its own included; None for all.
        documents: [B or 1, S] document numbers of packed rows; None where there is one document a row.
        like: A tensor of the mask's device and dtype, or None where the mask is bool.
        shape: (B, 1, S, S).
        make: Builds the real mask.
    """

    def __init__(
        self,
        window: int | None,
        documents: torch.Tensor | None,
        shape: tuple[int, ...],
        make: Callable[[], torch.Tensor],
    ) -> None:
        self.window = window
        self.documents = documents
        self.shape = torch.Size(shape)
        self._make = make
        self._real: torch.Tensor | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def materialise(self) -> torch.Tensor:
        """The real mask, built once."""
        if self._real is None:
            self._real = self._make()
        return self._real

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) <= self.ndim and all(map(_takes_all, parts, self.shape)):
            return self
        return self.materialise()[index]

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*tree_map(real, args), **tree_map(real, kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"'LazyMask' stands for a tensor, and a tensor has no attribute {name!r}")
        return getattr(self.materialise(), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.Tensor.clone, (self.materialise(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialise().clone()


def _takes_all(part: Any, length: int) -> bool:
    if not isinstance(part, slice) or part.start not in (None, 0) or part.step not in (None, 1):
        return False
    return part.stop is None or (isinstance(part.stop, int) and part.stop >= length)


for _name in [
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "and",
    "rand",
    "or",
    "ror",
    "xor",
    "invert",
    "neg",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "bool",
    "iter",
    "len",
]:

    def _operator(self: LazyMask, *args: Any, _name: str = f"__{_name}__") -> Any:
        return getattr(self.materialise(), _name)(*map(real, args))

    setattr(LazyMask, f"__{_name}__", _operator)
LazyMask.__hash__ = object.__hash__  # type: ignore[method-assign]


def real(value: Any) -> Any:
    """The value itself, or the real mask for a lazy one."""
    return value.materialise() if isinstance(value, LazyMask) else value


class Documents:
    """Document numbers of packed rows, from position ids; worked out once for all layers that get the same tensor.

    Positions that a model counts itself, as it was given tokens alone, depend on their number: they are looked at once.
    """

    def __init__(self) -> None:
        self._last: dict[bool, tuple[Any, int, torch.Tensor | None]] = {}
        self._counted: dict[tuple[Any, ...], torch.Tensor | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Documents":
        return Documents()

    def of(self, position_ids: torch.Tensor, strict: bool) -> torch.Tensor | None:
        """[B or 1, S] numbers, or None where no row holds two documents (which a compiled graph cannot know).

        Args:
            position_ids: [B or 1, S].
            strict: Whether each step but +1 begins a document, as in transformers' own masks; else only rows that go up by 1
                and back to 0 are packed.
        """
        if torch.compiler.is_compiling() or position_ids.is_inference():
            return _numbers(position_ids, strict)
        at, version, found = self._last.get(strict, (lambda: None, 0, None))
        if at() is not position_ids or version != position_ids._version:
            found = self._of_new(position_ids, strict)
            self._last[strict] = weakref.ref(position_ids), position_ids._version, found
        return found

    def _of_new(self, position_ids: torch.Tensor, strict: bool) -> torch.Tensor | None:
        counter = _COUNTS.get()
        if counter is None:
            return _numbers(position_ids, strict)
        key = counter, position_ids.shape, position_ids.device, strict
        if key not in self._counted:
            self._counted[key] = _numbers(position_ids, strict)
        return self._counted[key]


def _numbers(position_ids: torch.Tensor, strict: bool) -> torch.Tensor | None:
    before, after = position_ids[:, :-1], position_ids[:, 1:]
    starts = after != before + 1
    if not strict:
        starts = starts & (~starts | (after == 0)).all(-1, keepdim=True)
    numbers = torch.nn.functional.pad(starts.cumsum(-1, dtype=torch.int32), (1, 0))
    if torch.compiler.is_compiling() or bool((numbers[:, -1:] > 0).any()):
        return numbers
    return None


def makers_in(module_class: type) -> dict[str, tuple[str, ...]]:
    """Method -> names of the mask functions that it calls."""
    found = {}
    for name in ("forward", "_create_attention_masks"):
        method = getattr(module_class, name, None)
        innermost = inspect.unwrap(method) if method is not None else None
        if isinstance(innermost, types.FunctionType):
            called = loaded_globals(innermost).intersection(MASK_MAKERS)
            known = [maker for maker in called if isinstance(innermost.__globals__.get(maker), types.FunctionType)]
            if known:
                found[name] = tuple(sorted(known))
    return found


def looks_at_types(module_class: type) -> bool:
    """Whether the forward asks of what type its mask is: a lazy one would give another answer than the tensor."""
    forward = inspect.unwrap(module_class.forward) if hasattr(module_class, "forward") else None
    if not isinstance(forward, types.FunctionType):
        return False
    code = forward.__code__
    return {"isinstance", "Tensor"} <= set(code.co_names) and "attention_mask" in code.co_varnames


def with_lazy_masks(method: types.FunctionType, documents: Documents, counts: Counts) -> types.FunctionType:
    """The method, under all its decorators, with mask functions that answer with lazy masks."""
    changed = with_mask_functions(method, lambda name, original: lazy_maker(original, documents, counts))
    return _telling_of_counts(changed) if {"arange"} == named_in(method) & {"arange", "cumsum"} else changed


def _telling_of_counts(method: types.FunctionType) -> types.FunctionType:
    """The method of a model that counts positions from 0 on where it was given none, which says so while it runs."""
    names = tuple(inspect.signature(method).parameters)

    @functools.wraps(method)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
        tensors = {name for name, value in given.items() if isinstance(value, torch.Tensor)}
        empty = _is_empty(given.get("past_key_values"))
        if torch.compiler.is_compiling() or not empty or not tensors or not tensors <= _TOKENS:
            return method(*args, **kwargs)
        before = _COUNTS.set(innermost)
        try:
            return method(*args, **kwargs)
        finally:
            _COUNTS.reset(before)

    innermost = inspect.unwrap(method).__code__
    return forward  # type: ignore[return-value]


def with_mask_functions(
    method: types.FunctionType, exchanged: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> types.FunctionType:
    """The method, under all its decorators, with `exchanged(name, mask function)` for each mask function that it calls."""
    innermost = inspect.unwrap(method)
    makers = loaded_globals(innermost).intersection(MASK_MAKERS)
    replacements = {
        name: exchanged(name, innermost.__globals__[name])
        for name in makers
        if isinstance(innermost.__globals__.get(name), types.FunctionType)
    }
    return rebind_within(method, replacements)


def lazy_maker(original: Callable[..., Any], documents: Documents, counts: Counts) -> Callable[..., Any]:
    """A mask function that answers with a `LazyMask` where the original would build one that can be said in few words."""
    names = tuple(inspect.signature(original).parameters)
    kind = original.__name__

    def maker(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if isinstance(given.get("attention_mask"), LazyMask):
            return given["attention_mask"]
        said = _say(kind, given, documents)
        if said is None:
            return original(*args, **kwargs)
        window, numbers = said
        embeds: torch.Tensor = given.get("inputs_embeds", given.get("input_embeds"))  # type: ignore[assignment]
        shape = (embeds.shape[0], 1, embeds.shape[1], embeds.shape[1])

        # by the time it is built the cache has grown; that it was there made the original disregard position ids
        later = (
            {**given, "past_key_values": None, "position_ids": None}
            if given.get("past_key_values") is not None
            else given
        )

        def make() -> torch.Tensor:
            counts.count(counts.passed_on, "attention: a mask was looked at")
            return original(**later)  # type: ignore[no-any-return]

        return LazyMask(window, numbers, shape, make)

    return maker


def _say(kind: str, given: Mapping[str, Any], documents: Documents) -> tuple[int | None, torch.Tensor | None] | None:
    """(window, documents) of the mask, or None where these do not say it all or the original would build none."""
    config, cache, position_ids = given["config"], given.get("past_key_values"), given.get("position_ids")
    embeds = given.get("inputs_embeds", given.get("input_embeds"))
    other = (name for name, value in given.items() if value is not None and name not in _READ | _WITHOUT_EFFECT)
    if any(given[name] is not True or name != "allow_is_causal_skip" for name in other) or embeds is None:
        return None
    implementation = config._attn_implementation
    if implementation not in SERVED or not getattr(config, "is_causal", True) or embeds.shape[1] < 2:
        return None
    if not _is_empty(cache) or not _hides_nothing(given.get("attention_mask"), embeds):
        return None
    length = embeds.shape[1]
    numbers = None
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == length:
        strict = cache is None and given.get("attention_mask") is None
        numbers = documents.of(position_ids, strict)
    window = None
    if kind == "create_sliding_window_causal_mask":
        window = config.sliding_window
        if not isinstance(window, int):
            return None
    if kind == "create_chunked_causal_mask":
        numbers = _chunks(config.attention_chunk_size, numbers, position_ids, embeds)
    if window is not None and window >= length:
        window = None
    if implementation == "sdpa" and window is None and numbers is None:
        return None  # the original builds none either
    return window, numbers


def _chunks(
    size: int, numbers: torch.Tensor | None, position_ids: torch.Tensor | None, embeds: torch.Tensor
) -> torch.Tensor | None:
    """Numbers of the chunks of each document: to attention, a chunk is one."""
    if embeds.shape[1] <= size:
        return numbers
    tokens = torch.arange(embeds.shape[1], device=embeds.device)[None] if numbers is None else position_ids
    assert tokens is not None
    starts = tokens % size == 0
    if numbers is not None:
        starts = starts | torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))
    return starts.cumsum(-1, dtype=torch.int32)


def _is_empty(cache: Any) -> bool:
    """Whether nothing was cached yet, by a cache that grows; one of fixed size has keys that are not there yet."""
    if cache is None:
        return True
    if getattr(cache, "is_compileable", False):
        return False
    seen = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    return isinstance(seen, int) and seen == 0


def _hides_nothing(mask: Any, embeds: torch.Tensor) -> bool:
    """Whether a padding mask is absent, or all ones over just these tokens. Asks the device once, as the originals do."""
    if mask is None:
        return True
    if torch.compiler.is_compiling() or not isinstance(mask, torch.Tensor) or mask.shape != embeds.shape[:2]:
        return False
    return bool(mask.all())
