"""Losses of recipes: held to plain PyTorch on full logits, in value and in every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.neftune import activate_neftune

import automodel_accel as accel
from automodel_accel.train.distillation import Teacher
from automodel_accel.train.losses import CausalLoss, set_loss
from tests.tiny import VOCABULARY, batch, tiny

ITEMS = torch.tensor(37.0)


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, grad in one.items():
        scale = grad.abs().max().clamp_min(1e-6)
        assert ((other[name] - grad).abs().max() / scale).item() < 2e-5, name


def adapted(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(tiny(name), config)


def plain(model: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(full logits [tokens, V] that predict, their targets)."""
    inputs = {name: value for name, value in given.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1].reshape(-1, VOCABULARY).float()
    return logits, given["labels"][:, 1:].reshape(-1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2], ids=["smoothed", "with z"])
def test_smoothing_and_z_loss_are_their_definition(name: str, z_loss: float) -> None:
    model, given = tiny(name).train(), batch()
    logits, target = plain(model, **given)
    counted = target != -100
    expected = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="sum")
    expected = (expected + z_loss * torch.logsumexp(logits, -1).square()[counted].sum()) / ITEMS
    expected.backward()
    wanted = grads(model)
    model.zero_grad()
    accel.apply(model)
    take_back = set_loss(model, label_smoothing=0.1, z_loss=z_loss)
    loss = model(**given, num_items_in_batch=ITEMS).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(wanted, grads(model))
    assert accel.report(model).materialised_logits == 0, accel.report(model)
    mean = model(**given).loss
    assert mean.item() == pytest.approx(expected.item() * ITEMS.item() / counted.sum().item(), rel=1e-5)
    take_back()
    assert "_loss_function" not in vars(model)
    assert model(**given).loss.item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)


@pytest.mark.parametrize("head", ["full", "lora", "lora on the head"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_a_teacher_is_its_definition(name: str, head: str) -> None:
    torch.manual_seed(1)
    student: Any = tiny(name) if head == "full" else adapted(name)
    if head == "lora on the head":
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        student = get_peft_model(tiny(name), config)
    student.train()
    teacher_model = tiny("llama")
    given, weight, temperature = batch(), 0.3, 2.0
    logits, target = plain(student, **given)
    with torch.no_grad():
        said, _ = plain(teacher_model.eval(), **given)
    counted = target != -100
    log_p, log_q = (torch.log_softmax(one / temperature, -1)[counted] for one in (said, logits))
    apart = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    expected = ((1 - weight) * F.cross_entropy(logits, target, reduction="sum") + weight * apart) / ITEMS
    expected.backward()
    wanted = grads(student)
    student.zero_grad()

    accel.apply(student)
    teacher = Teacher(accel.apply(teacher_model), weight, temperature)
    loss = teacher.loss(student, given, ITEMS)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(wanted, grads(student))
    counts = accel.report(student).counts
    if head == "lora on the head":
        assert counts.materialised.total() == 1
    else:
        assert counts.fused["distillation"] == 1
        assert counts.materialised.total() + accel.report(teacher_model).materialised_logits == 0


def test_a_plain_teacher_and_a_plain_student() -> None:
    student, teacher_model, given = tiny("llama").train(), tiny("gemma2"), batch()
    plain_loss = Teacher(teacher_model, 0.5, 1.5).loss(student, given, ITEMS)
    fused = Teacher(accel.apply(teacher_model), 0.5, 1.5).loss(accel.apply(student), given, ITEMS)
    assert fused.item() == pytest.approx(plain_loss.item(), rel=1e-5)


def test_a_teacher_of_other_words_is_refused() -> None:
    torch.manual_seed(0)
    other = tiny("llama")
    other.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(ValueError, match=rf"{VOCABULARY}\].*{VOCABULARY + 3}\].*same vocabulary"):
        Teacher(other, 0.5, 1.0).loss(tiny("llama").train(), batch(), ITEMS)


def test_noise_on_embeddings_is_there_in_training_only() -> None:
    model, given = accel.apply(tiny("llama")), batch()
    before = model.eval()(**given).loss
    activate_neftune(model, 5.0)
    assert torch.equal(model(**given).loss, before)
    model.train()
    torch.manual_seed(0)
    first = model(**given).loss
    assert first.item() != before.item()
    assert model(**given).loss.item() != first.item()


def smoothed(model: Any, given: dict[str, Any], z_loss: float) -> torch.Tensor:
    """With label smoothing of 0.1, on full logits, over ITEMS."""
    logits, target = plain(model, **given)
    expected = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="sum")
    squares: torch.Tensor = torch.logsumexp(logits, -1).square()[target != -100].sum()
    return (expected + z_loss * squares) / ITEMS


@pytest.mark.parametrize("applied", [False, True], ids=["plain", "applied"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["LoRA", "LoRA on the head"])
def test_z_loss_with_adapters(targets: list[str], applied: bool) -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny("gemma2"), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    model.train()
    expected = smoothed(model, batch(), 1e-2)
    expected.backward()
    wanted = grads(model)
    model.zero_grad()
    if applied:
        accel.apply(model)
    take_back = set_loss(model, label_smoothing=0.1, z_loss=1e-2)
    loss = model(**batch(), num_items_in_batch=ITEMS).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(wanted, grads(model))
    assert not applied or accel.report(model).materialised_logits == 0
    take_back()
    assert "_loss_function" not in vars(model.get_base_model())


def test_held_out_losses_stay_plain_and_settings_go_nowhere(tmp_path: Path) -> None:
    model, given = tiny("llama"), batch()
    with torch.no_grad():
        before = model(**given).loss
    config = model.config.to_dict()
    set_loss(model, label_smoothing=0.2, z_loss=0.1)
    with torch.no_grad():
        assert torch.equal(model(**given).loss, before)
    assert model(**given).loss > before
    assert model.config.to_dict() == config
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(**given).loss, model(**given).loss)


def test_the_loss_that_was_set_before_comes_back() -> None:
    model = tiny("llama")
    first = set_loss(model, label_smoothing=0.2)
    kept = model.loss_function
    set_loss(model, z_loss=0.1)()
    assert model.loss_function is kept
    first()
    assert "_loss_function" not in vars(model)


def test_ignored_index_and_shifted_labels_are_those_of_transformers() -> None:
    model, given = tiny("llama"), batch()
    with torch.no_grad():
        logits, labels = model(given["input_ids"]).logits, given["labels"]
    loss, theirs = CausalLoss(0.0, 0.0), model.loss_function
    for options in ({"ignore_index": 5}, {"shift_labels": labels.roll(-1, 1)}, {"num_items_in_batch": 3}):
        other = labels.masked_fill(labels == -100, options.get("ignore_index", -100))  # type: ignore[call-overload]
        assert torch.equal(loss(logits, other, VOCABULARY, **options), theirs(logits, other, VOCABULARY, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("llama", {"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ("llama", {"z_loss": -1.0}, "z_loss -1.0; expected"),
        ("bert", {"z_loss": 0.1}, "without loss_function"),
        ("t5", {"z_loss": 0.1}, "without loss_function"),
    ],
)
def test_what_cannot_be_served_is_said(name: str, settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        set_loss(tiny(name), **settings)


def test_another_loss_is_not_replaced() -> None:
    model = tiny("llama")
    model.loss_function = F.mse_loss
    with pytest.raises(ValueError, match="is mse_loss, expected transformers' ForCausalLMLoss"):
        set_loss(model, z_loss=0.1)
