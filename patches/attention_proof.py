"""How attention is proved: the function that would have run beside ours, on small calls of every kind; masks beside dense ones."""

import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.attention import BY_NAME, reference
from automodel_accel.patches.attention_call import Site, served
from automodel_accel.patches.attention_masks import Documents, LazyMask, real, with_lazy_masks
from automodel_accel.patches.contract import CallKey, Counts, Experiment
from automodel_accel.patches.probe import functional_copy

BATCH, KEY_HEADS, TOKENS, WINDOW = 2, 2, 20, 6


def experiment(form: Any, module: nn.Module, key: CallKey) -> Experiment:
    """Causal, packed, windowed and full calls, as far as the implementation can, with heads of the real widths.

    Raises:
        ValueError: the implementation serves none of them.
    """
    device, name = key[0], key[2]
    dtype: torch.dtype = key[1]
    patterns = [features for features in _PATTERNS if features | form.features <= BY_NAME[name].features]
    if not patterns:
        raise ValueError(f"{name} does none of the calls of an attention with {', '.join(form.features)}")
    heads = KEY_HEADS * form.groups
    inputs = {
        "x": _drawn(0, BATCH, TOKENS, heads, form.width),
        "key": _drawn(1, BATCH, TOKENS, KEY_HEADS, form.width),
        "value": _drawn(2, BATCH, TOKENS, KEY_HEADS, form.value_width),
    }
    if form.sinks:
        inputs["sinks"] = _drawn(3, heads)
    original = form.eager or _sdpa(module)
    site = Site(
        implementation=form.implementation,
        widths=(form.groups, form.width, form.value_width),
        softcap=form.softcap,
        sinks=form.sinks,
        allowed={(device, dtype): (name,)},
        documents=Documents(),
        counts=Counts(),
    )

    def never(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the call was handed to the original")

    def run(function: Callable[..., Any], leaves: Mapping[str, torch.Tensor], lazy: bool) -> torch.Tensor:
        stub = _stub(module, form, leaves)
        outputs = []
        for features in patterns:
            mask, causal = _mask(features, form.implementation, leaves["x"].device, leaves["x"].dtype)
            options = {"s_aux": leaves["sinks"]} if form.sinks else {}
            options |= {"softcap": form.softcap} if form.softcap is not None else {}
            given = (leaves[part].transpose(1, 2) for part in ("x", "key", "value"))
            mask = mask if lazy else real(mask)
            outputs.append(
                function(stub, *given, mask, dropout=0.0, scaling=_scale(form), is_causal=causal, **options)[
                    0
                ].flatten()
            )
        return torch.cat(outputs)

    def truth(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
        query, keys, values = (leaves[part].transpose(1, 2) for part in ("x", "key", "value"))
        outputs = []
        for features in patterns:
            causal, window, documents = _said(features, query.device)
            output = reference.attention(
                query, keys, values, _scale(form), causal, window, form.softcap, leaves.get("sinks"), documents
            )
            outputs.append(output.transpose(1, 2).flatten())
        return torch.cat(outputs)

    return Experiment(
        inputs={part: tensor.to(device) for part, tensor in inputs.items()},
        dtypes=dict.fromkeys(inputs, dtype),
        theirs=lambda leaves: _read_errors(lambda: run(original, leaves, lazy=False)),
        ours=lambda leaves: run(served(never, site), leaves, lazy=True),
        truth=truth,
    )


_PATTERNS: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"documents"}),
    frozenset({"windows"}),
    frozenset({"documents", "windows"}),
)


def _said(features: frozenset[str], device: torch.device) -> tuple[bool, int | None, torch.Tensor | None]:
    """(causal, window, documents) of a pattern."""
    tokens = torch.arange(TOKENS, device=device)
    documents = torch.stack([(tokens >= 7).int() + (tokens >= 8).int(), (tokens >= 12).int()])
    return True, WINDOW if "windows" in features else None, documents if "documents" in features else None


