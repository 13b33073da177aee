"""`attention` out of torch operations, tile by tile: any device, any dtype, every feature but masks of bool.

Keeps the output and two floats per query, the largest score and the sum of exponentials over it, as one lse would be rounded
at the size of the largest score; the backward recomputes the scores. Tiles that no query sees are never computed, so a causal
call does half of the products, a window or a packed row its own share. Products are in float32 at least.

    weights = exp(scores - peak) / total    grad_scores = weights * (grad_output @ value^T - delta)    delta = sum(weights * grad_output @ value^T)

A sink takes part in peak and total; its gradient is minus the sum over queries of exp(sink - peak) / total * delta.
Source: Dao, "FlashAttention-2", 2023, section 3; sinks: Xiao et al., "Efficient Streaming Language Models", 2023.
"""

from dataclasses import dataclass

import torch

from automodel_accel.kernels.attention.tiles import Tile, hides, tiles

TILE = 256  # queries; with the keys of one tile this keeps the scores of a head in a processor's cache


@dataclass(frozen=True, slots=True)
class Pattern:
    """Who sees whom, and how scores are made: what the tiles of one call share."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    documents_BS: torch.Tensor | None
    mask: torch.Tensor | None

    def tiles(self, queries: int, keys: int) -> list[Tile]:
        """The tiles of a call; across documents where the numbers are on a GPU, as reading them would wait for it."""
        known = self.documents_BS if self.documents_BS is not None and self.documents_BS.device.type == "cpu" else None
        return list(tiles(queries, keys, self.causal, self.window, known, TILE))

    def capped(self, query_BKGSD: torch.Tensor, key_BKTD: torch.Tensor) -> torch.Tensor:
        """Scaled and soft-capped scores [B, K, G, S, T]."""
        scores = torch.matmul(query_BKGSD.flatten(2, 3), key_BKTD.transpose(-1, -2)).mul_(self.scale)
        scores = scores.unflatten(2, query_BKGSD.shape[2:4])  # type: ignore[no-untyped-call]
        return scores if self.softcap is None else torch.tanh(scores.div_(self.softcap)).mul_(self.softcap)

    def hide_(self, scores: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Write -inf into scores where a query does not see the key, and add the mask; returns them."""
        if self.mask is not None:  # one for all rows, or heads, is broadcast
            mask = self.mask[tile.rows if self.mask.shape[0] > 1 else slice(None), :, tile.start : tile.stop]
            mask = mask[..., tile.first : tile.last]
            scores.add_(mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, scores.shape[1:3]))  # type: ignore[no-untyped-call]
        hidden = hides(tile, self.causal, self.window, scores.device)
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        if self.documents_BS is not None and self.documents_BS.device.type != "cpu":
            queries, keys = self.documents_BS[:, tile.start : tile.stop], self.documents_BS[:, tile.first : tile.last]
            scores.masked_fill_((queries[:, :, None] != keys[:, None])[:, None, None], float("-inf"))
        return scores


