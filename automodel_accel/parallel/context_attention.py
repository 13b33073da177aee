"""Attention of a rank's own tokens over those of all context ranks, and the masks of whole rows that it needs.

The model's own mask functions are called as for the whole row, so that windows, chunks, documents and padding mean what they
mean to the model; a `ContextMask` then holds the rows of this rank's tokens. It is an argument of the layers, so that a layer
which is computed again in backward finds it. Keys and values are gathered in one collective; its backward sums their gradients.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from automodel_accel.kernels.attention import attention
from automodel_accel.parallel.context_rows import Rows
from automodel_accel.patches.attention_call import SDPA, UNDERSTOOD, WITHOUT_EFFECT
from automodel_accel.patches.attention_masks import SERVED, LazyMask

_NO_TENSOR = (
    "the causal mask of rows that are cut, which only an attention by transformers' interface understands; train the model with "
    "Mesh(context=1)."
)
_EMBEDS = ("inputs_embeds", "input_embeds")  # what transformers' versions call it
_NOT_CAUSAL = ("or_mask_function", "block_sequence_ids")  # what lets a token see later ones


@dataclass(slots=True)
class Running:
    """What is cut while a model's forward runs; empty at other times.

    Attributes:
        rows: How the rows of this forward are cut.
        whole: The filled rows, by the names of what mask functions take of them.
        own: This rank's part of the same.
        alone: Whether each token sees itself only: context_proof.py asks what else mixes tokens then.
    """

    rows: Rows | None = None
    whole: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    own: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    alone: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Running":
        return Running()


@dataclass(frozen=True, slots=True)
class ContextMask:
    """Who of all tokens is seen by this rank's.

    Attributes:
        rows: How the rows are cut.
        pieces: One mask a piece, [B or 1, 1, piece, first keys that may matter]: bool, True where visible, or numbers to add.
            Empty where each token sees itself only.
        plain: Whether a token sees all earlier ones.
    """

    rows: Rows | None
    pieces: tuple[torch.Tensor, ...]
    plain: bool

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError(f"context: {getattr(function, '__name__', function)} was given {_NO_TENSOR}")

    def __getitem__(self, index: Any) -> Any:
        raise ValueError(f"context: an index was asked of {_NO_TENSOR}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"'ContextMask' has no attribute {name!r}")
        raise ValueError(f"context: {name} was asked of {_NO_TENSOR}")


class MaskFunction:
    """Stands in for one mask function of transformers, or for what `apply` put in its place."""

    def __init__(self, name: str, original: Callable[..., Any], running: Running) -> None:
        import transformers.masking_utils

        self._names = tuple(inspect.signature(getattr(transformers.masking_utils, name)).parameters)
        self._original, self._running = original, running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The mask of a forward that is cut; else the original's."""
        if self._running.alone:
            return ContextMask(None, (), False)
        rows = self._running.rows
        if rows is None:
            return self._original(*args, **kwargs)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if (implementation := given["config"]._attn_implementation) not in SERVED:
            raise ValueError(
                f"context: the attention implementation is {implementation!r}, expected 'sdpa' or 'eager'; "
                "model.set_attn_implementation('sdpa')."
            )
        whole = self._whole(given, rows)
        mask = self._original(**whole)
        device = next(given[name].device for name in _EMBEDS if given.get(name) is not None)
        in_a_ring = mask is None and F.scaled_dot_product_attention is not SDPA
        pieces = () if in_a_ring else tuple(_visible(mask, start, rows, device) for start in rows.starts)
        return ContextMask(rows, pieces, mask is None)

    def _whole(self, given: dict[str, Any], rows: Rows) -> dict[str, Any]:
        """The arguments as they would be for the whole rows."""
        for name in _NOT_CAUSAL:
            if given.get(name) is not None:
                raise ValueError(f"context: the model's mask is not causal ({name}); train it with Mesh(context=1).")
        if given.get("past_key_values") is not None or not getattr(given["config"], "is_causal", True):
            raise ValueError("context: a cache, or a mask that is not causal; train the model with Mesh(context=1).")
        changed: dict[str, Any] = {}
        for name in ("attention_mask", "position_ids"):
            if given.get(name) is not None:
                if not _is_same(given[name], self._running.own[name]):
                    raise ValueError(
                        f"context: the model computes {name} of its own, from a part of the row; train it with Mesh(context=1)."
                    )
                changed[name] = self._running.whole[name]
        for name in _EMBEDS:
            if (embeds := given.get(name)) is not None:  # of which only the shape and the dtype are read
                changed[name] = embeds.detach()[:, :1].expand(-1, rows.length, -1)
        return {**given, **changed}


