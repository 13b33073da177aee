"""The accelerated model computes vanilla's loss and vanilla's gradient of every parameter, whatever the batch looks like."""

import copy
from typing import Any

import pytest
import torch

import automodel_accel as accel
from tests.swap.compare import applied, assert_as_good, assert_close, frozen, step
from tests.tiny import CAUSAL, OTHERS, TOKENS, batch, tiny


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_and_every_gradient_without_logits(name: str) -> None:
    model = tiny(name)
    ours = applied(model)
    assert_close(step(ours, **batch()), step(model, **batch()))
    report = accel.report(ours)
    assert {fusion: report.places(fusion) for fusion in CAUSAL[name]} == CAUSAL[name]
    calls = report.counts.fused.copy()
    calls["norm"] += calls.pop("residual", 0)  # norms that were computed together with the sum before them
    assert calls.pop("attention") == 2
    assert calls.pop("linear", 0) == report.places("linear")
    assert +calls == {fusion: places for fusion, places in CAUSAL[name].items() if places}
    assert not report.counts.passed_on
    assert report.materialised_logits == 0


@pytest.mark.parametrize("name", OTHERS)
def test_encoder_and_encoder_decoder(name: str) -> None:
    model = tiny(name)
    ours = applied(model)
    assert_close(step(ours, **batch()), step(model, **batch()))
    report = accel.report(ours)
    assert {fusion: report.places(fusion) for fusion in OTHERS[name]} == OTHERS[name]
    assert report.materialised_logits == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
def test_low_precision_is_as_near_to_the_truth(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    ours = applied(model)
    truth = step(copy.deepcopy(model).float(), **batch())
    assert_as_good(step(ours, **batch()), step(model, **batch()), truth, dtype)
    report = accel.report(ours)
    # T5's attention adds a bias of its own
    assert not [why for why in report.counts.passed_on if "position_bias" not in why]
    expected = {**CAUSAL, **OTHERS}[name]
    assert {fusion: report.places(fusion) for fusion in expected} == expected


@pytest.mark.parametrize("name", CAUSAL)
def test_autocast(name: str) -> None:
    model = tiny(name)
    ours = applied(model)
    truth = step(model, **batch())
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (step(m, **batch()) for m in (ours, model))
    assert mine.loss.dtype == theirs.loss.dtype
    assert_as_good(mine, theirs, truth, torch.bfloat16)
    report = accel.report(ours)
    assert not report.counts.passed_on
    assert report.materialised_logits == 0


def _all_ignored_in_one_row() -> dict[str, Any]:
    inputs = batch()
    inputs["labels"][0] = -100
    return inputs


def _padded() -> dict[str, Any]:
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -7:] = 0
    mask[1, :4] = 0
    inputs["labels"][mask == 0] = -100
    return {**inputs, "attention_mask": mask}


BATCHES: dict[str, dict[str, Any]] = {
    "no label ignored": batch(ignored=0),
    "a row ignored": _all_ignored_in_one_row(),
    "one label left": batch(rows=1, ignored=TOKENS - 1),
    "batch of one": batch(rows=1),
    "padding": _padded(),
    "num_items_in_batch, a number": {**batch(), "num_items_in_batch": 29},
    "num_items_in_batch, a tensor": {**batch(), "num_items_in_batch": torch.tensor(29)},
    "embeddings in place of tokens": {"inputs_embeds": torch.randn(2, TOKENS, 32), "labels": batch()["labels"]},
    "position_ids": {**batch(), "position_ids": torch.arange(TOKENS).flip(0)[None]},
    "the last logits only": {**batch(), "labels": batch()["labels"][:, -9:], "logits_to_keep": 9},
    "a tuple of outputs": {**batch(), "return_dict": True, "output_hidden_states": True},
}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("inputs", BATCHES.values(), ids=BATCHES)
def test_batches(name: str, inputs: dict[str, Any]) -> None:
    model = tiny(name)
    ours = applied(model)
    assert_close(step(ours, **inputs), step(model, **inputs))
    assert accel.report(ours).materialised_logits == 0


