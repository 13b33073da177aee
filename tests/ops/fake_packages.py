"""Stand-ins for packages that need a GPU: their names and signatures, as in their sources, computed by plain PyTorch.

They are as strict as the real ones about layouts, dtypes and widths, so that what drives them is tested without them: flash-attn
2.8.3 (flash_attn_interface.py), FlashAttention-3 (hopper/flash_attn_interface.py), flash-attn-4 4.0.0b36 (cute/interface.py),
Transformer Engine 2.20.2 (ops/basic/rmsnorm.py, layer_norm.py and csrc/extensions/normalization.cpp; triton/cross_entropy.py).
"""

import itertools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, Signature
from typing import Any

import pytest
import torch
import torch.distributed as dist

from automodel_accel.kernels.cross_entropy import eager as cross_entropy
from automodel_accel.kernels.layer_norm import eager as layer_norm
from automodel_accel.kernels.rms_norm import eager as rms_norm

Given = Mapping[str, Any]


def function(signature: str, body: Callable[[Given], Any]) -> Callable[..., Any]:
    """A function of these parameters, "name" or "name=", of which the latter have a default: None stands for all of them."""
    names = signature.split()
    kind = Parameter.POSITIONAL_OR_KEYWORD
    bound = Signature(
        [Parameter(name.rstrip("="), kind, default=None if "=" in name else Parameter.empty) for name in names]
    )

    def call(*arguments: Any, **keywords: Any) -> Any:
        given = bound.bind(*arguments, **keywords)
        given.apply_defaults()
        with torch.no_grad():
            return body(given.arguments)

    return call


@contextmanager
def installed(modules: Mapping[str, Mapping[str, Any]], drivers: tuple[str, ...]) -> Iterator[None]:
    """While it is open, the modules exist; what drives them is imported anew, and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name, members in modules.items():
            module = types.ModuleType(name)
            vars(module).update(members)
            module.__path__ = []
            patch.setitem(sys.modules, name, module)
        for driver in drivers:
            patch.delitem(sys.modules, driver, raising=False)
        yield
        for driver in drivers:
            sys.modules.pop(driver, None)


def _sequence_attention(
    query_SHD: torch.Tensor, key_TKD: torch.Tensor, value_TKE: torch.Tensor, options: Given
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [S, H, E] and lse [H, S] of one sequence, in float32."""
    groups = query_SHD.shape[1] // key_TKD.shape[1]
    key, value = (x.repeat_interleave(groups, 1).float() for x in (key_TKD, value_TKE))
    scores = torch.einsum("shd,thd->hst", query_SHD.float(), key) * options["scale"]
    if options["softcap"]:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    ahead = torch.arange(key.shape[0]) - torch.arange(query_SHD.shape[0])[:, None]
    before, after = options["reach"]
    hidden = (ahead > after if after is not None else ahead > len(key)) | (before is not None and -ahead > before)
    scores = scores.masked_fill(hidden, float("-inf"))
    sinks_H = options.get("sinks")
    all_scores = scores if sinks_H is None else torch.cat([scores, _sink_column(sinks_H, scores)], -1)
    lse = all_scores.logsumexp(-1)
    return torch.einsum("hst,the->she", torch.exp(scores - lse[..., None]), value), lse


def _sink_column(sinks_H: torch.Tensor, scores_HST: torch.Tensor) -> torch.Tensor:
    return sinks_H.float()[:, None, None].expand(*scores_HST.shape[:2], 1)