def _mask(
    features: frozenset[str], implementation: str, device: torch.device, dtype: torch.dtype
) -> tuple[LazyMask | None, bool]:
    """The mask of a pattern, in the language of the implementation, and whether the call is causal."""
    causal, window, documents = _said(features, device)

    def make() -> torch.Tensor:
        visible = reference.visible_pairs(TOKENS, TOKENS, causal, window, documents, device)
        visible = visible.expand(BATCH, -1, -1, -1)
        if implementation == "sdpa":
            return visible
        return torch.where(visible, torch.zeros((), dtype=dtype, device=device), torch.finfo(dtype).min)

    return LazyMask(window, documents, (BATCH, 1, TOKENS, TOKENS), make), causal


def mask_experiment(module: nn.Module, makers: tuple[tuple[str, tuple[str, ...]], ...], device: str) -> Experiment:
    """Attention under each mask that the model's methods build, dense and lazy, for plain and packed rows."""
    names = sorted({name for _, found in makers for name in found})
    methods = [getattr(type(module), method) for method, _ in makers]
    theirs, ours = (
        {name: _global(method, name) for method in found for name in names}
        for found in (methods, [with_lazy_masks(method, Documents(), Counts()) for method in methods])
    )
    inputs = {"x": _drawn(0, BATCH, 1, TOKENS, 4).to(device)}

    def run(
        functions: Mapping[str, Callable[..., Any]], leaves: Mapping[str, torch.Tensor], lazy: bool
    ) -> torch.Tensor:
        x = leaves["x"]
        outputs = []
        for function in functions.values():
            for given in _rows(x.device):
                mask = function(**_arguments(x, given))
                said = _said_by(mask, x.device) if lazy else real(mask)
                causal = mask is None
                outputs.append(reference.attention(x, x, x, 0.5, causal, mask=said).flatten())
        return torch.cat(outputs)

    return Experiment(
        inputs=inputs,
        dtypes={"x": torch.float32},
        theirs=lambda leaves: run(theirs, leaves, lazy=False),
        ours=lambda leaves: run(ours, leaves, lazy=True),
        truth=lambda leaves: run(theirs, leaves, lazy=False),
    )


def _said_by(mask: Any, device: torch.device) -> torch.Tensor | None:
    """The dense mask that attention takes a lazy one for."""
    if not isinstance(mask, LazyMask):
        return mask  # type: ignore[no-any-return]
    return reference.visible_pairs(TOKENS, TOKENS, True, mask.window, mask.documents, device)


def _rows(device: torch.device) -> Iterator[torch.Tensor]:
    plain = torch.arange(TOKENS, device=device)[None]
    packed = torch.cat([torch.arange(length, device=device) for length in (7, 1, TOKENS - 8)])[None]
    yield plain
    yield packed
    yield plain + 3


def _arguments(x: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Any]:
    config = types.SimpleNamespace(
        _attn_implementation="sdpa", is_causal=True, sliding_window=WINDOW, attention_chunk_size=WINDOW
    )
    embeds = x[:, 0].detach()
    return {
        "config": config,
        "inputs_embeds": embeds,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids,
    }


def _global(method: Any, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = inspect.unwrap(method).__globals__[name]
    return found


def _stub(module: nn.Module, form: Any, leaves: Mapping[str, torch.Tensor]) -> nn.Module:
    """What an attention function reads from its module."""
    stub = functional_copy(module, {"sinks": leaves["sinks"]} if form.sinks else {}, {})
    stub.eval()
    return stub


def _sdpa(module: nn.Module) -> Callable[..., Any]:
    forward = type(module).forward
    interface = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    found: Callable[..., Any] = interface["sdpa"]
    return found


def _read_errors(function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Say so where the function reads from its module what a copy does not have."""
    try:
        return function()
    except AttributeError as error:
        raise RuntimeError(f"the original needs more of its module than a copy has: {error}") from error


def _scale(form: Any) -> float:
    return 0.75 / math.sqrt(form.width)


def _drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
