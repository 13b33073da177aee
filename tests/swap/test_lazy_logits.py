"""`outputs.logits` of an accelerated training step behaves as vanilla's tensor does, or says why it cannot."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import automodel_accel as accel
from tests.swap.compare import Step, applied, assert_close, gradients, only
from tests.tiny import VOCABULARY, batch, tiny

ROWS = 48
TARGET = torch.arange(ROWS)
Use = Callable[[Any], Any]


def pair(name: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    """Only the loss is swapped: some of the operations make much of the last bit of a hidden state."""
    model = tiny(name)
    return applied(model, **only("loss")), model


def test_metadata_needs_no_logits() -> None:
    ours, theirs = pair()
    mine, real = ours(**batch()).logits, theirs(**batch()).logits
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda"):
        assert getattr(mine, name) == getattr(real, name), name
    for name in ("dim", "size", "numel", "is_floating_point", "__len__"):
        assert getattr(mine, name)() == getattr(real, name)(), name
    assert (mine.size(-1), mine.size(0), mine.size(dim=1)) == (VOCABULARY, 2, 24)
    assert "LazyLogits(shape=(2, 24, 97), dtype=torch.float32)" in repr(mine)
    assert mine[:, -1, :].shape == (2, VOCABULARY)
    assert mine[..., :60].view(-1, 60).dtype is torch.float32
    assert mine.to(torch.bfloat16).dtype is torch.bfloat16
    assert accel.report(ours).materialised_logits == 0


VALUES: dict[str, Use] = {
    "item": lambda z: z[0, 0, 0].item(),
    "rounding mode": lambda z: torch.div(z, 0.3, rounding_mode="floor"),
    "division by zero": lambda z: z / 0,
    "product with zero": lambda z: (z * 0).abs(),
    "tanh times zero": lambda z: torch.tanh(z) * 0 + 1,
    "floor division": lambda z: z // 0.3,
    "modulo": lambda z: z % 0.3,
    "right modulo": lambda z: 7.0 % z,
    "right division": lambda z: 1.0 / z,
    "right difference": lambda z: 1.0 - z,
    "integer divisor": lambda z: z / 3,
    "true division of a tensor": lambda z: torch.ones(2, 24, VOCABULARY) / z,
    "comparison": lambda z: (z > 0) & (z < 0.5) | (z <= -1) | (z >= 2),
    "inversion": lambda z: ~(z > 0),
    "unary": lambda z: (abs(-z), +z),
    "to long": lambda z: z.to(torch.long) * 0.5,
    "to long, then half": lambda z: z.type(torch.int32).float(),
    "type name": lambda z: z.type(),
    "type": lambda z: z.type(torch.float64),
    "type by name": lambda z: z.type("torch.DoubleTensor"),
    "type of another": lambda z: z.to(torch.zeros((), dtype=torch.float64)),
    "to a device": lambda z: z.to("cpu", torch.float64),
    "to device, keyword": lambda z: z.to(device=torch.device("cpu"), dtype=torch.float64),
    "casts in sequence": lambda z: z.double().float() * 2,
    "reshape by keyword": lambda z: torch.reshape(z, shape=(-1, VOCABULARY)),
    "view by keyword": lambda z: z.view(size=(-1, VOCABULARY)),
    "view into other rows": lambda z: z.view(4, 12, -1),
    "view of everything": lambda z: z.view(-1),
    "view that splits the vocabulary": lambda z: z[..., :96].reshape(2, 24, 2, 48),
    "view as another dtype": lambda z: z.detach().view(torch.int32),
    "flatten all": lambda z: z.flatten(),
    "flatten the front": lambda z: torch.flatten(z, start_dim=0, end_dim=1),
    "flatten the front, from behind": lambda z: z.flatten(-3, -2),
    "squeeze": lambda z: z[:1].squeeze(0),
    "unsqueeze": lambda z: z.unsqueeze(0),
    "a new axis": lambda z: z[None, :, 1:],
    "a new axis in the middle": lambda z: z[:, None, ..., 3],
    "chunk": lambda z: z.chunk(2, -1),
    "split": lambda z: torch.split(z, 50, dim=-1),
    "top": lambda z: torch.topk(z, 3).indices,
    "max": lambda z: z.max(-1).values,
    "argmax": lambda z: z.argmax(-1),
    "sort": lambda z: z.sort(-1, descending=True).values,
    "list index": lambda z: z[[0, 1], [3, 4]],
    "mask of rows": lambda z: z[batch()["labels"] > 50],
    "mask of everything": lambda z: z[z > 0],
    "index tensor": lambda z: z[torch.tensor([1, 0, 1])],
    "index tensors, then a prefix": lambda z: z[torch.tensor([1, 0]), torch.tensor([3, 5]), :50],
    "steps": lambda z: z[:, ::3, ::2],
    "suffix of the vocabulary": lambda z: z[..., 40:],
    "negative end": lambda z: z[:, 1:-1, :-7],
    "end beyond": lambda z: z[:, :400, :400],
    "prefix of nothing": lambda z: z[..., :0],
    "prefix of a prefix": lambda z: z[..., :60][..., :70][:, 2:, :-20],
    "no rows": lambda z: z[:, :0],
    "one row": lambda z: z[1],
    "ellipsis alone": lambda z: z[...],
    "python list": lambda z: z[0, :2].tolist(),
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "deep copy": lambda z: copy.deepcopy(z.detach()),
    "saved": lambda z: _saved(z),
    "clone": lambda z: torch.clone(z, memory_format=torch.contiguous_format),
    "contiguous": lambda z: z[:, 1:].contiguous(),
    "formatted": lambda z: f"{z[0, 0, 0]:.3f}",
    "float of one": lambda z: float(z[0, 0, 0]),
    "integer of one": lambda z: int(z[0, 0, 0] * 100),
    "truth of one": lambda z: bool(z[0, 0, 0] > 0),
    "isnan": lambda z: z.isnan().any(),
    "einsum": lambda z: torch.einsum("bsv,v->bs", z, torch.ones(VOCABULARY)),
    "where": lambda z: torch.where(z > 0, z, torch.zeros(())),
    "concatenation": lambda z: torch.cat([z, z[:, :2]], dim=1),
    "log_softmax": lambda z: F.log_softmax(z, dim=-1, dtype=torch.float64),
    "module": lambda z: torch.nn.Softmax(-1)(z),
    "another like it": lambda z: torch.zeros_like(z),
    "new zeros": lambda z: z.new_zeros(3),
    "stride": lambda z: (z.stride(), z.is_contiguous(), z.element_size(), z.is_leaf),
    "added in place": lambda z: _augmented(z),
}


def _saved(z: Any) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(z.detach(), file)
    file.seek(0)
    return torch.load(file)  # type: ignore[no-any-return]


def _augmented(z: Any) -> Any:
    z = z.float()
    z += 1.0
    z *= 2.0
    z /= 3.0
    z -= 1.0
    return z


def as_real(value: Any) -> Any:
    """Lazy logits as a tensor, inside of tuples too."""
    if isinstance(value, tuple | list):
        return [as_real(item) for item in value]
    return value.detach() if hasattr(value, "materialise") else value


@pytest.mark.parametrize("use", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_values(name: str, use: Use) -> None:
    ours, theirs = pair(name)
    mine, expected = as_real(use(ours(**batch()).logits)), as_real(use(theirs(**batch()).logits))
    if isinstance(expected, str | bool | int):
        assert mine == expected
    else:
        torch.testing.assert_close(mine, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


IMPOSSIBLE: dict[str, Use] = {
    "unknown attribute": lambda z: z.no_such_thing,
    "too many indices": lambda z: z[0, 0, 0, :],
    "index too large": lambda z: z[5],
    "vocabulary index too large": lambda z: z[..., 1000],
    "view that does not fit": lambda z: z.view(5, VOCABULARY),
    "labels that do not fit": lambda z: F.cross_entropy(z.view(-1, VOCABULARY), TARGET[:-1]),
    "labels of the wrong type": lambda z: F.cross_entropy(z.view(-1, VOCABULARY), TARGET.int()),
    "unknown reduction": lambda z: F.cross_entropy(z.view(-1, VOCABULARY), TARGET, reduction="median"),
    "truth of many": lambda z: bool(z > 0),
}


@pytest.mark.parametrize("use", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_vanilla_refuses_is_refused(use: Use) -> None:
    for model in pair():
        with pytest.raises((AttributeError, IndexError, RuntimeError, ValueError)):
            use(model(**batch()).logits)


def _write_before_a_view(z: Any) -> Any:
    z[..., 3] = -100.0
    return z.view(-1, VOCABULARY)


def _write_after_a_view(z: Any) -> Any:
    flat = z.view(-1, VOCABULARY)
    z[..., 3] = -100.0
    return flat


def _write_into_a_view(z: Any) -> Any:
    z.view(-1, VOCABULARY)[:, 3] = -100.0
    return z.view(-1, VOCABULARY)


def _write_into_a_view_of_a_view(z: Any) -> Any:
    sibling = z[:, 1:]
    z[1].view(24, -1)[2:5].fill_(-5.0)
    return torch.cat([sibling.reshape(-1, VOCABULARY), z[:, 0]])


def _write_after_a_product(z: Any) -> Any:
    half = z / 2
    z.zero_()
    return half.view(-1, VOCABULARY)


def _write_after_a_view_was_used(z: Any) -> Any:
    flat = z.view(-1, VOCABULARY)
    flat.max()
    z.mul_(3.0)
    return flat


def _write_by_function(z: Any) -> Any:
    flat = z.view(-1, VOCABULARY)
    torch.nn.init.constant_(z[:, 2], 4.0)
    return flat


def _write_into_detached(z: Any) -> Any:
    z.detach()[..., 3] = -100.0
    return z.view(-1, VOCABULARY)


def _augmented_after_a_view(z: Any) -> Any:
    flat = z.view(-1, VOCABULARY)
    z *= 3.0
    return flat


WRITES: tuple[Use, ...] = (
    _write_before_a_view,
    _write_after_a_view,
    _write_into_a_view,
    _write_into_a_view_of_a_view,
    _write_after_a_product,
    _write_after_a_view_was_used,
    _write_by_function,
    _write_into_detached,
    _augmented_after_a_view,
)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__.strip("_"))
@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_a_write_is_seen_by_every_view_and_by_the_loss(name: str, write: Use) -> None:
    steps = []
    for model in pair(name):
        logits = write(model(**batch()).logits)
        loss = F.cross_entropy(logits, torch.arange(len(logits)))
        loss.backward()
        steps.append(Step(loss.detach(), gradients(model)))
    assert_close(*steps)


def test_logits_read_after_an_optimizer_step_are_not_those_of_the_new_weights() -> None:
    """Vanilla's logits are of the step that made them; ours are built when read, so reading them late is an error."""
    ours, theirs = pair()
    outputs = ours(**batch())
    outputs.loss.backward()
    in_time = ours(**batch())
    in_time.logits.max()
    torch.optim.SGD(ours.parameters(), lr=0.5).step()
    torch.testing.assert_close(in_time.logits.detach(), theirs(**batch()).logits.detach())
    with pytest.raises(RuntimeError, match=r"the output head has changed since.*loss=False"):
        outputs.logits.argmax(-1)


