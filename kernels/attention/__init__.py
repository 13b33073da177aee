"""attention: softmax(scale * query @ key^T) @ value, by whatever computes it fastest here.

    score = scale * q . k        score = softcap * tanh(score / softcap)        weight = exp(score) / (exp(sink) + sum exp(score))

A query sees a key where all that was asked for allows it: `causal` (not later), `window` (fewer than so many tokens ago),
`documents` (in the same document of a packed row), `mask`. No implementation but a masked one holds the matrix of scores or
of visible pairs: a packed row of N tokens costs the sum of the squares of its documents, not N^2.

Source: Vaswani et al., "Attention Is All You Need", 2017; Ainslie et al., "GQA", 2023 for key heads shared by query heads.
"""

import functools
from typing import Any

import torch

from automodel_accel.kernels.attention import measure, reference, sdpa
from automodel_accel.kernels.contract import AUTO, Implementation, Kernel, Spec, choose, load
from automodel_accel.kernels.facts import this_machine
from automodel_accel.kernels.registration import Definition, register

WIDE = frozenset({torch.float32, torch.float64})
NARROW = frozenset({torch.bfloat16, torch.float16})


def _flash(name: str, needs: str | None, archs: tuple[str, ...], max_size: int, more: frozenset[str]) -> Implementation:
    """An implementation by the flash kernels of a package, or of torch; see flash.py."""
    return Implementation(
        name=name,
        module=f"automodel_accel.kernels.attention.{name}",
        devices=frozenset({"cuda"}),
        dtypes=NARROW,
        max_size=max_size,
        needs=needs,
        archs=archs,
        features=frozenset({"windows", "documents", "values of another width"}) | more,
    )


KERNEL = Kernel(
    name="attention",
    reference=reference.attention,
    implementations=(
        Implementation(
            name="sdpa",
            module="automodel_accel.kernels.attention.sdpa",
            devices=frozenset({"cuda", "xpu", "cpu", "mps"}),
            dtypes=WIDE | NARROW,
            features=frozenset({"values of another width", "masks", "bool masks", "dropout"}),
        ),
        Implementation(
            name="packed",
            module="automodel_accel.kernels.attention.packed",
            devices=frozenset({"cpu"}),
            dtypes=WIDE | NARROW,
            features=frozenset({"windows", "documents", "values of another width"}),
        ),
        _flash("varlen", None, ("sm_8", "sm_9", "sm_10", "sm_12"), 256, frozenset()),
        _flash("flash3", "flash-attn-3", ("sm_90",), 256, frozenset({"soft-caps"})),
        _flash("flash4", "flash-attn-4", ("sm_90", "sm_10", "sm_11"), 128, frozenset({"soft-caps", "sinks"})),
        _flash("flash2", "flash-attn", ("sm_8", "sm_9", "sm_10", "sm_12"), 256, frozenset({"soft-caps"})),
        Implementation(
            name="torch",
            module="automodel_accel.kernels.attention.blocks",
            devices=frozenset({"cuda", "xpu", "cpu", "mps"}),
            dtypes=WIDE | NARROW,
            features=frozenset({"windows", "documents", "soft-caps", "sinks", "values of another width", "masks"}),
        ),
    ),
)
BY_NAME = {implementation.name: implementation for implementation in KERNEL.implementations}
_TILED = frozenset(BY_NAME) - {"sdpa"}  # those with a forward and a backward; "sdpa" differentiates itself
BUILT_IN = tuple(one.name for one in KERNEL.implementations if one.needs is None)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    implementation: str = AUTO,
    among: tuple[str, ...] | None = None,
) -> torch.Tensor:
    """Attention of each query head over the keys that it may see.

    Args:
        query: [B, H, S, D], float32, bfloat16, float16 (or float64 for those of torch).
        key: [B, K, T, D]; K divides H, and H / K neighbouring query heads share one.
        value: [B, K, T, E].
        scale: Factor of the scores; D^-0.5 by default.
        causal: Whether a query sees no later key; needs T = S.
        window: A causal query sees only this many latest keys, its own included.
        softcap: Scores are squeezed into (-softcap, softcap).
        sinks: [H], a score that takes part in the softmax and has no value.
        documents: [B or 1, S] integers, equal for the neighbouring tokens of one document; needs T = S.
        mask: [B or 1, H or 1, S, T]: bool, True where visible, or numbers added to the scores; it gets no
            gradient.
        dropout_p: Probability with which a weight is dropped.
        implementation: "auto", "sdpa", "packed", "varlen", "flash2", "flash3", "flash4" or "torch".
        among: The implementations that "auto" may take; all by default.

    Returns:
        [B, H, S, E], in query's dtype; a transpose of dimensions 1 and 2 makes it contiguous where it is not already.

    Raises:
        ValueError: shapes that do not fit, or no implementation serves the call; says why for each.
    """
    if mask is not None and mask.requires_grad:
        raise ValueError("attention: the mask needs a gradient, and gets none here; detach it.")
    _check(query, key, value, causal or window is not None or documents is not None, sinks, documents)
    if window is not None and (not causal or window < 1):
        raise ValueError(f"attention: window={window} with causal={causal}; a window is at least 1, and causal.")
    if window is not None and window >= query.shape[2]:
        window = None
    features = _features(query, value, window, softcap, sinks, documents, mask, dropout_p)
    name = _winner(query, key, value, causal, features, implementation, among)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if name in _TILED:
        return _call(query, key, value, sinks, documents, mask, scale, causal, window, softcap, name)[0]
    return sdpa.attention(query, key, value, scale=scale, causal=causal, mask=mask, dropout_p=dropout_p)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    aligned: bool,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    fit = (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[-1] == key.shape[-1]
        and query.shape[1] % key.shape[1] == 0
    )
    if not fit:
        raise ValueError(f"attention: {shapes}; expected [B, H, S, D], [B, K, T, D] and [B, K, T, E], K dividing H.")
    if aligned and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"attention: {shapes}; causal, windows and documents need as many keys as queries. Give a mask."
        )
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"attention: sinks have shape {tuple(sinks.shape)}; expected ({query.shape[1]},), one a head.")
    if documents is not None and (documents.dim() != 2 or documents.shape[0] not in (1, query.shape[0])):
        raise ValueError(
            f"attention: documents have shape {tuple(documents.shape)}; expected [B or 1, S] for {shapes}."
        )


