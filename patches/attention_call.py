"""One call of attention at run time: read what it asks for, and serve it or hand it to the function that would have run."""

import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F

from automodel_accel.kernels.attention import BY_NAME, attention
from automodel_accel.patches.attention_masks import Documents, LazyMask, real
from automodel_accel.patches.contract import Counts
from automodel_accel.patches.rebind import loaded_globals

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
SDPA = F.scaled_dot_product_attention  # context parallelism exchanges it; the original call is then the right one
UNDERSTOOD = frozenset({"dropout", "scaling", "is_causal", "softcap", "s_aux", "position_ids", "cu_seq_lens_q"})
WITHOUT_EFFECT = frozenset(
    {
        *("sliding_window", "cache_position", "use_cache", "return_dict", "labels", "shift_labels", "logits_to_keep"),
        *("num_items_in_batch", "output_hidden_states", "output_router_logits", "cu_seq_lens_k", "max_length_q"),
        *("max_length_k", "token_type_ids", "mm_token_type_ids", "seq_idx"),
    }
)


@dataclass(frozen=True, slots=True)
class Call:
    """What one call asks of `attention`."""

    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """What attention modules of one form share at run time.

    Attributes:
        implementation: The transformers implementation that was proved against: "sdpa" or "eager".
        widths: (query heads a key head, width, value width) that were proved.
        softcap: The soft-cap that was proved.
        sinks: Whether sinks were proved.
        allowed: (device type, dtype) -> implementations of `attention` that were proved.
        documents: Works out packed rows.
        counts: Where calls are counted.
        recorder: transformers' variable that holds what is being recorded, or None where there is none.
    """

    implementation: str
    widths: tuple[int, int, int]
    softcap: float | None
    sinks: bool
    allowed: Mapping[tuple[str, torch.dtype], tuple[str, ...]]
    documents: Documents
    counts: Counts
    recorder: Any = None


class Dispatcher:
    """Stands in for the `AttentionInterface` that one module's forward asks."""

    def __init__(self, interface: Any, site: Site) -> None:
        self._interface = interface
        self.site = site

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """Ours around the function that the interface would have given; another choice of the user's as it is."""
        original = self._interface.get_interface(name, default)
        if name != self.site.implementation:
            self.site.counts.count(self.site.counts.passed_on, f"attention: the implementation is {name!r} now")
            return _with_real_mask(original)
        return served(original, self.site)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.get_interface(name, self._interface[name])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interface, name)


def eager_function(forward: types.FunctionType) -> Callable[..., Any] | None:
    """The one function with the signature of an attention function that a forward names among its globals."""
    named = (forward.__globals__.get(name) for name in loaded_globals(forward))
    found = [function for function in named if isinstance(function, types.FunctionType) and _is_attention(function)]
    return found[0] if len(found) == 1 else None


def _is_attention(function: types.FunctionType) -> bool:
    return tuple(signature(function).parameters)[:4] == ("module", "query", "key", "value")


def _with_real_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    def attention_forward(*args: Any, **kwargs: Any) -> Any:
        return original(*map(real, args), **{name: real(value) for name, value in kwargs.items()})

    return attention_forward


def served(original: Callable[..., Any], site: Site) -> Callable[..., Any]:
    """An attention function in transformers' signature."""

    def attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tensors = _in_autocast((query, key, value))
        call = "an argument by position" if args else read(site, module, tensors, attention_mask, kwargs)
        if not isinstance(call, Call):
            site.counts.count(site.counts.passed_on, f"attention: {call}")
            return original(module, query, key, value, real(attention_mask), *args, **kwargs)
        site.counts.count(site.counts.fused, "attention")
        output = attention(
            *tensors,
            scale=kwargs.get("scaling"),
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
            sinks=call.sinks,
            documents=call.documents,
            mask=call.mask,
            among=site.allowed[tensors[0].device.type, tensors[0].dtype],
        )
        return output.transpose(1, 2).contiguous(), None

    return attention_forward


def read(
    site: Site, module: torch.nn.Module, tensors: tuple[torch.Tensor, ...], mask: Any, kwargs: Mapping[str, Any]
) -> Call | str:
    """What the call asks for, or why it is not ours."""
    reason = _objection(site, tensors, kwargs)
    if reason is not None:
        return reason
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap != site.softcap or (sinks is not None) != site.sinks:
        return "a soft-cap or sinks other than those proved"
    call = _pattern(site, module, tensors, mask, kwargs)
    if isinstance(call, str):
        return call
    found = Call(call.causal, call.window, softcap, sinks, call.documents, call.mask)
    if not _is_able(site, tensors[0], found):
        return "no proved implementation serves it"
    return found


