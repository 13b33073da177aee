"""Losses of recipes: held to plain PyTorch on full logits, in value and in every gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.neftune import activate_neftune

import automodel_accel as accel
from automodel_accel.train.distillation import Teacher
from automodel_accel.train.losses import set_loss
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
    built = accel.report(model).materialised_logits
    assert built == (1 if z_loss else 0)
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
