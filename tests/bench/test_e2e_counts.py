"""What tokens per second and MFU are made of: FLOPs, tokens, and the rule for loss curves."""

from dataclasses import replace
from math import nan
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.e2e import documents, variants
from bench.e2e.agreement import ULPS, curves, gradients
from bench.e2e.compare import runs_of
from bench.e2e.flops import causal_pairs, step_flops
from bench.e2e.shapes import SHAPES, shape_of
from bench.e2e.train import train
from tests.bench.e2e_jobs import JOB, TEXTS

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_flops_are_those_that_torch_counts(method: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(SHAPES["tiny"], architecture=architecture, tied=architecture == "qwen3")
    job = replace(JOB, method=method)
    monkeypatch.setattr(variants, "shape_of", lambda model, layers: shape)
    model = variants.VARIANTS["vanilla"].build(job, "cpu", {})
    variants.fill(model, 0)
    model.set_attn_implementation("eager")  # its products stand in the open, for all pairs
    rows, width = 2, 24
    tokens = torch.randint(3, shape.vocab, (rows, width))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    counts = counter.get_flop_counts()
    # the angles of the rotary embedding are written as a matrix product
    angles = sum(sum(found.values()) for name, found in counts.items() if name.endswith("model.rotary_emb"))
    ours = step_flops(shape, rows * width, rows * width**2, method, job.rank)
    assert ours.total == counter.get_total_flops() - angles
    assert (ours.adapter > 0) == (method == "lora")


def test_lora_costs_two_thirds_of_a_large_models_full_training() -> None:
    shape, tokens = shape_of("Llama-3-8B"), 8192
    full, lora = (step_flops(shape, tokens, causal_pairs([tokens]), method, 16) for method in ("full", "lora"))
    assert full.linears == pytest.approx(6 * tokens * 6.98e9, rel=1e-3)
    assert lora.linears + lora.head == pytest.approx((full.linears + full.head) * 2 / 3, rel=2e-3)
    assert lora.attention == full.attention
    assert lora.adapter == pytest.approx(6 * tokens * 41.9e6, rel=1e-2)


def test_pairs_are_the_ones_in_the_mask() -> None:
    lengths = [3, 1, 5]
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = (document[:, None] == document[None, :]).tril()
    assert causal_pairs(lengths) == mask.sum()


@pytest.mark.parametrize(
    ("name", "parameters"), [("Llama-3.2-1B", 1.2358e9), ("Qwen3-0.6B", 0.596e9), ("Llama-3-8B", 8.03e9)]
)
def test_shapes_have_the_size_of_their_name(name: str, parameters: float) -> None:
    assert shape_of(name).parameters == pytest.approx(parameters, rel=1e-3)


def test_packed_rows_are_full_and_count_every_token() -> None:
    batches = documents.batches(TEXTS, replace(JOB, layout="packed"))
    assert len(batches) == JOB.steps
    known = [tuple(text) for text in TEXTS.tokens]
    for batch in batches:
        ids, labels, positions = (batch.tensors[name] for name in ("input_ids", "labels", "position_ids"))
        assert ids.shape == (JOB.rows, JOB.length)
        assert batch.tokens == ids.numel()
        starts = positions == 0
        assert len(batch.lengths) == starts.sum() > JOB.rows
        assert torch.equal(labels, ids.masked_fill(starts, documents.IGNORED))
        at = 0
        for length in batch.lengths:
            piece = tuple(ids.flatten()[at : at + length].tolist())
            assert positions.flatten()[at : at + length].tolist() == list(range(length))
            assert any(piece == text[:length] for text in known)
            at += length


def test_padded_rows_count_no_padding() -> None:
    for batch in documents.batches(TEXTS, replace(JOB, layout="padded", rows=4)):
        ids, labels, mask = (batch.tensors[name] for name in ("input_ids", "labels", "attention_mask"))
        assert ids.shape[0] == len(batch.lengths) == 4
        assert batch.tokens == mask.sum() == (labels != documents.IGNORED).sum() < ids.numel()
        assert mask.sum(1).tolist() == list(batch.lengths)
        assert ids.shape[1] - max(batch.lengths) < documents.PADDED_TO_MULTIPLE_OF
        assert torch.equal(labels[mask.bool()], ids[mask.bool()])


def test_same_job_same_batches_other_seed_other_batches() -> None:
    one, same, other = (documents.batches(TEXTS, replace(JOB, seed=seed))[0].tensors["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_moved_weights_err_as_much_as_one_rounding() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(64, 512, dtype=dtype)
        torch.nn.init.uniform_(layer.weight, 1.1, 1.9)  # the unit in the last place is eps
        torch.nn.init.zeros_(layer.bias)
        before = layer.weight.detach().clone()
        variants.move_by_a_rounding(layer, 1)
        ulps = (layer.weight.detach() - before).double() / torch.finfo(dtype).eps
        assert set(ulps.flatten().tolist()) == {-1.0, 0.0, 1.0}
        assert ulps.square().mean().item() == pytest.approx(1 / 12, rel=0.05)
        assert not layer.bias.any()


def test_orders_alternate_and_vanilla_first_measures_rounding() -> None:
    runs = runs_of(["vanilla", "ours"], 2)
    assert [run.variant for run in runs] == ["vanilla", "ours", "ours", "vanilla"]
    assert [len(run.moved) for run in runs] == [2, 0, 0, 0]


def test_rule_for_loss_curves() -> None:
    vanilla, moved = [4.0, 3.0], [[4.0, 3.01]]
    assert curves([4.0, 3.019], vanilla, moved)["loss_agrees"]
    assert not curves([4.0, 3.021], vanilla, moved)["loss_agrees"]
    assert not curves([nan, 3.0], vanilla, moved)["loss_agrees"]
    without_noise = curves([4.0 + 4 * ULPS * EPS, 3.0], vanilla, [vanilla])
    assert without_noise["loss_agrees"]
    assert without_noise["loss_difference_step"] == 1
    assert not curves([4.0 + 5 * ULPS * EPS, 3.0], vanilla, [vanilla])["loss_agrees"]


def test_rule_for_gradients_names_the_worst() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    moved = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.5])}  # a tenth of 5 off

    def judged(b: list[float]) -> dict[str, Any]:
        return gradients({**one, "b": torch.tensor(b)}, one, [one, moved])

    assert judged([3.0, 4.95])["gradients_agree"]
    twisted = judged([3.0, 5.05])
    assert not twisted["gradients_agree"]
    assert twisted["gradient_worst_parameter"] == "b"
    assert twisted["gradient_distance_worst"] == pytest.approx(0.21)
    assert not judged([0.0, 0.0])["gradients_agree"]
    assert not judged([nan, 4.0])["gradients_agree"]
    assert gradients({"other": torch.ones(1)}, one, [one]) == {"gradient_distance": None}
    never = {"a": torch.zeros(2)}
    assert gradients(never, never, [never])["gradients_agree"]
    assert not gradients({"a": torch.ones(2)}, never, [never])["gradients_agree"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_rule_sees_a_learning_rate_that_is_a_thousandth_off(method: str) -> None:
    job = replace(JOB, method=method, steps=6)
    vanilla, of_vanilla = train(job, "vanilla", TEXTS, 0)
    moved, of_moved = train(job, "vanilla", TEXTS, 1)
    again, of_again = train(job, "vanilla", TEXTS, 0)
    other, _ = train(replace(job, learning_rate=job.learning_rate * 1.001), "vanilla", TEXTS, 0)
    assert again.losses == vanilla.losses
    assert vanilla.losses[-1] < vanilla.losses[0]
    assert not curves(other.losses, vanilla.losses, [moved.losses])["loss_agrees"]
    assert gradients(of_again, of_vanilla, [of_moved])["gradient_distance_worst"] == 0
    assert 0 < gradients(of_moved, of_vanilla, [of_moved])["gradient_noise"] < 1e-4
    assert (vanilla.trainable == vanilla.parameters) == (method == "full")


def test_rule_sees_a_norm_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dtype of a real run, whose noise hides it from the loss."""
    job = replace(JOB, dtype="bfloat16", steps=12)
    (_, of_vanilla), (_, of_moved) = (train(job, "vanilla", TEXTS, noise) for noise in (0, 1))

    def fill_and_break(model: torch.nn.Module, seed: int) -> None:
        variants.fill(model, seed)
        model.get_parameter("model.norm.weight").register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]

    monkeypatch.setattr("bench.e2e.train.fill", fill_and_break)
    _, of_broken = train(job, "vanilla", TEXTS, 0)
    found = gradients(of_broken, of_vanilla, [of_moved])
    assert not found["gradients_agree"]
    assert found["gradient_worst_parameter"] == "model.norm.weight"
    assert found["gradient_distance_worst"] == 1.0


def test_packed_documents_do_not_see_each_other() -> None:
    """The loss of a packed row is that of its documents alone, weighted by their predicted tokens."""
    job = replace(JOB, layout="packed")
    model = variants.VARIANTS["vanilla"].build(job, "cpu", {})
    variants.fill(model, 0)
    batch = documents.batches(TEXTS, job)[0]
    packed = model(**batch.tensors).loss.item()
    pieces = torch.split(batch.tensors["input_ids"].flatten(), list(batch.lengths))
    alone = [
        (model(input_ids=piece[None], labels=piece[None]).loss.item(), len(piece) - 1)
        for piece in pieces
        if len(piece) > 1
    ]
    mean = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    assert packed == pytest.approx(mean, rel=ULPS * EPS)


@pytest.mark.parametrize("wrong", [{"method": "qlora"}, {"layout": "jagged"}, {"warmup": 4, "steps": 4}])
def test_a_job_that_cannot_be_is_refused(wrong: dict[str, int | str]) -> None:
    with pytest.raises(ValueError, match=r"expected one of|leave none to time"):
        replace(JOB, **wrong)  # type: ignore[arg-type]