def _objection(site: Site, tensors: tuple[torch.Tensor, ...], kwargs: Mapping[str, Any]) -> str | None:
    query, key, value = tensors
    if _weights_wanted(site):
        return "the attention weights are wanted"
    for name, given in kwargs.items():
        if given is not None and name not in UNDERSTOOD and name not in WITHOUT_EFFECT and given is not False:
            return f"the keyword {name!r}"
    if kwargs.get("dropout"):
        return "dropout"
    if F.scaled_dot_product_attention is not SDPA:
        return "torch's own attention was exchanged, as context parallelism does"
    if any(type(x) is not torch.Tensor or x.dim() != 4 or x.dtype != query.dtype for x in tensors):
        return f"tensors that are not plain, or of several dtypes ({type(query).__name__}, {query.dtype})"
    if (query.device.type, query.dtype) not in site.allowed:
        return f"not proved for {(query.device.type, query.dtype)}"
    if (query.shape[1], query.shape[-1], value.shape[-1]) != (key.shape[1] * site.widths[0], *site.widths[1:]):
        found = query.shape[1] // max(key.shape[1], 1), query.shape[-1], value.shape[-1]
        return f"groups and widths of heads {found}, proved {site.widths}"
    if query.shape[0] != key.shape[0] or query.numel() == 0:
        return "an empty batch, or one of several sizes"
    return None


def _pattern(
    site: Site, module: torch.nn.Module, tensors: tuple[torch.Tensor, ...], mask: Any, kwargs: Mapping[str, Any]
) -> Call | str:
    """Who sees whom."""
    query, key, _ = tensors
    square = query.shape[2] == key.shape[2]
    if isinstance(mask, LazyMask):
        if not square or mask.shape[2] != query.shape[2] or mask.shape[0] not in (1, query.shape[0]):
            return "a mask of another size"
        documents = mask.documents if mask.documents is not None else _documents(site, query, kwargs)
        return Call(causal=True, window=mask.window, documents=documents)
    if mask is not None:
        plain = type(mask) is torch.Tensor and mask.dim() == 4 and not mask.requires_grad
        fits = plain and mask.shape[1] == 1 and mask.shape[2:] == (query.shape[2], key.shape[2])
        understood = fits and mask.dtype in (
            (torch.bool, query.dtype) if site.implementation == "sdpa" else (query.dtype,)
        )
        return Call(mask=mask) if understood else "a mask that is not understood"
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if site.implementation == "eager" or not causal or query.shape[2] == 1:
        return Call()
    if not square:
        return "a causal call with more keys than queries"
    return Call(causal=True, documents=_documents(site, query, kwargs))


def _documents(site: Site, query: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Documents of rows whose model did not tell its mask of them."""
    position_ids, cu_seq_lens = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
    if isinstance(cu_seq_lens, torch.Tensor) and cu_seq_lens.dim() == 1 and query.shape[0] == 1:
        tokens = torch.arange(query.shape[2], device=query.device, dtype=cu_seq_lens.dtype)
        return torch.bucketize(tokens, cu_seq_lens[1:], right=True, out_int32=True)[None]
    if isinstance(position_ids, torch.Tensor) and position_ids.dim() == 2 and position_ids.shape[1] == query.shape[2]:
        return site.documents.of(position_ids, strict=False)
    return None


def _is_able(site: Site, query: torch.Tensor, call: Call) -> bool:
    asked = {
        "windows": call.window is not None,
        "documents": call.documents is not None,
        "masks": call.mask is not None and call.mask.dtype != torch.bool,
        "bool masks": call.mask is not None and call.mask.dtype == torch.bool,
        "soft-caps": call.softcap is not None,
        "sinks": call.sinks is not None,
    }
    features = {name for name, wanted in asked.items() if wanted}
    return any(features <= BY_NAME[name].features for name in site.allowed[query.device.type, query.dtype])


def weights_recorder() -> Any:
    """The variable in which transformers says what it records of a forward; only its eager functions return weights."""
    return getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)


def _weights_wanted(site: Site) -> bool:
    recorded = site.recorder.get() if site.recorder is not None and site.implementation == "eager" else None
    return recorded is not None and any("attentions" in name for name in recorded)


def _in_autocast(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype in which an autocast region computes attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(x.dtype == torch.float64 for x in tensors):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
