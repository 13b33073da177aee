"""The definition of `attention`, in plain differentiable PyTorch."""

import torch


def attention(
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTE: torch.Tensor,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    documents_BS: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with every score in memory; see `automodel_accel.kernels.attention.attention`. Returns [B, H, S, E]."""
    groups = query_BHSD.shape[1] // key_BKTD.shape[1]
    compute_dtype = torch.promote_types(query_BHSD.dtype, torch.float32)
    query, key, value = (x.to(compute_dtype) for x in (query_BHSD, key_BKTD, value_BKTE))
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    visible = visible_pairs(scores.shape[-2], scores.shape[-1], causal, window, documents_BS, scores.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks_H is None:
        weights = scores.softmax(-1)
    else:
        sinks = sinks_H.to(compute_dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return (weights @ value.repeat_interleave(groups, 1)).to(query_BHSD.dtype)


def visible_pairs(
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    documents_BS: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Which query sees which key: bool, [1 or B, 1, S, T]."""
    ago = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    visible = ago >= 0 if causal else torch.ones_like(ago, dtype=torch.bool)
    if window is not None:
        visible = visible & (ago < window)
    visible = visible[None, None]
    if documents_BS is not None:
        visible = visible & (documents_BS[:, None, :, None] == documents_BS[:, None, None, :])
    return visible