def _attention(tensors: tuple[torch.Tensor, ...], options: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of rows of one length, or of sequences by their bounds."""
    bounds = options["bounds"]
    if bounds is None:
        rows = [_sequence_attention(*row, options) for row in zip(*tensors, strict=True)]
        return torch.stack([output for output, _ in rows]), torch.stack([lse for _, lse in rows])
    cut = [[x[first:last] for x in tensors] for first, last in itertools.pairwise(bounds)]
    parts = [_sequence_attention(*part, options) for part in cut]
    return torch.cat([output for output, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def attention_forward(query: Any, key: Any, value: Any, options: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """As a flash kernel: the output in query's dtype and lse in float32."""
    _check(query, key, value, options)
    output, lse = _attention((query, key, value), options)
    return output.to(query.dtype), lse


def attention_backward(
    grad_output: Any, query: Any, key: Any, value: Any, output: Any, lse: Any, options: Given
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key, value and, where there are sinks, of these; what the forward returned must come back."""
    _check(query, key, value, options)
    sinks = [] if options.get("sinks") is None else [options["sinks"].float()]
    leaves = [x.float().requires_grad_() for x in (query, key, value, *sinks)]
    with torch.enable_grad():
        again, sums = _attention(tuple(leaves[:3]), {**options, "sinks": leaves[3] if sinks else None})
    assert (output.dtype, output.shape, lse.shape) == (query.dtype, again.shape, sums.shape)
    assert grad_output.stride(-1) == output.stride(-1) == 1
    torch.testing.assert_close(output.float(), again, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, sums)
    found = torch.autograd.grad(again, leaves, grad_output.float())
    dtypes = [query.dtype] * 3 + ([options["sinks"].dtype] if sinks else [])
    return tuple(grad.to(dtype) for grad, dtype in zip(found, dtypes, strict=True))


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Given) -> None:
    """What the kernels check; their widths are the caller's to say."""
    bounds, longest = options["bounds"], options["longest"]
    for x in (query, key, value):
        assert x.dtype in (torch.bfloat16, torch.float16)
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0
        assert x.dim() == (4 if bounds is None else 3)
    assert (query.shape[-1], value.shape[-1]) in options["widths"] or query.shape[-1] == value.shape[-1]
    if bounds is None:
        assert longest in (None, query.shape[1])
        return
    assert bounds.dtype == torch.int32
    assert bounds.is_contiguous()
    assert bounds[0] == 0
    assert bounds[-1] == query.shape[0] == key.shape[0]
    assert longest == bounds.diff().max()
    assert bounds.diff().min() > 0


def _reach(left: int | None, right: int | None, causal: bool) -> tuple[int | None, int | None]:
    """None for no limit; a causal kernel sees nothing ahead whatever `right` says."""
    before, after = (None if reach is None or reach < 0 else reach for reach in (left, right))
    return before, 0 if causal else after


def _options(given: Given, causal: bool, widths: tuple[tuple[int, int], ...] = ()) -> Given:
    bounds = given.get("cu_seqlens_q")
    assert given.get("cu_seqlens_k") is bounds
    assert given.get("max_seqlen_q") == given.get("max_seqlen_k")
    return {
        "bounds": bounds,
        "longest": given.get("max_seqlen_q"),
        "scale": given["softmax_scale"],
        "softcap": given["softcap"],
        "reach": _reach(given["window_size_left"], given["window_size_right"], causal),
        "sinks": given.get("learnable_sink"),
        "widths": widths,
    }


def _fill(given: Given, grads: tuple[torch.Tensor, ...]) -> torch.Tensor:
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        assert given[name].is_contiguous()
        given[name].copy_(grad)
    return grads[0].new_zeros(1)


def flash2() -> Mapping[str, Mapping[str, Any]]:
    """flash-attn 2.8.3."""
    scores = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
    bounds = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    inputs = "dout q k v out softmax_lse dq dk dv"

    def forward(given: Given) -> tuple[torch.Tensor, ...]:
        assert (given["dropout_p"], given["alibi_slopes"]) == (0.0, None)
        output, lse = attention_forward(given["q"], given["k"], given["v"], _options(given, given["causal"]))
        return output, lse, output.new_empty(0), torch.zeros(2, dtype=torch.int64)

    def backward(given: Given) -> torch.Tensor:
        assert (given["dropout_p"], given["alibi_slopes"]) == (0.0, None)
        assert given["deterministic"] is torch.are_deterministic_algorithms_enabled()
        names = ("dout", "q", "k", "v", "out", "softmax_lse")
        return _fill(given, attention_backward(*(given[name] for name in names), _options(given, given["causal"])))

    members = {
        "_flash_attn_forward": function(f"q k v {scores} return_softmax", forward),
        "_flash_attn_varlen_forward": function(
            f"q k v {bounds} dropout_p softmax_scale causal window_size_left= window_size_right= softcap= alibi_slopes= "
            "return_softmax= block_table= leftpad_k= seqused_k= zero_tensors=",
            forward,
        ),
        "_flash_attn_backward": function(f"{inputs} {scores} deterministic rng_state=", backward),
        "_flash_attn_varlen_backward": function(
            f"{inputs} {bounds} {scores} deterministic rng_state= zero_tensors=", backward
        ),
    }
    return {"flash_attn": {}, "flash_attn.flash_attn_interface": members}


def flash3() -> Mapping[str, Mapping[str, Any]]:
    """FlashAttention-3."""

    def forward(given: Given) -> tuple[torch.Tensor, ...]:
        options = _options(given, given["causal"], ((192, 128),))
        output, lse = attention_forward(given["q"], given["k"], given["v"], options)
        return output, lse, output.new_empty(0), output.new_empty(0)

    def backward(given: Given) -> torch.Tensor:
        assert given["deterministic"] is torch.are_deterministic_algorithms_enabled()
        names = ("dout", "q", "k", "v", "out", "softmax_lse")
        options = _options(given, given["is_causal"], ((192, 128),))
        return _fill(given, attention_backward(*(given[name] for name in names), options))

    members = {
        "_flash_attn_forward": function(
            "q k v k_new= v_new= qv= out_= cu_seqlens_q= cu_seqlens_k= cu_seqlens_k_new= seqused_q= seqused_k= max_seqlen_q= "
            "max_seqlen_k= page_table= kv_batch_idx= leftpad_k= rotary_cos= rotary_sin= seqlens_rotary= q_descale= "
            "k_descale= v_descale= softmax_scale= causal= window_size_left= window_size_right= attention_chunk= softcap= "
            "rotary_interleaved= scheduler_metadata= num_splits= pack_gqa= sm_margin=",
            forward,
        ),
        "_flash_attn_backward": function(
            "dout q k v out softmax_lse cu_seqlens_q= cu_seqlens_k= sequed_q= sequed_k= max_seqlen_q= max_seqlen_k= dq= dk= "
            "dv= softmax_scale= is_causal= window_size_left= window_size_right= softcap= deterministic= sm_margin=",
            backward,
        ),
    }
    return {"flash_attn_interface": members}


def flash4() -> Mapping[str, Mapping[str, Any]]:
    """flash-attn-4 4.0.0b36."""

    def forward(given: Given) -> tuple[torch.Tensor | None, ...]:
        assert given["return_lse"]
        output, lse = attention_forward(given["q"], given["k"], given["v"], _options(given, given["causal"]))
        return output, lse, None, None, None

    def backward(given: Given) -> tuple[torch.Tensor, ...]:
        assert given["deterministic"] is torch.are_deterministic_algorithms_enabled()
        assert isinstance(given["softcap"], float)
        names = ("dout", "q", "k", "v", "out", "lse")
        return attention_backward(*(given[name] for name in names), _options(given, given["causal"]))

    members = {
        "_flash_attn_fwd": function(
            "q k v qv= cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k= max_seqlen_q= max_seqlen_k= min_seqlen_k= page_table= "
            "softmax_scale= causal= softcap= window_size_left= window_size_right= learnable_sink= tile_mn= mma_pv_is_rs= "
            "intra_wg_overlap= num_threads= num_splits= pack_gqa= _arch= score_mod= mask_mod= block_sparse_tensors= "
            "return_lse= out= lse=",
            forward,
        ),
        "_flash_attn_bwd": function(
            "q k v out dout lse softmax_scale= causal= softcap= window_size_left= window_size_right= m_block_size= "
            "n_block_size= num_threads= pack_gqa= num_stages_Q= num_stages_dO= SdP_swapAB= dKV_swapAB= dQ_swapAB= "
            "AtomLayoutMSdP= AtomLayoutNdKV= AtomLayoutMdQ= V_in_regs= cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k= "
            "max_seqlen_q= max_seqlen_k= deterministic= dq= dk= dv= score_mod= score_mod_bwd= mask_mod= aux_tensors= "
            "aux_scalars= block_sparse_tensors= dlse= learnable_sink=",
            backward,
        ),
    }
    return {"flash_attn": {}, "flash_attn.cute": {}, "flash_attn.cute.interface": members}


def aten_flash() -> types.SimpleNamespace:
    """torch's own flash operations, with the parameters of their registered schemas."""

    def options(given: Given) -> Given:
        bounds = given["cum_seq_q"]
        assert given["cum_seq_k"] is bounds
        return {
            "bounds": bounds,
            "longest": None if bounds is None else given["max_q"],
            "scale": given["scale"],
            "softcap": None,
            "reach": _reach(given["window_size_left"], given["window_size_right"], given["is_causal"]),
            "widths": (),
        }

    def forward(given: Given) -> tuple[torch.Tensor, ...]:
        assert (given["dropout_p"], given["return_debug_mask"]) == (0.0, False)
        output, lse = attention_forward(given["query"], given["key"], given["value"], options(given))
        return output, lse, torch.zeros(2, dtype=torch.uint64), output.new_empty(0), output.new_empty(0)

    def backward(given: Given) -> tuple[torch.Tensor, ...]:
        assert given["dropout_p"] == 0.0
        names = ("grad_out", "query", "key", "value", "out", "logsumexp")
        return attention_backward(*(given[name] for name in names), options(given))

    return types.SimpleNamespace(
        _flash_attention_forward=function(_schema(torch.ops.aten._flash_attention_forward), forward),
        _flash_attention_backward=function(_schema(torch.ops.aten._flash_attention_backward), backward),
    )


def _schema(operation: Any) -> str:
    arguments = operation.default._schema.arguments
    return " ".join(one.name + ("=" if one.has_default_value() else "") for one in arguments)


def _quantiser(names: Mapping[torch.dtype, str]) -> Callable[..., Any]:
    """Transformer Engine's: values times the largest power of two that keeps them in range; 1 for zeros and what is not finite."""

    def make(fp8_dtype: str, device: Any, *, rowwise: bool, columnwise: bool, force_pow_2_scales: bool) -> Any:
        (dtype,) = (one for one, name in names.items() if name == fp8_dtype)
        assert rowwise
        assert force_pow_2_scales

        def quantise(x: torch.Tensor) -> types.SimpleNamespace:
            assert x.is_contiguous()
            assert not columnwise or len(x) % 16 == 0
            amax, most = x.float().abs().max(), torch.finfo(dtype).max
            plain = bool(amax > 0) and bool(amax.isfinite())
            scale = torch.exp2((most / amax).log2().floor()) if plain else torch.ones(())
            data = (x.float() * scale).clamp(-most, most).to(dtype).view(torch.uint8)
            turned = data.t().contiguous() if columnwise else None
            return types.SimpleNamespace(_data=data, _transpose=turned, _scale_inv=(1 / scale).reshape(1))

        return quantise

    return make


def transformer_engine() -> Mapping[str, Mapping[str, Any]]:
    """Transformer Engine 2.20.2."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    eights = {torch.float8_e4m3fn: "fp8e4m3", torch.float8_e5m2: "fp8e5m2"}

    def check(given: Given, *tensors: str) -> float:
        assert all(given[name].is_contiguous() for name in tensors)
        assert given["sm_margin"] == 0
        assert given[tensors[0]].dim() == 2
        assert given[tensors[0]].numel()
        return float(given["zero_centered_gamma"])

    def check_forward(given: Given) -> None:
        assert (given["out"], given["quantizer"]) == (None, None)
        assert given["otype"] == names[given["input"].dtype]
        assert given["weight"].dtype == given["input"].dtype

    def rms_forward(given: Given) -> tuple[torch.Tensor | None, ...]:
        check_forward(given)
        offset = check(given, "input", "weight")
        x = given["input"]
        y, rstd = rms_norm.forward(x, given["weight"], given["eps"], offset, "mul_then_cast", x.dtype)
        return y, None, rstd

    def rms_backward(given: Given) -> tuple[torch.Tensor | None, ...]:
        offset = check(given, "dz", "x", "rsigma", "gamma")
        tensors = given["dz"], given["x"], given["gamma"], given["rsigma"]
        return rms_norm.backward(*tensors, offset, "mul_then_cast", True)

    def layer_forward(given: Given) -> tuple[torch.Tensor, ...]:
        check_forward(given)
        assert check(given, "input", "weight", "bias") == 0.0
        tensors = given["input"], None, given["weight"], given["bias"]
        y, _, mean, rstd = layer_norm.forward(*tensors, given["eps"], 1.0, 0.0)
        return y, mean, rstd

    def layer_backward(given: Given) -> tuple[torch.Tensor | None, ...]:
        assert check(given, "dz", "x", "mu", "rsigma", "gamma") == 0.0
        tensors = given["dz"], None, given["x"], given["gamma"], given["mu"], given["rsigma"]
        grads = layer_norm.backward(*tensors, 0.0, True, True)
        return tuple(None if grad is None else grad.to(given["gamma"].dtype) for grad in grads)

    def loss_forward(given: Given) -> tuple[Any, ...]:
        assert (given["reduce_loss"], given["overwrite_input"]) == (False, True)
        batch, rows, classes = given["_input"].shape
        options = 1.0, None, given["ignore_idx"], given["label_smoothing"], 0.0
        group = given["dist_process_group"]
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        whole = cross_entropy if group is None else cross_entropy.sharded(group, rank * classes, ranks * classes)
        loss, stats = whole.forward(given["_input"].view(-1, classes), given["target"], *options)
        return loss.view(batch, rows), given["_input"], stats.t().contiguous(), given["target"], None, rank, ranks

    def loss_backward(given: Given) -> torch.Tensor:
        saved, stats, target = given["saved_input"], given["stats"], given["target"]
        assert (given["n_non_ignore"], given["reduce_loss"]) == (None, False)
        assert saved.is_contiguous()
        assert stats.is_contiguous()
        assert stats.shape == (target.numel(), 2)
        assert target.is_contiguous()
        options = 1.0, None, given["ignore_idx"], given["label_smoothing"], 0.0
        logits, weight = saved[0].clone(), given["grad_output"].contiguous()
        rank, ranks, classes = given["rank"], given["world_size"], logits.shape[1]
        whole = cross_entropy if ranks == 1 else cross_entropy.sharded(None, rank * classes, ranks * classes)
        return saved.copy_(whole.backward(logits, target, weight, stats.t(), *options)[None])  # type: ignore[no-any-return]

    losses = {
        "cross_entropy_forward": function(
            "_input target label_smoothing reduce_loss dist_process_group ignore_idx overwrite_input", loss_forward
        ),
        "cross_entropy_backward": function(
            "saved_input stats target n_non_ignore grad_output label_smoothing reduce_loss rank world_size ignore_idx",
            loss_backward,
        ),
    }
    last = "sm_margin zero_centered_gamma"
    extension = {
        "rmsnorm_fwd": function(f"input weight eps out quantizer otype {last}", rms_forward),
        "rmsnorm_bwd": function(f"dz x rsigma gamma {last}", rms_backward),
        "layernorm_fwd": function(f"input weight bias eps out quantizer otype {last}", layer_forward),
        "layernorm_bwd": function(f"dz x mu rsigma gamma {last}", layer_backward),
    }
    return {
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.constants": {"TE_DType": names | eights},
        "transformer_engine.pytorch.tensor": {"Float8CurrentScalingQuantizer": _quantiser(eights)},
        "transformer_engine.pytorch.triton": {},
        "transformer_engine.pytorch.triton.cross_entropy": losses,
        "transformer_engine_torch": extension,
    }
