"""`attention` by torch's flash kernel of the CPU, span by span: packed documents and sliding windows without a dense mask.

A packed row is one call of the kernel per document, a sliding window one per tile of queries with the keys that it sees. The
key heads are not repeated. Keeps the output and one float per query, as the kernel does.
"""

import torch
import torch.nn.functional as F

from automodel_accel.kernels.attention.tiles import Tile, hides, tiles

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SMALLEST_TILE = 128


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
    """Return the output [B, H, S, E] in query's dtype, and lse [B, H, S]."""
    batch, heads, queries, _ = query_BHSD.shape
    width = value_BKTE.shape[-1]
    output_BHSE = query_BHSD.new_empty(batch, queries, heads, width).transpose(1, 2)
    lse_BHS = query_BHSD.new_empty(batch, heads, queries, dtype=torch.promote_types(query_BHSD.dtype, torch.float32))
    query, key, value = _of_one_width(query_BHSD, key_BKTD, value_BKTE)
    for tile in _tiles(query, key, causal, window, documents_BS):
        at, keys = _places(tile)
        only_causal, hidden = _visibility(tile, causal, window, query)
        output, lse = _flash(query[at], key[keys], value[keys], 0.0, only_causal, attn_mask=hidden, scale=scale)
        output_BHSE[at], lse_BHS[at] = output[..., :width], lse
    return output_BHSE, lse_BHS


def backward(
    grad_output_BHSE: torch.Tensor,
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTE: torch.Tensor,
    sinks_H: torch.Tensor | None,
    documents_BS: torch.Tensor | None,
    mask: torch.Tensor | None,
    output_BHSE: torch.Tensor,
    lse_BHS: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    """Return the gradients of query, key and value, each in its tensor's shape and dtype; there are no sinks."""
    query, key, value = _of_one_width(query_BHSD, key_BKTD, value_BKTE)
    grad_output, output = (_widened(x, query.shape[-1]) for x in (grad_output_BHSE, output_BHSE))
    # where tiles share keys their gradients are added up, in float32
    wide = torch.promote_types(key.dtype, torch.float32) if window is not None else key.dtype
    token_major = query.transpose(1, 2).shape
    grad_query = query.new_empty(token_major).transpose(1, 2)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=wide) for x in (key, value))
    for tile in _tiles(query, key, causal, window, documents_BS):
        at, keys = _places(tile)
        only_causal, hidden = _visibility(tile, causal, window, query)
        inputs = grad_output[at], query[at], key[keys], value[keys], output[at], lse_BHS[at].contiguous()
        found = _flash_backward(*inputs, 0.0, only_causal, attn_mask=hidden, scale=scale)
        grad_query[at] = found[0]
        grad_key[keys] += found[1]
        grad_value[keys] += found[2]
    grad_query, grad_key = (x[..., : query_BHSD.shape[-1]] for x in (grad_query, grad_key))
    return grad_query, grad_key.to(key.dtype), grad_value[..., : value_BKTE.shape[-1]].to(value.dtype), None


def _tiles(
    query: torch.Tensor, key: torch.Tensor, causal: bool, window: int | None, documents_BS: torch.Tensor | None
) -> list[Tile]:
    """One tile per document, or in a window so large ones that no more than half of the work is wasted."""
    size = max(query.shape[2], 1) if window is None else max(window, SMALLEST_TILE)
    return list(tiles(query.shape[2], key.shape[2], causal, window, documents_BS, size))


def _places(tile: Tile) -> tuple[tuple[slice, slice, slice], tuple[slice, slice, slice]]:
    every = slice(None)
    return (tile.rows, every, slice(tile.start, tile.stop)), (tile.rows, every, slice(tile.first, tile.last))


def _visibility(tile: Tile, causal: bool, window: int | None, query: torch.Tensor) -> tuple[bool, torch.Tensor | None]:
    """Whether the kernel's own causal flag is enough, and the mask that it needs where not: 0 or -inf, [S, T]."""
    inside = window is None or tile.stop - tile.first <= window
    if inside and (not causal or tile.start == tile.first):
        return causal, None
    hidden = hides(tile, causal, window, query.device)
    assert hidden is not None
    mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
    return False, mask.expand(query[tile.rows].shape[0], 1, *mask.shape)


def _of_one_width(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Widened by zeros to one head size, which the kernel asks for; zeros change neither scores nor the other values."""
    width = max(query.shape[-1], value.shape[-1])
    return _widened(query, width), _widened(key, width), _widened(value, width)


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    x = F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
    return x if x.stride(-1) == 1 else x.contiguous()
