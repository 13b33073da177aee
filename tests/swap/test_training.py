"""Several steps: accumulation, repeated backward, optimizers, evaluation in between, a loss of the user's own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import automodel_accel as accel
from tests.swap.compare import Step, applied, assert_close, assert_equal, gradients, step
from tests.tiny import VOCABULARY, batch, tiny


def test_accumulation_over_two_micro_batches() -> None:
    model = tiny()
    ours = applied(model)
    steps = []
    for m in (ours, model):
        losses = [m(**inputs, num_items_in_batch=60).loss for inputs in (batch(), batch(rows=3, tokens=9, ignored=2))]
        for loss in losses:
            loss.backward()
        steps.append(Step(torch.stack(losses).detach(), gradients(m)))
    assert_close(*steps)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_backward_twice_doubles_every_gradient(name: str) -> None:
    model = applied(tiny(name, tie_word_embeddings=False))
    once = step(model, **batch())
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    assert_equal(Step(loss.detach(), gradients(model)), once)
    loss.backward()
    torch.testing.assert_close(gradients(model), {name: 2 * g for name, g in once.gradients.items()})


def test_two_losses_through_one_graph() -> None:
    """The sum of two forwards, each scaled: the gradient that comes into the loss is no one."""
    model = tiny()
    ours = applied(model)
    steps = []
    for m in (ours, model):
        loss = 3.0 * m(**batch()).loss - 0.25 * m(**batch(rows=1)).loss
        loss.backward()
        steps.append(Step(loss.detach(), gradients(m)))
    assert_close(*steps)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "granite"])
def test_five_steps_of_adamw_move_the_weights_alike(name: str) -> None:
    model = tiny(name)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved = []
    for m in (applied(model), model):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        for rows in range(1, 6):
            m(**batch(rows=rows)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(torch.cat([(p.detach() - start[n]).flatten() for n, p in m.named_parameters()]))
    assert moved[1].norm() > 0.1
    assert torch.cosine_similarity(*moved, dim=0) >= 0.9999


def test_evaluation_gives_real_logits() -> None:
    model = tiny()
    ours = applied(model)
    with torch.no_grad():
        in_training = ours(**batch())
    assert type(in_training.logits) is torch.Tensor, "no gradients, no laziness"
    ours.eval(), model.eval()
    mine, theirs = ours(**batch()), model(**batch())
    assert type(mine.logits) is torch.Tensor
    torch.testing.assert_close(mine.logits, theirs.logits)
    torch.testing.assert_close(mine.loss, theirs.loss)
    assert accel.report(ours).counts.fused["loss"] == 0


def test_training_without_labels_gives_real_logits() -> None:
    model = tiny()
    ours = applied(model)
    tokens, labels = batch().values()
    steps = []
    for m in (ours, model):
        logits = m(input_ids=tokens).logits
        assert type(logits) is torch.Tensor
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        steps.append(Step(loss.detach(), gradients(m)))
    assert_close(*steps)
    assert accel.report(ours).materialised_logits == 0, "only logits of a step with labels are counted"


def test_generate_between_two_steps() -> None:
    model = tiny()
    ours = applied(model)
    prompt = batch()["input_ids"][:, :6]
    for mode in (True, False, True):
        ours.train(mode), model.train(mode)
        texts = [m.generate(prompt, max_new_tokens=5, do_sample=False) for m in (ours, model)]
        assert torch.equal(*texts)
        ours.train(), model.train()
        assert_close(step(ours, **batch()), step(model, **batch()))
    assert accel.report(ours).materialised_logits == 0


USES: dict[str, tuple[str, Callable[[Any], torch.Tensor]]] = {
    "log_softmax": ("log_softmax", lambda z: F.log_softmax(z, -1)[..., 3].mean()),
    "softmax": ("softmax", lambda z: z.softmax(-1).square().sum()),
    "logsumexp": ("logsumexp", lambda z: torch.logsumexp(z, -1).square().mean()),
    "square": ("square", lambda z: z.square().mean()),
    "a product with a tensor": ("mul", lambda z: (z * torch.linspace(0, 1, VOCABULARY)).mean()),
    "a tensor times it": ("mul", lambda z: (torch.linspace(0, 1, VOCABULARY) * z).mean()),
    "a power": ("__pow__", lambda z: (z**2).mean()),
    "a difference": ("__sub__", lambda z: (z - 1.5).square().mean()),
    "matmul": ("__matmul__", lambda z: (z @ torch.ones(VOCABULARY)).square().mean()),
    "argmax and gather": ("gather", lambda z: z.gather(-1, torch.ones(2, 24, 1, dtype=torch.long)).mean()),
    "one element": ("indexing", lambda z: z[0, 3, 5]),
    "one column": ("indexing", lambda z: z[..., 7].square().mean()),
    "stack": ("stack", lambda z: torch.stack([z, z]).square().mean()),
    "numpy": ("detach", lambda z: float(z.detach().numpy().sum()) * z.mean()),
    "iteration": ("iteration", lambda z: sum((row.square().mean() for row in z), torch.zeros(()))),
    "log_softmax of scaled, cast, cut logits": (
        "log_softmax",
        lambda z: F.log_softmax((z / 0.7).double()[:, 3:-2, :50].float().reshape(-1, 50), dim=-1)[:, 2].mean(),
    ),
    "a soft-cap of a soft-cap": ("tanh", lambda z: (2.0 * torch.tanh(2.5 * torch.tanh(z / 2.5))).mean()),
    "class probabilities": (
        "cross_entropy",
        lambda z: F.cross_entropy(z.flatten(0, 1), torch.full((48, VOCABULARY), 0.01)),
    ),
    "class weights": (
        "cross_entropy",
        lambda z: F.cross_entropy(z.flatten(0, 1), torch.arange(48), weight=torch.linspace(0, 1, VOCABULARY)),
    ),
    "classes in the second dimension": (
        "transpose",
        lambda z: F.cross_entropy(z.transpose(1, 2), torch.ones(2, 24).long()),
    ),
}


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize(("operation", "use"), USES.values(), ids=USES)
def test_logits_in_a_loss_of_the_user(name: str, operation: str, use: Callable[[Any], torch.Tensor]) -> None:
    model = tiny(name)
    ours = applied(model)
    steps = []
    for m in (ours, model):
        outputs = m(**batch())
        loss = outputs.loss + use(outputs.logits)
        loss.backward()
        steps.append(Step(loss.detach(), gradients(m)))
    assert_close(*steps)
    assert accel.report(ours).counts.materialised == {operation: 1}
    assert f"{operation} x1" in str(accel.report(ours)).replace("\n", " ")


FUSED_USES: dict[str, Callable[[Any], torch.Tensor]] = {
    "a second loss": lambda z: F.cross_entropy(z.view(-1, VOCABULARY), torch.arange(48)),
    "a loss module": lambda z: nn.CrossEntropyLoss(ignore_index=7, reduction="sum")(z.flatten(0, 1), torch.arange(48)),
    "label smoothing": lambda z: F.cross_entropy(z.flatten(0, 1), torch.arange(48), label_smoothing=0.1),
    "no reduction": lambda z: F.cross_entropy(z.flatten(0, 1), torch.arange(48), reduction="none").square().sum(),
    "a temperature": lambda z: F.cross_entropy((z / 0.7).flatten(0, 1), torch.arange(48)),
    "a soft-cap": lambda z: F.cross_entropy((2.5 * torch.tanh(z / 2.5)).flatten(0, 1), torch.arange(48)),
    "a negative soft-cap": lambda z: F.cross_entropy((torch.tanh(z / -2.5) * -2.5).flatten(0, 1), torch.arange(48)),
    "a bare tanh": lambda z: F.cross_entropy(z.tanh().flatten(0, 1), torch.arange(48)),
    "a prefix of the vocabulary": lambda z: F.cross_entropy(z[..., :60].flatten(0, 1), torch.arange(48)),
    "masked rows": lambda z: F.cross_entropy(
        z[batch()["labels"] > 40], torch.ones(2, 24).long()[batch()["labels"] > 40]
    ),
    "chosen rows": lambda z: F.cross_entropy(z[:, [1, 5, 3]].reshape(-1, VOCABULARY), torch.arange(6)),
    "one position": lambda z: F.cross_entropy(z[:, -1, :], torch.arange(2)),
    "one position, ellipsis": lambda z: F.cross_entropy(z[..., -1, :].float(), torch.arange(2)),
    "by keyword": lambda z: F.cross_entropy(target=torch.arange(48), input=z.reshape(48, -1)),
}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("use", FUSED_USES.values(), ids=FUSED_USES)
def test_cross_entropies_of_the_user_build_no_logits(name: str, use: Callable[[Any], torch.Tensor]) -> None:
    model = tiny(name)
    ours = applied(model)
    steps = []
    for m in (ours, model):
        outputs = m(**batch())
        loss = outputs.loss + use(outputs.logits)
        loss.backward()
        steps.append(Step(loss.detach(), gradients(m)))
    assert_close(*steps)
    softcap_of_a_softcap = name == "gemma2" and ("tanh" in use.__code__.co_names)
    assert accel.report(ours).materialised_logits == int(softcap_of_a_softcap)
    assert accel.report(ours).counts.fused["loss"] == 2 - int(softcap_of_a_softcap)


def test_an_exception_in_the_forward_leaves_no_flag_behind() -> None:
    model = applied(tiny())

    def fail(*_: Any) -> None:
        raise KeyError("a user's hook")

    hook = model.model.register_forward_hook(fail)
    with pytest.raises(KeyError):
        model(**batch())
    hook.remove()
    assert type(model(input_ids=batch()["input_ids"]).logits) is torch.Tensor
    assert type(model.lm_head(torch.randn(2, 3, 32))) is torch.Tensor


def test_the_head_called_by_the_user_gives_real_logits() -> None:
    model = tiny()
    ours = applied(model)
    hidden = torch.randn(2, 3, 32)
    step(ours, **batch())
    assert torch.equal(ours.lm_head(hidden), model.lm_head(hidden))
    assert torch.equal(ours.lm_head(input=hidden), model.lm_head(input=hidden))


def test_frozen_copy_of_the_model_as_a_teacher() -> None:
    """A deep copy in evaluation and the student in training, through one loss."""
    model = tiny()
    teacher = copy.deepcopy(model).eval()
    steps = []
    for student, guide in ((applied(model), applied(teacher)), (model, teacher)):
        with torch.no_grad():
            wanted = guide(input_ids=batch()["input_ids"]).logits.softmax(-1)
        outputs = student(**batch())
        loss = outputs.loss + F.kl_div(outputs.logits.log_softmax(-1), wanted, reduction="batchmean")
        loss.backward()
        steps.append(Step(loss.detach(), gradients(student)))
    assert_close(*steps)