class ContextInterface:
    """Stands in for the `AttentionInterface` that one module's forward asks.

    Args:
        interface: The one before.
        running: Of the model.
        softcap: That the module is known to squeeze its scores with, or None.
        sinks: Whether it is known to have sinks.
    """

    def __init__(self, interface: Any, running: Running, softcap: float | None, sinks: bool) -> None:
        self._interface, self._running = interface, running
        self._softcap, self._sinks = softcap, sinks

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """Attention over all tokens where the mask says so, else the function that would have run."""
        original = self._interface.get_interface(name, default)

        def attention_forward(
            module: torch.nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            if isinstance(attention_mask, ContextMask):
                self._check(kwargs)
                return _attend(query, key, value, attention_mask, kwargs).transpose(1, 2).contiguous(), None
            if self._running.rows is not None or self._running.alone:
                raise ValueError(
                    f"context: a {type(module).__name__} was called without the causal mask of its model; train it with "
                    "Mesh(context=1)."
                )
            return original(module, query, key, value, attention_mask, **kwargs)

        return attention_forward

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.get_interface(name, self._interface[name])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interface, name)

    def _check(self, kwargs: Mapping[str, Any]) -> None:
        for name, given in kwargs.items():
            if given is not None and given is not False and name not in UNDERSTOOD | WITHOUT_EFFECT:
                raise ValueError(f"context: attention was given {name}; train the model with Mesh(context=1).")
        if kwargs.get("softcap") != self._softcap or (kwargs.get("s_aux") is not None) != self._sinks:
            raise ValueError(
                "context: a soft-cap or sinks that were not proved; apply(model) proves them, unless attention=False."
            )


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: ContextMask, kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """[B, H, S / ranks, E]: each piece over the keys that it may see."""
    rows, softcap, sinks = mask.rows, kwargs.get("softcap"), kwargs.get("s_aux")
    if rows is None:
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    if F.scaled_dot_product_attention is not SDPA:
        return _in_a_ring(query, key, value, mask, kwargs)
    if key.shape == value.shape:
        key, value = rows.whole(torch.stack([key, value]), dim=3).unbind()
    else:
        key, value = rows.whole(key, dim=2), rows.whole(value, dim=2)
    outputs = []
    for number, visible in enumerate(mask.pieces):
        last = visible.shape[-1]
        outputs.append(
            attention(
                query.narrow(2, number * rows.piece, rows.piece),
                key[:, :, :last],
                value[:, :, :last],
                scale=kwargs.get("scaling"),
                causal=False,
                softcap=softcap,
                sinks=sinks,
                mask=visible if softcap is None and sinks is None else _added(visible, query.dtype),
                dropout_p=kwargs.get("dropout") or 0.0,
                implementation="sdpa" if softcap is None and sinks is None else "torch",
            )
        )
    return torch.cat(outputs, 2)


def _in_a_ring(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: ContextMask, kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """By torch's own context parallelism, which has exchanged its attention (context_ring.py)."""
    if not mask.plain or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("dropout"):
        raise ValueError(
            "ring_attention: torch's ring has no windows, documents, padding, soft-caps, sinks or dropout; train without it, "
            "which gathers keys and values instead."
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs.get("scaling"))


def _visible(mask: Any, start: int, rows: Rows, device: torch.device) -> torch.Tensor:
    """The rows of a whole mask for the piece that begins at `start`, over the keys that it may see."""
    stop = start + rows.piece
    if isinstance(mask, torch.Tensor):
        # of numbers, a row that hides all sees all alike, later tokens too
        last = min(stop, rows.tokens) if mask.dtype == torch.bool else rows.tokens
        return mask[:, :, start:stop, :last]
    last = min(stop, rows.tokens)
    queries, keys = torch.arange(start, stop, device=device)[:, None], torch.arange(last, device=device)
    visible = (keys <= queries)[None, None]
    if isinstance(mask, LazyMask):
        if mask.window is not None:
            visible = visible & (queries - keys < mask.window)
        if (numbers := mask.documents) is not None:
            visible = visible & (numbers[:, None, start:stop, None] == numbers[:, None, None, :last])
    elif mask is not None:
        raise ValueError(
            f"context: the model's mask is a {type(mask).__name__}; expected one of 'sdpa' or 'eager'. Load the model with "
            "attn_implementation='sdpa'."
        )
    return visible


def _added(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of numbers that are added to the scores."""
    if visible.dtype != torch.bool:
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def _is_same(given: Any, own: torch.Tensor | None) -> bool:
    """Whether the model passes on what it was given, or a view of just that."""
    return (
        isinstance(given, torch.Tensor)
        and own is not None
        and (given.shape, given.stride(), given.data_ptr()) == (own.shape, own.stride(), own.data_ptr())
    )