def test_the_gradient_with_respect_to_logits_is_not_silently_absent() -> None:
    ours, _ = pair()
    outputs = ours(**batch())
    for ask in (lambda: outputs.logits.retain_grad(), lambda: outputs.logits.register_hook(print)):
        with pytest.raises(RuntimeError, match=r"loss was computed without logits.*loss=False"):
            ask()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(outputs.loss, outputs.logits)


def test_the_gradient_with_respect_to_logits_seen_before_the_loss() -> None:
    """A hook on the head may look at logits and their gradient: they are built, and the loss is computed from them."""
    seen: list[list[torch.Tensor]] = []
    for model in pair():
        mine: list[torch.Tensor] = []
        seen.append(mine)
        model.lm_head.register_forward_hook(
            lambda module, inputs, output, mine=mine: output.register_hook(mine.append) and None
        )
        model(**batch()).loss.backward()
    assert [len(mine) for mine in seen] == [1, 1]
    torch.testing.assert_close(*seen)


def test_logits_hold_no_step_alive() -> None:
    """After the outputs are dropped, nothing keeps the hidden states of the step: no cycle for the collector."""
    import gc
    import weakref

    ours, _ = pair()
    gc.collect()
    gc.disable()
    try:
        outputs = ours(**batch(), output_hidden_states=True)
        hidden = weakref.ref(outputs.hidden_states[-1])
        outputs.logits.view(-1, VOCABULARY)[:5].max()
        outputs.loss.backward()
        del outputs
        assert hidden() is None
    finally:
        gc.enable()