@pytest.mark.parametrize(
    "inputs", [batch(ignored=TOKENS), batch(tokens=1, ignored=0)], ids=["all ignored", "one token"]
)
@pytest.mark.parametrize("num_items", [{}, {"num_items_in_batch": 7}], ids=["mean", "sum"])
def test_no_label_left_is_what_vanilla_makes_of_it(inputs: dict[str, Any], num_items: dict[str, int]) -> None:
    """NaN for the mean over no labels, zero for the sum."""
    model = tiny()
    ours, theirs = (step(m, **inputs, **num_items) for m in (applied(model), model))
    assert theirs.loss.isnan().item() == (not num_items)
    assert torch.equal(ours.loss.isnan(), theirs.loss.isnan())
    for name, expected in theirs.gradients.items():
        assert torch.equal(ours.gradients[name].isnan(), expected.isnan()), name
        assert torch.equal(ours.gradients[name].nan_to_num(), expected.nan_to_num()), name


def test_a_label_outside_the_vocabulary_is_an_error_as_in_vanilla() -> None:
    inputs = batch()
    inputs["labels"][0, 8] = 1000
    model = tiny()
    with pytest.raises(IndexError):
        model(**inputs)
    with pytest.raises((IndexError, ValueError)):
        applied(model)(**inputs)


def test_labels_by_position_and_shift_labels() -> None:
    model = tiny()
    ours = applied(model)
    tokens, labels = batch().values()
    by_position = (tokens, None, None, None, None, labels)
    assert_close(step(ours, *by_position), step(model, *by_position))
    shifted = {"input_ids": tokens, "labels": labels, "shift_labels": torch.roll(labels, -1, 1)}
    assert_close(step(ours, **shifted), step(model, **shifted))
    assert accel.report(ours).materialised_logits == 0


def test_a_tuple_of_outputs() -> None:
    model = tiny()
    losses = [m(**batch(), return_dict=False)[0] for m in (applied(model), model)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
def test_tied_and_untied_heads(name: str, tied: bool) -> None:
    model = tiny(name, tie_word_embeddings=tied)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    ours = applied(model)
    assert_close(step(ours, **batch()), step(model, **batch()))
    assert accel.report(ours).materialised_logits == 0


FROZEN = {
    "head": ("lm_head",),
    "norms": ("norm",),
    "head and embeddings": ("lm_head", "embed_tokens"),
    "all but the last norm": ("layers", "lm_head", "embed_tokens"),
    "all but the head": ("layers", "model.norm", "embed_tokens"),
    "all but one linear": ("norm", "lm_head", "embed", "attn", "layers.0", "up_proj", "down_proj"),
    "the first layer": ("embed_tokens", "layers.0"),
}


# a tied head has no parameter of its own to freeze
FREEZINGS = [
    (part, tied) for part in FROZEN for tied in (False, True) if not (tied and part in ("head", "all but the head"))
]


@pytest.mark.parametrize(("frozen_parts", "tied"), FREEZINGS)
def test_frozen_parameters(frozen_parts: str, tied: bool) -> None:
    names = FROZEN[frozen_parts]
    model = tiny(tie_word_embeddings=tied)
    ours = applied(model)
    with frozen(model, *names), frozen(ours, *names):
        theirs = step(model, **batch())
        assert 0 < len(theirs.gradients) < len(list(model.parameters()))
        assert_close(step(ours, **batch()), theirs)
    assert accel.report(ours).materialised_logits == 0


def test_everything_frozen_gives_a_loss_without_a_graph() -> None:
    model = tiny()
    ours = applied(model)
    with frozen(model, ""), frozen(ours, ""):
        loss = ours(**batch()).loss
        assert not loss.requires_grad
        torch.testing.assert_close(loss, model(**batch()).loss)
