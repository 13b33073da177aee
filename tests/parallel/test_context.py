"""Context parallelism in one process: how rows are cut, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import automodel_accel as accel
from automodel_accel.kernels.facts import this_machine
from automodel_accel.parallel import context
from automodel_accel.parallel.context_attention import ContextMask, Running, _attend
from automodel_accel.parallel.context_proof import POISONED, check_tokens_apart
from automodel_accel.parallel.context_ring import ring_attention, ring_objection
from automodel_accel.parallel.context_rows import Rows
from automodel_accel.parallel.mesh import Mesh, Ranks
from tests.tiny import batch, tiny

RANKS = Ranks(Mesh(context=2, shard=1), None)  # laid out, but not running: what can be refused needs no second process


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 5), tokens=st.integers(1, 40))
def test_ranks_hold_every_token_once_and_see_as_many(size: int, tokens: int) -> None:
    rows = [Rows(None, size, rank, tokens) for rank in range(size)]
    held = torch.cat([one.own(one.filled(torch.arange(tokens)[None], -1))[0] for one in rows])
    assert sorted(held[held >= 0].tolist()) == list(range(tokens))
    assert len(held) == rows[0].length < tokens + 2 * size
    assert len({sum(one.starts) for one in rows}) == 1


def test_pieces_are_put_together_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(12)[None]
    rows = [Rows(None, 3, rank, 12) for rank in range(3)]
    gathered = torch.cat([one.own(tokens) for one in rows], 1)
    monkeypatch.setattr("automodel_accel.parallel.context_rows.gather_to", lambda x, group, dim: gathered)
    assert torch.equal(rows[1].whole(rows[1].own(tokens), 1), tokens)


def test_a_context_axis_of_one_changes_nothing() -> None:
    model = tiny("llama")
    before = [type(module) for module in model.modules()]
    context.cut(model, Ranks(Mesh(shard=1), None))
    assert [type(module) for module in model.modules()] == before


def test_revert_undoes_the_cut() -> None:
    model = tiny("llama")
    before = [type(module) for module in model.modules()]
    context.cut(accel.apply(model), RANKS)
    accel.revert(model)
    assert [type(module) for module in model.modules()] == before


def _with_convolution() -> nn.Module:
    """A llama whose MLPs look one token back, with a weight of zero."""
    model: Any = tiny("llama")

    class Shifting(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.0 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]

    model.model.layers[1].mlp.__class__ = Shifting
    return model  # type: ignore[no-any-return]


def _apart(model: nn.Module) -> None:
    """What the first forward of a model that is cut does."""
    context.cut(model, RANKS)
    forward = type(model).forward
    running = next(cell.cell_contents for cell in forward.__closure__ or () if isinstance(cell.cell_contents, Running))
    check_tokens_apart(model, forward.__wrapped__, running, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "applied"),
    [("qwen3", False), ("gemma3_text", False), ("gpt_neox", False), ("mixtral", False), ("llama", True)],
)
def test_attention_alone_mixes_tokens(name: str, applied: bool) -> None:
    model = tiny(name)
    state = torch.get_rng_state()
    _apart(accel.apply(model) if applied else model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_scale_that_tokens_share_is_no_mixing(recipe: str) -> None:
    model = accel.apply(tiny("llama", hidden_size=64, intermediate_size=64, head_dim=16), fp8=recipe)
    _apart(model)
    assert all(module.training for module in model.modules())
    assert accel.report(model).counts.saturated == 0


def test_a_convolution_is_found_whatever_its_weights() -> None:
    with pytest.raises(ValueError, match=rf"something besides attention mixes tokens.*\[{POISONED}, {POISONED + 1}\]"):
        _apart(_with_convolution())


@pytest.mark.parametrize("dropped", [{"shift_labels"}, {"num_items_in_batch"}])
def test_a_loss_that_is_not_told_is_found(dropped: set[str]) -> None:
    model: Any = tiny("llama")
    loss = model.loss_function
    model.loss_function = lambda shift_labels=None, num_items_in_batch=None, **given: loss(
        **{
            **given,
            **{
                name: value
                for name, value in (("shift_labels", shift_labels), ("num_items_in_batch", num_items_in_batch))
                if name not in dropped
            },
        }
    )
    with pytest.raises(ValueError, match=r"the loss of this LlamaForCausalLM is .* where the sum over shifted labels"):
        _apart(model)


def test_a_state_space_beside_attention_is_found() -> None:
    with pytest.raises(ValueError, match="something besides attention mixes tokens"):
        _apart(tiny("falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8))


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("mamba", {}, "no causal mask"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "no attention that asks"),
        ("t5", {}, "an encoder with a decoder"),
        ("bert", {}, "computes its loss itself"),
        ("gemma2", {}, "attention implementation 'eager'"),
        ("mixtral", {"output_router_logits": True}, "auxiliary loss"),
        ("llama", {"attn_implementation": "flex_attention"}, "attention implementation 'flex_attention'"),
    ],
)
def test_models_that_cannot_be_cut_are_refused_and_left_alone(name: str, config: dict[str, Any], words: str) -> None:
    model = tiny(name, **config)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=words):
        context.cut(model, RANKS)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 24])}, "cu_seq_lens_q"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"attention_mask": torch.ones(2, 1, 24, 24)}, "attention_mask has shape"),
        ({"position_ids": torch.zeros(3, 2, 24)}, "position_ids have shape"),
        ({"labels": torch.zeros(2, 23, dtype=torch.long)}, "labels have shape"),
        ({"pixel_values": torch.zeros(2)}, "pixel_values"),
        ({"input_ids": None}, "neither input_ids nor inputs_embeds"),
    ],
)
def test_what_cannot_be_cut_is_refused(given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "check_rows", lambda *args: None)
    model = tiny("llama")
    context.cut(model, RANKS)
    with pytest.raises(ValueError, match=words):
        model(**{**batch(), **given})


def test_positions_counted_by_the_model_are_refused() -> None:
    model = tiny("opt", ffn_dim=48, word_embed_proj_dim=32)
    context.cut(model, RANKS)
    with pytest.raises(ValueError, match="give it position_ids"):
        model(**batch(), attention_mask=torch.ones(2, 24, dtype=torch.long))


def test_positions_changed_by_the_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "check_rows", lambda *args: None)
    model: Any = tiny("llama")
    own = type(model.model).forward
    context.cut(model, RANKS)
    monkeypatch.setattr(type(model.model), "forward", _moved(type(model.model).forward))
    assert own is not type(model.model).forward
    with pytest.raises(ValueError, match="computes position_ids of its own"):
        model(**batch())


def _moved(forward: Any) -> Any:
    return lambda self, *args, **kwargs: forward(
        self, *args, **{**kwargs, "position_ids": kwargs["position_ids"].clone()}
    )


def test_nobody_reads_the_mask_as_a_tensor() -> None:
    mask: Any = ContextMask(None, (), False)
    for act in (
        lambda: mask + 1,
        lambda: torch.zeros(1) + mask,
        lambda: mask[0],
        lambda: mask.dtype,
        lambda: len(mask),
    ):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            act()
    with pytest.raises(ValueError, match="only an attention by transformers' interface"):
        torch.where(torch.ones(1) > 0, mask, 0)


def test_torchs_ring_is_refused_without_gpus() -> None:
    facts = this_machine()
    with (
        pytest.raises(ValueError, match=r"needs NVIDIA GPUs.* 'cpu'; train without it"),
        ring_attention(RANKS, 24, replace(facts, device="cpu")),
    ):
        pass
    assert ring_objection(replace(facts, device="cuda")) is None


def test_what_torchs_ring_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of it torch's attention is exchanged: own tokens, heads repeated, causal; other masks are refused."""
    rows, calls = Rows(None, 2, 0, 8), []
    query, key = torch.randn(1, 4, 4, 8), torch.randn(1, 2, 4, 8)

    def ring(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append((args, kwargs))
        return args[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", ring)
    _attend(query, key, key, ContextMask(rows, (), True), {"scaling": 0.5})
    ((args, kwargs),) = calls
    assert [x.shape for x in args] == [query.shape] * 3
    assert torch.equal(args[1][:, 1], key[:, 0])
    assert kwargs == {"is_causal": True, "scale": 0.5}
    with pytest.raises(ValueError, match="has no windows, documents"):
        _attend(query, key, key, ContextMask(rows, (), False), {})