def forward(
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTE: torch.Tensor,
    sinks_H: torch.Tensor | None,
    documents_BS: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [B, H, S, E] in query's dtype; peak and total, [2, B, H, S] in the compute dtype."""
    batch, heads, queries, _ = query_BHSD.shape
    pattern = Pattern(scale, causal, window, softcap, documents_BS, mask)
    output_BHSE = query_BHSD.new_empty(batch, queries, heads, value_BKTE.shape[-1]).transpose(1, 2)
    sums_2BHS = query_BHSD.new_empty(2, batch, heads, queries, dtype=_compute_dtype(query_BHSD))
    sinks = None if sinks_H is None else _by_group(sinks_H.to(sums_2BHS.dtype), key_BKTD)[..., None]
    for tile in pattern.tiles(queries, key_BKTD.shape[2]):
        query, key, value = _cut(query_BHSD, key_BKTD, value_BKTE, tile)
        scores = pattern.hide_(pattern.capped(query, key), tile)
        peak = scores.amax(-1) if sinks is None else torch.maximum(scores.amax(-1), sinks)
        weights = scores.sub_(peak[..., None]).exp_()
        total = weights.sum(-1) if sinks is None else weights.sum(-1) + torch.exp(sinks - peak)
        output = torch.matmul(weights.div_(total[..., None]).flatten(2, 3), value)
        at = tile.rows, slice(None), slice(tile.start, tile.stop)
        output_BHSE[at] = output.unflatten(2, query.shape[2:4]).flatten(1, 2).to(output_BHSE.dtype)  # type: ignore[no-untyped-call]
        sums_2BHS[0][at], sums_2BHS[1][at] = peak.flatten(1, 2), total.flatten(1, 2)
    return output_BHSE, sums_2BHS


def backward(
    grad_output_BHSE: torch.Tensor,
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTE: torch.Tensor,
    sinks_H: torch.Tensor | None,
    documents_BS: torch.Tensor | None,
    mask: torch.Tensor | None,
    output_BHSE: torch.Tensor,
    sums_2BHS: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the gradients of query, key, value (and of the sinks, or None), each in its tensor's shape and dtype."""
    pattern = Pattern(scale, causal, window, softcap, documents_BS, mask)
    wide = sums_2BHS.dtype
    peak_BHS, total_BHS = sums_2BHS
    token_major = query_BHSD.transpose(1, 2).shape
    grad_query_BHSD = query_BHSD.new_empty(token_major).transpose(1, 2)
    # what many tiles add to, in float64 where the device has it
    exact = wide if query_BHSD.device.type == "mps" else torch.float64
    grad_key_BKTD = torch.zeros(key_BKTD.shape, dtype=exact, device=key_BKTD.device)
    grad_value_BKTE = torch.zeros(value_BKTE.shape, dtype=exact, device=value_BKTE.device)
    delta_BHS = torch.empty_like(peak_BHS)
    for tile in pattern.tiles(query_BHSD.shape[2], key_BKTD.shape[2]):
        query, key, value = _cut(query_BHSD, key_BKTD, value_BKTE, tile)
        at = tile.rows, slice(None), slice(tile.start, tile.stop)
        grad_output = _by_group(grad_output_BHSE[at].to(wide), key, 1)
        scores = pattern.capped(query, key)
        slope = None if softcap is None else 1 - (scores / softcap).square_()
        peak, total = (_by_group(x[at], key, 1)[..., None] for x in (peak_BHS, total_BHS))
        weights = pattern.hide_(scores, tile).sub_(peak).exp_().div_(total)
        keys = tile.rows, slice(None), slice(tile.first, tile.last)
        # head by head and then over the group: one long sum would lose precision
        grad_value_BKTE[keys] += torch.matmul(weights.transpose(-1, -2), grad_output).sum(2, dtype=exact)
        grad_scores = torch.matmul(grad_output.flatten(2, 3), value.transpose(-1, -2)).unflatten(2, query.shape[2:4])  # type: ignore[no-untyped-call]
        # as softmax itself does it: grad_output * output would round delta and grad_scores apart
        delta = (grad_scores * weights).sum(-1)
        delta_BHS[at] = delta.flatten(1, 2)
        grad_scores = grad_scores.sub_(delta[..., None]).mul_(weights)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_scores = grad_scores.mul_(scale)
        grad_query = torch.matmul(grad_scores.flatten(2, 3), key).unflatten(2, query.shape[2:4])  # type: ignore[no-untyped-call]
        grad_query_BHSD[at] = grad_query.flatten(1, 2).to(query_BHSD.dtype)
        # transposed twice: matmul adds up many queries more exactly this way round
        grad_key_BKTD[keys] += torch.matmul(query.transpose(-1, -2), grad_scores).sum(2, dtype=exact).mT
    grad_sinks_H = None
    if sinks_H is not None:
        share = torch.exp(sinks_H.to(wide)[:, None] - peak_BHS) / total_BHS
        grad_sinks_H = -(share * delta_BHS).sum((0, 2), dtype=exact).to(sinks_H.dtype)
    return grad_query_BHSD, grad_key_BKTD.to(key_BKTD.dtype), grad_value_BKTE.to(value_BKTE.dtype), grad_sinks_H


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _cut(
    query_BHSD: torch.Tensor, key_BKTD: torch.Tensor, value_BKTE: torch.Tensor, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A tile's queries [B, K, G, S, D], keys [B, K, T, D] and values [B, K, T, E], in the compute dtype."""
    wide = _compute_dtype(query_BHSD)
    query = _by_group(query_BHSD[tile.rows, :, tile.start : tile.stop].to(wide), key_BKTD, 1)
    key, value = (x[tile.rows, :, tile.first : tile.last].to(wide) for x in (key_BKTD, value_BKTE))
    return query, key, value


def _by_group(x: torch.Tensor, key_BKTD: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Split the heads into key heads and the queries that share one: [..., H, ...] -> [..., K, G, ...]."""
    return x.unflatten(dim, (key_BKTD.shape[1], -1))  # type: ignore[no-any-return, no-untyped-call]
