"""The sums of a step, and the optimizer in backward, in one process."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from automodel_accel.parallel.in_backward import step_in_backward
from automodel_accel.parallel.mesh import Mesh, Ranks
from automodel_accel.parallel.tokens import StepSums, label_tokens
from tests.tiny import batch, tiny

ALONE = Ranks(Mesh(shard=1), None)


def test_labels_that_count() -> None:
    labels = torch.tensor([[1, -100, 3, 4], [5, 6, 7, -100]])
    assert label_tokens({"labels": labels}) == 4  # the first of a row has nothing that predicts it
    assert label_tokens({"labels": labels, "shift_labels": labels}) == 6
    with pytest.raises(ValueError, match=r"a batch has \['input_ids'\]; expected labels"):
        label_tokens({"input_ids": labels})


def test_a_step_without_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="without micro-batches"):
        StepSums(ALONE, "cpu").begin([])


def test_sums_of_steps_alone() -> None:
    sums = StepSums(ALONE, "cpu")
    first = sums.begin([batch(2, 24, 5), batch(2, 24, 3)])
    assert first.before is None
    assert (first.items.item(), first.items.dtype) == (2 * 19 + 2 * 21, torch.float32)
    sums.add(torch.tensor(0.25, requires_grad=True))
    sums.add(torch.tensor(0.5))
    sums.note(grad_norm=torch.tensor(3.0), stop=True)
    second = sums.begin([batch(2, 24, 0)])
    assert second.before is not None
    assert second.before.read() == {"loss": 0.75, "tokens": 80.0, "grad_norm": 3.0, "stop": 1.0}
    last = sums.end()
    assert last is not None
    assert last.read() == {"loss": 0.0, "tokens": 2 * 23.0}


def test_a_step_without_labels_moves_nothing() -> None:
    model = tiny("llama")
    given = batch(2, 24, 24)
    model(**given, num_items_in_batch=StepSums(ALONE, "cpu").begin([given]).items).loss.backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_numbers_of_tokens_past_float32_are_exact() -> None:
    sums = StepSums(ALONE, "cpu")
    step = sums._reduce(torch.tensor(2**24 + 1))
    assert step.tokens.item() == 2**24 + 1


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": vectors, "weight_decay": 0.0}]


def _trained(
    make: Callable[[Any], torch.optim.Optimizer], inside: bool, steps: int = 3, state: Any = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny("llama", tie_word_embeddings=True, num_hidden_layers=1)
    optimizer = make(_groups(model))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10, cycle_momentum=False)
    if inside:
        step_in_backward(optimizer, model)
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    for number in range(steps):
        model(**batch(2, 24, 5 + number)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer


def _same(one: Any, other: Any) -> bool:
    """The same structure and the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_in_backward_are_the_same_bits(name: str) -> None:
    """Tied weights, two groups, a schedule: weights and the state of the optimizer in its ordinary format."""
    (model, optimizer), (inside, other) = (_trained(OPTIMIZERS[name], inside) for inside in (False, True))
    assert _same(model.state_dict(), inside.state_dict())
    assert _same(optimizer.state_dict(), other.state_dict())


def test_a_checkpoint_goes_both_ways() -> None:
    file = io.BytesIO()
    model, optimizer = _trained(OPTIMIZERS["adamw"], True)
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    ends = []
    for inside in (False, True):
        file.seek(0)
        ends.append(_trained(OPTIMIZERS["adamw"], inside, state=torch.load(file))[0].state_dict())
    assert _same(*ends)


def _most_gradient_bytes(inside: bool) -> tuple[int, int]:
    """The most bytes of gradients that were alive at once in a backward, and those of the largest parameter."""
    model = tiny("llama", num_hidden_layers=4)
    parameters, seen = list(model.parameters()), []

    def count(parameter: torch.Tensor) -> None:
        seen.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

    for parameter in parameters:  # before the hooks that free it
        parameter.register_post_accumulate_grad_hook(count)
    optimizer = torch.optim.AdamW(parameters)
    if inside:
        step_in_backward(optimizer, model)
    model(**batch()).loss.backward()
    assert len(seen) == len(parameters)
    assert all(p.grad is None for p in parameters) is inside
    return max(seen), max(p.nbytes for p in parameters)


def test_gradients_are_never_all_there() -> None:
    (all_of_them, largest), (most, _) = (_most_gradient_bytes(inside) for inside in (False, True))
    assert most == largest < all_of_them / 5


def test_each_gradient_is_clipped_by_itself() -> None:
    weights = []
    for inside in (False, True):
        model = tiny("llama")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        if inside:
            step_in_backward(optimizer, model, clip_each=0.01)
        model(**batch()).loss.backward()
        if not inside:
            for parameter in model.parameters():
                nn.utils.clip_grad_norm_([parameter], 0.01)
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


def test_a_second_backward_before_the_step_is_refused() -> None:
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    step_in_backward(optimizer, model)
    model(**batch()).loss.backward()
    with pytest.raises(ValueError, match=r"a second backward before optimizer.step\(\)"):
        model(**batch()).loss.backward()


def test_remove_gives_the_ordinary_step_back() -> None:
    model = tiny("llama")
    step_in_backward(torch.optim.AdamW(model.parameters()), model).remove()
    for _ in range(2):
        model(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_needs_all_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"accumulate=2.*expected 1"):
        step_in_backward(optimizer, model, accumulate=2)
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 needs the norm of all gradients.*clip_each"):
        step_in_backward(optimizer, model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"LBFGS calls a closure"):
        step_in_backward(torch.optim.LBFGS(model.parameters()), model)
    wrapped = nn.Sequential(model)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", nn.Sequential)
    with pytest.raises(ValueError, match="Sequential keeps all gradients"):
        step_in_backward(optimizer, wrapped)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
