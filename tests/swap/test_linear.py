"""Linears of one input, and recompute: as right as vanilla in every wrapper, and as lean as promised."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import automodel_accel as accel
from automodel_accel.patches.linear import shared_inputs
from tests.budgets.layers import ours, saved_bytes, vanilla
from tests.swap.compare import (
    Step,
    applied,
    assert_as_good,
    assert_close,
    assert_equal,
    gradients,
    only,
    step,
)
from tests.swap.test_wrappers import shard, whole
from tests.tiny import batch, tiny

RECOMPUTE = ("selective", "mlp", "full")
MODELS = ("llama", "qwen3", "gemma3_text", "phi3", "gpt_neox", "cohere", "t5")
SIZE = 8

# which children share an input


class Odd(nn.Module):
    """Linears under odd names, called in a way that subclasses choose."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(SIZE, SIZE, bias=i == 1) for i in range(3))
        self.inner = nn.LayerNorm(SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(F.silu(self.one(x)) * self.two(x))  # type: ignore[no-any-return]


class NewValue(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        x = x * 2
        return y + self.two(x) + self.three(x)  # type: ignore[no-any-return]


class InPlace(Odd):
    """The variable is the same, the tensor is, its values are not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        y = self.one(x).detach()
        x.mul_(2)
        return self.two(x) + self.three(x) + y  # type: ignore[no-any-return]


class Branching(Odd):
    def forward(self, x: torch.Tensor, *, both: bool = False) -> torch.Tensor:
        y = self.one(x)
        return y + self.two(x) if both else y * 2  # type: ignore[no-any-return]


class Twice(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.two(x) * self.one(x) + self.two(x * 3)  # type: ignore[no-any-return]


class Checkpointed(Odd):
    """A checkpoint inside runs again when the module's forward is over."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x) + self.two(x)
        return y + checkpoint(self.again, x, use_reentrant=False)  # type: ignore[no-any-return]

    def again(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) * self.two(x) * self.three(x)  # type: ignore[no-any-return]


class Forgetful(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.one(x)
        return self.two(x) + self.three(x) + y  # type: ignore[no-any-return]


ODD = {
    Odd: (("one", "two"),),
    NewValue: (("two", "three"),),
    InPlace: (("one", "two", "three"),),
    Branching: (("one", "two"),),
    Twice: (("one", "two"),),
    Forgetful: (("one", "two", "three"),),
}


class Host(nn.Module):
    """A model around one module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(SIZE, SIZE), inner

    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        return self.inner(self.first(x), **kwargs)


def run(model: nn.Module, **kwargs: Any) -> Step:
    model.zero_grad()
    x = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(0))
    loss = model(x, **kwargs).square().sum()
    loss.backward()
    return Step(loss.detach(), gradients(model))


def host(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Host(kind()).train()


@pytest.mark.parametrize("kind", ODD, ids=lambda kind: kind.__name__)
def test_children_of_one_input_are_read_from_the_forward(kind: type[nn.Module]) -> None:
    found = tuple(names for names in shared_inputs(kind.forward.__code__) if names)
    assert set(ODD[kind]) <= set(found) | {()}
    assert all(len(names) < 2 or names in ODD[kind] for names in found)


@pytest.mark.parametrize("recompute", [None, "selective"])
@pytest.mark.parametrize("kind", [*ODD, Checkpointed], ids=lambda kind: kind.__name__)
def test_a_wrong_guess_is_never_a_wrong_result(kind: type[nn.Module], recompute: str | None) -> None:
    model = host(kind)
    ours = applied(model, **only("linear"), recompute=recompute)
    for _ in range(2):
        assert_close(run(ours), run(model))
    assert accel.report(ours).counts.fused["linear"] > 0
    assert not any(vars(m).get("_accel_shared") for m in ours.modules())


def test_a_branch_that_is_taken_now_and_then() -> None:
    model = host(Branching)
    ours = applied(model, **only("linear"))
    for both in (True, False, True):
        assert_close(run(ours, both=both), run(model, both=both))


def test_hooks_that_change_an_input_or_an_output() -> None:
    model = host(Odd)
    ours = applied(model, **only("linear"))
    for m in (model, ours):
        m.inner.two.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        m.inner.one.register_forward_hook(lambda module, args, output: output + 1)
    assert_close(run(ours), run(model))


def test_an_exception_leaves_nothing_behind() -> None:
    ours = applied(host(Odd), **only("linear"))
    handle = ours.inner.two.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(ours)
    handle.remove()
    assert_close(run(ours), run(host(Odd)))
    accel.revert(ours)
    assert not any(name.startswith("_accel") for m in ours.modules() for name in vars(m))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.inner, "two", nn.Linear(SIZE, SIZE)),
        lambda m: m.inner.two.double(),
        lambda m: setattr(m.inner.two, "weight", nn.Parameter(torch.ones(SIZE, SIZE))),
        lambda m: m.inner.one.requires_grad_(False),
        lambda m: m.inner.requires_grad_(False),
        lambda m: m.first.requires_grad_(False),
        lambda m: nn.utils.parametrizations.weight_norm(m.inner.two),
        lambda m: setattr(m.inner, "one", m.inner.two),
    ],
    ids=[
        "replaced",
        "other dtype",
        "weight replaced",
        "one frozen",
        "frozen",
        "no gradient of x",
        "parametrized",
        "shared",
    ],
)
def test_changed_after_apply(change: Callable[[Any], Any]) -> None:
    model = host(NewValue)
    ours = applied(model, **only("linear"), recompute="selective")
    found = []
    for m in (ours, model):
        torch.manual_seed(4)
        change(m)
        try:
            found.append(run(m))
        except RuntimeError as error:  # of linears that do not fit together, in vanilla as in ours
            found.append(Step(torch.tensor(0.0), {str(error): torch.tensor(0.0)}))
    assert_close(*found)


def test_what_is_copied_and_pickled() -> None:
    model = tiny()
    expected = step(model, **batch())
    ours = applied(model, recompute="selective")
    step(ours, **batch())
    twin = copy.deepcopy(ours)
    accel.revert(ours)
    assert_close(step(twin, **batch()), expected)
    assert accel.report(twin).counts.fused["linear"] > 0
    loaded = pickle.loads(pickle.dumps(twin))
    assert not any("_accel" in name for m in loaded.modules() for name in vars(m))
    assert_equal(step(loaded, **batch()), expected)


# models


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_revert(name: str, recompute: str) -> None:
    model = tiny(name)
    ours = applied(model, recompute=recompute)
    inputs = batch()
    for _ in range(2):  # gradients accumulate as well
        loss = ours(**inputs).loss
        loss.backward()
    expected = step(model, **inputs)
    doubled = {name: gradient * 2 for name, gradient in expected.gradients.items()}
    assert_close(Step(loss.detach(), gradients(ours)), Step(expected.loss, doubled))
    assert accel.report(ours).counts.fused["linear"] > 0
    accel.revert(ours)
    assert_equal(step(ours, **inputs), expected)


@pytest.mark.parametrize("recompute", [None, *RECOMPUTE])
def test_bfloat16(recompute: str | None) -> None:
    model = tiny("llama", torch.bfloat16)
    truth = step(copy.deepcopy(model).float(), **batch())
    assert_as_good(step(applied(model, recompute=recompute), **batch()), step(model, **batch()), truth, torch.bfloat16)


@pytest.mark.parametrize("recompute", [None, *RECOMPUTE])
def test_autocast(recompute: str | None) -> None:
    model = tiny()
    truth = step(model, **batch())
    found = []
    for m in (applied(model, recompute=recompute), model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(**batch()).loss
        m.zero_grad()
        loss.backward()
        found.append(Step(loss.detach(), gradients(m)))
    assert_as_good(*found, truth, torch.bfloat16)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("reentrant", [True, False])
def test_torchs_own_checkpointing(recompute: str, reentrant: bool) -> None:
    model = tiny()
    ours = applied(model, recompute=recompute)
    for m in (ours, model):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        m.enable_input_require_grads()
    assert_close(step(ours, **batch()), step(model, **batch()))


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_compiled(recompute: str) -> None:
    torch._dynamo.reset()
    model = tiny()
    ours = applied(model, recompute=recompute)
    loss = torch.compile(ours, backend="aot_eager")(**batch()).loss
    loss.backward()
    assert_close(Step(loss.detach(), gradients(ours)), step(model, **batch()))


@pytest.mark.parametrize("before", [True, False], ids=["lora, then apply", "apply, then lora"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora(recompute: str, before: bool, dropout: float) -> None:
    # of the usual size: large adapters make rounding in an early layer a hundred times as large in a late one
    settings = {"lora_alpha": 1, "lora_dropout": dropout, "init_lora_weights": False}
    config = peft.LoraConfig(r=2, target_modules="all-linear", **settings)
    torch.manual_seed(5)
    vanilla = peft.get_peft_model(tiny(), config)
    torch.manual_seed(5)
    ours: Any = tiny() if before else accel.apply(tiny(), recompute=recompute)
    ours = peft.get_peft_model(ours, config)
    if before:
        accel.apply(ours, recompute=recompute)
    found = []
    for m in (ours, vanilla):
        torch.manual_seed(6)
        found.append(step(m, **batch()))
    assert_close(*found)


@pytest.mark.parametrize("recompute", [None, *RECOMPUTE])
@pytest.mark.parametrize("group", ["layers", "root only"])
def test_fully_shard(mesh: Any, group: str, recompute: str | None) -> None:
    model = tiny(tie_word_embeddings=False)
    expected = step(model, **batch())
    ours = shard(accel.apply(model, recompute=recompute), mesh, group)
    for _ in range(2):
        assert_close(whole(step(ours, **batch())), expected)
    assert accel.report(ours).counts.fused["linear"] >= 8


# what it saves


@pytest.mark.parametrize("shape", ["Llama-3.2-1B", "Qwen3-0.6B"])
def test_selective_keeps_half_of_the_bytes(shape: str) -> None:
    changes = [vanilla, ours(), *(ours(recompute=recompute) for recompute in RECOMPUTE)]
    theirs, none, selective, mlp, full = (saved_bytes(shape, change) for change in changes)
    assert full < mlp < selective < none < theirs
    assert selective <= theirs / 2


def test_selective_asks_for_no_more_of_the_gemms() -> None:
    counts = []
    for settings in ({}, {"recompute": "selective"}, {"recompute": "mlp"}):
        model = accel.apply(tiny(), **settings)  # type: ignore[arg-type]
        with FlopCounterMode(display=False) as counter:
            model(**batch()).loss.backward()
        counts.append(counter.get_total_flops())
    none, selective, mlp = counts
    assert selective == none
    assert mlp > none


# what is asked for and cannot be


def test_unknown_recompute_says_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown recompute 'selectiv'. Did you mean 'selective'"):
        accel.apply(tiny(), recompute="selectiv")


def test_a_model_without_layers_of_transformers_is_told() -> None:
    model = host(Odd)
    ours = accel.apply(model, recompute="full")
    assert any("no layer of this model" in refusal.reason for _, refusal in accel.report(ours).refusals)
    with pytest.raises(accel.RefusedError, match="no layer of this model"):
        accel.apply(accel.revert(ours), recompute="full", strict=True)
    assert not any(name.startswith("_accel") for m in ours.modules() for name in vars(m))


def test_the_report_says_it() -> None:
    text = str(accel.report(accel.apply(tiny(), recompute="selective")))
    assert "recompute='selective'" in text
    assert "q_proj, k_proj, v_proj of one input" in text


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_adapted_heads_stay_the_losss(recompute: str) -> None:
    """The linears of a head are claimed by the loss, and by nothing else."""
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    vanilla = peft.get_peft_model(tiny(tie_word_embeddings=False), config)
    ours = applied(vanilla, recompute=recompute)
    assert_close(step(ours, **batch()), step(vanilla, **batch()))
    assert accel.report(ours).counts.fused["loss"] == 1
    assert accel.report(ours).materialised_logits == 0
