"""The proof on the spot: a kernel that computes something else is refused with a number, and the model stays as it was."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import automodel_accel as accel
import automodel_accel.kernels.gated_linear.eager as gated_linear
import automodel_accel.kernels.linear_cross_entropy as linear_cross_entropy
import automodel_accel.kernels.rms_norm.eager as rms_norm
import automodel_accel.patches.loss as loss_patch
from tests.swap.compare import assert_close, assert_equal, only, step
from tests.tiny import batch, tiny

Kernel = Callable[..., Any]


def first(result: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The kernel's result with its first tensor changed."""
    if isinstance(result, tuple):
        return change(result[0]), *result[1:]
    return change(result)


def second(result: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The kernel's result with its second tensor changed."""
    return result[0], None if result[1] is None else change(result[1]), *result[2:]


def overwrite(target: torch.Tensor, value: torch.Tensor | float) -> None:
    """Write as a kernel does: past autograd's bookkeeping."""
    target.data.copy_(value) if isinstance(value, torch.Tensor) else target.data.fill_(value)


def spoil_first_argument(kernel: Kernel) -> Kernel:
    """In place: the result lands in the memory of the first argument."""

    def wrong(x: torch.Tensor, *rest: Any) -> Any:
        result = kernel(x, *rest)
        kept = first(result, torch.Tensor.clone)
        y = kept[0] if isinstance(kept, tuple) else kept
        overwrite(x, y if y.shape == x.shape else 0.0)
        return first(kept, lambda y: x if y.shape == x.shape else y)

    return wrong


def crash(kernel: Kernel) -> Kernel:
    def wrong(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nwith a second line")

    return wrong


def changed(pick: Kernel, change: Callable[[torch.Tensor], Any]) -> Callable[[Kernel], Kernel]:
    """A kernel whose result is changed."""
    return lambda kernel: lambda *arguments: pick(kernel(*arguments), change)


NUMBER = r"error [0-9.e+-]+ where torch has [0-9.e+-]+: [0-9.e+-]+ of what is allowed"
# fusion, module of the implementation, function, what is wrong with it, the reason that the user reads
WRONG: dict[str, tuple[str, Any, str, Callable[[Kernel], Kernel], str]] = {
    "norm: output 1 % too large": (
        "norm",
        rms_norm,
        "forward",
        changed(first, lambda y: y * 1.01),
        f"output: {NUMBER}",
    ),
    "norm: gradient halved": (
        "norm",
        rms_norm,
        "backward",
        changed(first, lambda g: g * 0.5),
        f"gradient of x: {NUMBER}",
    ),
    "norm: gradient of the weight negated": (
        "norm",
        rms_norm,
        "backward",
        changed(second, lambda g: -g),
        f"of weight: {NUMBER}",
    ),
    "norm: NaN": ("norm", rms_norm, "forward", changed(first, lambda y: y * float("nan")), "output: error nan"),
    "norm: last column lost": (
        *("norm", rms_norm, "forward"),
        changed(first, lambda y: torch.cat([y[:, :-1], 0 * y[:, -1:]], 1)),
        f"output: {NUMBER}",
    ),
    "norm: rows swapped": ("norm", rms_norm, "forward", changed(first, lambda y: y.flip(0)), f"output: {NUMBER}"),
    "norm: writes into its input": ("norm", rms_norm, "forward", spoil_first_argument, "x was written to"),
    "norm: gradient in place": (
        "norm",
        rms_norm,
        "backward",
        spoil_first_argument,
        "the incoming gradient was written to",
    ),
    "norm: wrong dtype": (
        "norm",
        rms_norm,
        "forward",
        changed(first, lambda y: y.double()),
        "output is torch.float64, the original",
    ),
    "norm: crash": (
        "norm",
        rms_norm,
        "forward",
        crash,
        "RuntimeError: CUDA error: an illegal memory access was encountered",
    ),
    "norm: crash in backward": ("norm", rms_norm, "backward", crash, "RuntimeError: CUDA error"),
    "norm: wrong shape": ("norm", rms_norm, "forward", changed(first, lambda y: y[:, :-1]), "RuntimeError: shape"),
    "norm: weight without its offset": (
        *("norm", rms_norm, "forward"),
        lambda kernel: lambda x, weight, eps, offset, *rest: kernel(x, weight, eps, 0.0, *rest),
        f"output: {NUMBER}",
    ),
    "norm: eps forgotten": (
        *("norm", rms_norm, "forward"),
        lambda kernel: lambda x, weight, eps, *rest: kernel(x, weight, 0.0, *rest),
        f"output: {NUMBER}",
    ),
    "mlp: gate and up swapped": (
        *("mlp", gated_linear, "forward"),
        lambda kernel: lambda gate, up, *rest: kernel(up, gate, *rest),
        f"output: {NUMBER}",
    ),
    "mlp: output in place": ("mlp", gated_linear, "forward", spoil_first_argument, NUMBER),
    "mlp: gradients swapped": (
        *("mlp", gated_linear, "backward"),
        lambda kernel: lambda *a: kernel(*a[:4], a[5], a[4]),
        f"gradient of .*: {NUMBER}",
    ),
    "mlp: crash": ("mlp", gated_linear, "backward", crash, "RuntimeError: CUDA error"),
}


@pytest.mark.parametrize(("fusion", "module", "name", "mistake", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_is_refused(
    fusion: str,
    module: Any,
    name: str,
    mistake: Callable[[Kernel], Kernel],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On Gemma: 1 + weight, an eps, and both kinds of place."""
    import re

    model = tiny("gemma3_text")
    expected = step(model, **batch())
    classes = {path: type(place) for path, place in model.named_modules()}
    before = accel.plan(model)
    monkeypatch.setattr(module, name, mistake(getattr(module, name)))
    with caplog.at_level(logging.WARNING, "automodel_accel"):
        accel.apply(model, **only("norm", "mlp"))
    report = accel.report(model)
    assert report.places(fusion) == 0
    assert report.places("mlp" if fusion == "norm" else "norm") > 0, "the other fusion is served"
    refusals = [refusal for what, refusal in report.refusals if what == fusion]
    assert {refusal.what for refusal in refusals} == {
        claim.paths[-1] for claim in before.claims if claim.fusion == fusion
    }
    for refusal in refusals:
        assert refusal.reason.startswith("the proof of torch failed for cpu, torch.float32")
        assert re.search(reason, refusal.reason), refusal.reason
        assert "second line" not in refusal.reason
        assert refusal.remedy == "the original forward stays"
        assert str(refusal) in caplog.text
    for claim in before.claims:
        if claim.fusion == fusion:
            assert type(model.get_submodule(claim.paths[-1])) is classes[claim.paths[-1]]
    assert_close(step(model, **batch()), expected)
    assert report.counts.fused[fusion] == 0
    with pytest.raises(accel.RefusedError, match="the proof of torch failed"):
        accel.apply(accel.revert(model), strict=True, loss=False, **{fusion: "torch"})


@pytest.mark.parametrize("fusion", ["norm", "mlp"])
def test_gradients_are_vanillas_bits_where_everything_was_refused(fusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma3_text")
    expected = step(model, **batch())
    for module in (rms_norm, gated_linear):
        monkeypatch.setattr(module, "backward", crash(module.backward))
    assert_equal(step(accel.apply(model, **only("norm", "mlp")), **batch()), expected)
    assert not accel.report(model).applied
    assert fusion in {name for name, _ in accel.report(model).refusals}


def wrong_loss(mistake: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """`linear_cross_entropy` with changed arguments or result."""
    right = linear_cross_entropy.linear_cross_entropy

    def wrong(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        return mistake(right, hidden, weight, target, options)  # type: ignore[no-any-return]

    return wrong


class GradientScaled(torch.autograd.Function):
    """Identity with a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.1


def _spoiled(
    right: Kernel, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, options: dict[str, Any]
) -> Any:
    loss = right(hidden, weight, target, **options)
    overwrite(weight, weight * 1.5)
    return loss


WRONG_LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "too large": (lambda right, h, w, t, o: right(h, w, t, **o) * 1.02, f"output: {NUMBER}"),
    "gradient of hidden": (
        lambda right, h, w, t, o: right(GradientScaled.apply(h), w, t, **o),
        f"gradient of x: {NUMBER}",
    ),
    "gradient of weight": (
        lambda right, h, w, t, o: right(h, GradientScaled.apply(w), t, **o),
        f"gradient of weight: {NUMBER}",
    ),
    "soft-cap forgotten": (lambda right, h, w, t, o: right(h, w, t, **{**o, "softcap": None}), NUMBER),
    "scale forgotten": (lambda right, h, w, t, o: right(h, w, t, **{**o, "scale": 1.0}), NUMBER),
    "ignored labels counted": (
        lambda right, h, w, t, o: right(h, w, t.clamp_min(0), **o),
        NUMBER,
    ),
    "wrong only without a soft-cap": (
        lambda right, h, w, t, o: right(h, w, t, **o) * (1.0 if o["softcap"] else 1.05),
        NUMBER,
    ),
    "wrong only for a sum": (
        lambda right, h, w, t, o: right(h, w, t, **o) * (1.05 if o["reduction"] == "sum" else 1.0),
        NUMBER,
    ),
    "no gradient": (lambda right, h, w, t, o: right(h.detach(), w.detach(), t, **o), "its output has no gradient"),
    "writes into the weight": (_spoiled, "weight was written to"),
    "float16": (lambda right, h, w, t, o: right(h, w, t, **o).half().double(), NUMBER),
    "crash": (lambda right, h, w, t, o: crash(right)(), "RuntimeError: CUDA error"),
}


@pytest.mark.parametrize(("mistake", "reason"), WRONG_LOSSES.values(), ids=WRONG_LOSSES)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_wrong_loss_is_refused(
    name: str,
    mistake: Callable[..., Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import re

    model = tiny(name)
    expected = step(model, **batch())
    monkeypatch.setattr(loss_patch, "linear_cross_entropy", wrong_loss(mistake))
    with caplog.at_level(logging.WARNING, "automodel_accel"):
        accel.apply(model, **only("loss"))
    assert not accel.report(model).applied
    (refusal,) = [refusal for fusion, refusal in accel.report(model).refusals if fusion == "loss"]
    assert re.search(f"the proof of torch failed for cpu, torch.float32: .*{reason}", refusal.reason), refusal.reason
    assert str(refusal) in caplog.text
    assert_equal(step(model, **batch()), expected)


def test_a_kernel_that_fails_in_one_dtype_serves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is wrong: a float32 model is served, and under autocast it passes on, counted."""
    right = rms_norm.forward

    def wrong(x: torch.Tensor, *rest: Any) -> Any:
        return first(right(x, *rest), lambda y: y * 2 if x.dtype is torch.bfloat16 else y)

    monkeypatch.setattr(rms_norm, "forward", wrong)
    model = tiny()
    ours = accel.apply(copy.deepcopy(model), **only("norm"))
    assert accel.report(ours).places("norm") == 5
    assert_close(step(ours, **batch()), step(model, **batch()))
    mine, theirs = (step(m.to(torch.bfloat16), **batch()) for m in (ours, model))
    assert_equal(mine, theirs)
    assert accel.report(ours).counts.passed_on == {
        "norm: not proved for ('cpu', torch.bfloat16, torch.bfloat16, False)": 5,
    }
    proofs = accel.report(ours).to_dict()["proofs"]
    assert any("output: error" in problem for proof in proofs for problem in proof["failed"].values())


def test_one_kind_of_norm_fails_and_the_other_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3 has norms of two lengths: a kernel that is wrong for the short rows serves the long ones."""
    right = rms_norm.backward

    def wrong(grad: torch.Tensor, *rest: Any) -> Any:
        return first(right(grad, *rest), lambda g: g * 2 if g.shape[-1] == 8 else g)

    monkeypatch.setattr(rms_norm, "backward", wrong)
    model = tiny("qwen3")
    expected = step(model, **batch())
    accel.apply(model, **only("norm"))
    report = accel.report(model)
    assert report.places("norm") == 5
    assert {refusal.what.split(".")[-1] for _, refusal in report.refusals} == {"q_norm", "k_norm"}
    assert_close(step(model, **batch()), expected)


def test_the_proof_runs_no_hook_and_leaves_gradients_alone() -> None:
    model = tiny()
    expected = step(model, **batch())
    calls: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: calls.append(module))
        module.register_full_backward_hook(lambda module, inputs, output: calls.append(module))
    accel.apply(model)
    assert not calls
    assert all(torch.equal(p.grad, expected.gradients[name]) for name, p in model.named_parameters())