def _features(
    query: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    mask: torch.Tensor | None,
    dropout_p: float,
) -> frozenset[str]:
    asked = {
        "windows": window is not None,
        "soft-caps": softcap is not None,
        "sinks": sinks is not None,
        "documents": documents is not None,
        "masks": mask is not None and mask.dtype != torch.bool,
        "bool masks": mask is not None and mask.dtype == torch.bool,
        "dropout": dropout_p > 0,
        "values of another width": value.shape[-1] != query.shape[-1],
    }
    return frozenset(name for name, wanted in asked.items() if wanted)


@functools.cache
def able(
    device: str, dtype: torch.dtype, size: int, features: frozenset[str], among: tuple[str, ...]
) -> tuple[str, ...]:
    """The implementations, of those named, that can serve such a call on this machine; best guess first.

    Raises:
        ValueError: there is none; says why for each.
    """
    spec = Spec(device, dtype, size, features)
    choices = [choose(KERNEL, this_machine(), spec, name) for name in among]
    if not any(choice.winner for choice in choices):
        raise ValueError("; ".join(str(refusal) for choice in choices for refusal in choice.refused) + ".")
    return tuple(choice.winner.name for choice in choices if choice.winner is not None)


def _first(query: torch.Tensor, features: frozenset[str], named: tuple[str, ...]) -> str:
    """The first of `able`, without asking the machine: in what torch.compile traces."""
    for name in named:
        one = BY_NAME[name]
        if features <= one.features and query.device.type in one.devices and query.dtype in one.dtypes:
            return name
    raise ValueError(f"attention: none of {named} serves {query.dtype} on {query.device.type} with {sorted(features)}.")


def _winner(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    features: frozenset[str],
    implementation: str,
    among: tuple[str, ...] | None,
) -> str:
    named = (among or tuple(BY_NAME)) if implementation == AUTO else (implementation,)
    if torch.compiler.is_compiling():  # which packages there are is not asked in a trace
        return _first(query, features, BUILT_IN if implementation == AUTO and among is None else named)
    names = able(query.device.type, query.dtype, max(query.shape[-1], value.shape[-1]), features, named)
    if len(names) == 1 or torch.are_deterministic_algorithms_enabled():
        return names[0]
    kind = measure.Kind(
        device=query.device,
        dtype=query.dtype,
        groups=query.shape[1] // key.shape[1],
        widths=(query.shape[-1], value.shape[-1]),
        length=measure.bucket(query.shape[2]),
        causal=causal,
        features=features,
    )
    return measure.fastest(kind, names)


def _token_major_like(x: torch.Tensor, width: int) -> torch.Tensor:
    """[B, H, S, width] in the memory order [B, S, H, width], in which projections write their outputs and read their gradients."""
    batch, heads, tokens, _ = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    module = load(KERNEL, BY_NAME[implementation])
    with torch.autocast(query.device.type, enabled=False):
        return module.forward(query, key, value, sinks, documents, mask, scale, causal, window, softcap)  # type: ignore[no-any-return]


def _fake_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (2, *query.shape[:3]) if implementation == "torch" else query.shape[:3]
    return _token_major_like(query, value.shape[-1]), query.new_empty(
        shape, dtype=torch.promote_types(query.dtype, torch.float32)
    )


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    mask: torch.Tensor | None,
    output: torch.Tensor,
    sums: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    module = load(KERNEL, BY_NAME[implementation])
    inputs = grad_output, query, key, value, sinks, documents, mask, output, sums
    with torch.autocast(query.device.type, enabled=False):
        *found, grad_sinks = module.backward(*inputs, scale, causal, window, softcap)
    grad_query, grad_key, grad_value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in found)
    return grad_query, grad_key, grad_value, query.new_empty(0) if grad_sinks is None else grad_sinks


def _fake_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    documents: torch.Tensor | None,
    mask: torch.Tensor | None,
    output: torch.Tensor,
    sums: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    like = [_token_major_like(tensor, tensor.shape[-1]) for tensor in (query, key, value)]
    return like[0], like[1], like[2], query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:]


def _gradients(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    *gradients, grad_sinks = backward(grad_output, *saved, *ctx.options)
    return (*gradients, None if saved[3] is None else grad_sinks, *([None] * 7))


_call = register(
    "attention",
    Definition(
        forward=_forward,
        backward=_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
