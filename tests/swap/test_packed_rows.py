"""Packed rows: no document sees another, in any model, and no mask of N x N is ever built."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import automodel_accel as accel
from tests.swap.compare import applied, assert_close, step
from tests.swap.test_attention import EAGER, MODELS, ONLY, model_of
from tests.tiny import TOKENS, VOCABULARY, batch

FIRST = 13  # tokens of the first of two documents
AFMOE: dict[str, Any] = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1},
    **{"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "global_attn_every_n_layers": 2},
}
LEAKY = ("gpt_oss", "afmoe")  # transformers itself does not tell their masks of position_ids
PACKED = torch.cat([torch.arange(FIRST), torch.arange(TOKENS - FIRST)])[None]


def packed_model(name: str, **config: Any) -> Any:
    return model_of(name, **(AFMOE if name == "afmoe" else {}), **config)


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two packed rows with the same second document."""
    tokens = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    other = tokens.clone()
    other[:, :FIRST] = (other[:, :FIRST] + 7) % VOCABULARY
    return tokens, other


@pytest.mark.parametrize("name", [*MODELS, "afmoe"])
@pytest.mark.parametrize("cache", [False, True])
def test_changing_one_document_leaves_the_other_bit_equal(name: str, cache: bool) -> None:
    model = packed_model(name).eval()
    ours = applied(model, **ONLY)
    with torch.no_grad():
        mine = [ours(row, position_ids=PACKED, use_cache=cache).logits for row in rows()]
        theirs = [model(row, position_ids=PACKED, use_cache=cache).logits for row in rows()]
    assert torch.equal(mine[0][:, FIRST:], mine[1][:, FIRST:])
    assert not torch.equal(mine[0][:, :FIRST], mine[1][:, :FIRST])
    assert torch.equal(theirs[0][:, FIRST:], theirs[1][:, FIRST:]) == (name not in LEAKY and not cache)
    counts = accel.report(ours).counts
    assert counts.fused["attention"] == 4
    assert not counts.passed_on


@pytest.mark.parametrize("name", [*MODELS, "afmoe"])
def test_a_packed_row_is_its_documents_run_alone(name: str) -> None:
    ours = applied(packed_model(name), **ONLY).eval()
    row, _ = rows()
    with torch.no_grad():
        packed = ours(row, position_ids=PACKED, use_cache=False).logits
        alone = [ours(part, use_cache=False).logits for part in row.split([FIRST, TOKENS - FIRST], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LEAKY])
@pytest.mark.parametrize("eager", [False, True], ids=["its own choice", "eager"])
def test_loss_and_every_gradient_of_packed_rows(name: str, eager: bool) -> None:
    model = model_of(name, use_cache=False, **(EAGER if eager else {}))
    ours = applied(model, **ONLY)
    other = torch.cat([torch.arange(5), torch.arange(1), torch.arange(TOKENS - 6)])[None]
    for position_ids in (PACKED, torch.cat([PACKED, other])):
        inputs = {**batch(), "position_ids": position_ids}
        assert_close(step(ours, **inputs), step(model, **inputs))
    assert not accel.report(ours).counts.passed_on


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_under_torch_compile(name: str) -> None:
    torch._dynamo.reset()
    model = model_of(name, use_cache=False)
    ours = applied(model, **ONLY)
    inputs = {**batch(), "position_ids": PACKED}
    expected = step(model, **inputs)
    ours.forward = torch.compile(ours.forward, backend="aot_eager")
    assert_close(step(ours, **inputs), expected)
    torch._dynamo.reset()


def test_chunked_attention() -> None:
    chunked = {"attention_chunk_size": 5, "num_local_experts": 2, "intermediate_size_mlp": 32, "use_cache": False}
    model = model_of("llama4_text", **chunked)
    ours = applied(model, **ONLY)
    for position_ids in (None, PACKED):
        inputs = {**batch(), "position_ids": position_ids}
        assert_close(step(ours, **inputs), step(model, **inputs))
    assert not accel.report(ours).counts.passed_on


def test_cumulative_lengths_in_place_of_positions() -> None:
    ours = applied(model_of("llama", use_cache=False), **ONLY).eval()
    ends = torch.tensor([0, FIRST, TOKENS], dtype=torch.int32)
    logits = [ours(row, cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits for row in rows()]
    assert torch.equal(logits[0][:, FIRST:], logits[1][:, FIRST:])


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_no_dense_mask_of_4096_tokens(name: str) -> None:
    tokens = 4096
    model = model_of(
        name, use_cache=False, max_position_embeddings=tokens, num_attention_heads=1, num_key_value_heads=1
    )
    ours = accel.apply(model, **{**ONLY, "loss": "auto"})
    ids = torch.randint(3, VOCABULARY, (1, tokens))
    position_ids = (torch.arange(tokens) % 512)[None]
    with Largest() as seen:
        ours(ids, labels=ids, position_ids=position_ids).loss.backward()
    assert seen.elements < tokens * tokens // 8
    assert not accel.report(ours).counts.passed_on
