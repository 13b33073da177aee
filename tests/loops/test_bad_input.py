"""What is done in the wrong order, twice, or around the model's own loss: right, or refused with the remedy; never wrong and running."""

import copy
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._dynamo_utils import _annotate_modules_for_dynamo

import automodel_accel as accel
from tests.loops import runs
from tests.loops.runs import MICRO_BATCHES, Feature, Run, Watched
from tests.swap.compare import Step, assert_as_good, assert_close, gradients, step
from tests.swap.test_wrappers import whole
from tests.tiny import VOCABULARY, batch, tiny


def llama() -> Any:
    """A tiny one, untied."""
    return tiny(tie_word_embeddings=False)


def is_vanilla(model: nn.Module) -> bool:
    """Whether nothing of ours is in the model."""
    return not any("_accel_base" in vars(type(module)) for module in model.modules())


def named_as_in_the_model(one: Step) -> Step:
    """Gradients by the names that they have without a wrapper."""
    return Step(
        one.loss, {name.removeprefix("module.").removeprefix("_orig_mod."): g for name, g in one.gradients.items()}
    )


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """One process with gloo."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield torch.distributed.init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()


# wrapped before it is applied


def test_sharded_by_fsdp2(mesh: Any) -> None:
    """Right, and everything is fused but the loss, whose refusal says what to do."""
    expected = step(llama(), **batch())
    model = llama()
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh)
    accel.apply(model)
    for _ in range(2):
        assert_close(whole(step(model, **batch())), expected)
    report = accel.report(model)
    (no,) = [refusal for fusion, refusal in report.refusals if fusion == "loss"]
    assert "the head's weight is a DTensor: sharded" in no.reason
    assert "apply before fully_shard, and before a head is cut, to fuse it" in no.remedy
    assert report.counts.fused["loss"] == 0
    assert min(report.counts.fused[fusion] for fusion in ("norm", "mlp", "rope", "residual")) > 0
    with pytest.raises(accel.RefusedError, match="apply before fully_shard"):
        accel.apply(accel.revert(model), loss=True, strict=True)
    assert is_vanilla(model)


@pytest.mark.parametrize("part", ["all", "inside"])
def test_flattened_by_fsdp1(part: str) -> None:
    """Torch builds FullyShardedDataParallel on an accelerator only; this is the mark that it leaves on the modules in it."""
    model = llama()
    _annotate_modules_for_dynamo(model.model if part == "inside" else model, set(), use_orig_params=True)
    for call in (accel.plan, accel.apply):
        with pytest.raises(
            ValueError, match=r"wrapped by FullyShardedDataParallel already.*apply before it is wrapped"
        ):
            call(model)
    assert is_vanilla(model)


def test_applied_and_then_flattened_by_fsdp1(caplog: pytest.LogCaptureFixture) -> None:
    model = accel.apply(llama())
    _annotate_modules_for_dynamo(model, set(), use_orig_params=True)
    assert accel.apply(model) is model
    assert "already applied" in caplog.text


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, nn.DataParallel])
def test_replicated(wrap: Callable[[nn.Module], Any]) -> None:
    """Right and fused: parameters and modules are where they were."""
    expected = step(llama(), **batch())
    wrapped = accel.apply(wrap(llama()))
    for _ in range(2):
        assert_close(named_as_in_the_model(step(wrapped, **batch())), expected)
    assert accel.report(wrapped).counts.fused["loss"] == 2
    assert accel.report(wrapped.module) is accel.report(wrapped)
    accel.revert(wrapped)
    assert is_vanilla(wrapped)


def test_compiled() -> None:
    """A graph of the vanilla model is there already, and is not used again."""
    torch._dynamo.reset()
    expected = step(llama(), **batch())
    model = llama()
    compiled = torch.compile(model, backend="eager")
    compiled(**batch())
    accel.apply(compiled)
    done = Run(model)
    for _ in range(2):
        model.zero_grad()
        loss = compiled(**batch()).loss
        done.saw(loss)
        loss.backward()
        assert_close(Step(loss.detach(), gradients(model)), expected)
    assert "GeneratedBackwardFor_automodel_accel_linear_cross_entropy_defaultBackward" in done.nodes


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_by_accelerate(precision: str) -> None:
    """In bfloat16 accelerate has set a forward on the model: its loss stays, and the refusal says so; the rest is fused."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    truth = step(llama(), **batch())
    ours, theirs = accel.apply(accelerator.prepare(llama())), accelerator.prepare(llama())
    steps = [step(model, **batch()) for model in (ours, theirs)]
    report = accel.report(ours)
    assert report.counts.fused["mlp"] == 2
    assert report.counts.fused["loss"] == (precision == "no")
    if precision == "no":
        assert_close(*steps)
        return
    assert_as_good(*steps, truth, torch.bfloat16)
    (no,) = [refusal for fusion, refusal in report.refusals if fusion == "loss"]
    assert "forward was replaced on the instance by accelerate" in no.reason
    assert "apply before it is replaced" in no.remedy


# around optimizers and parameters


def replace_a_norm(model: Any, optimizer: Any) -> None:
    """A parameter that the optimizer does not know."""
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach() * 1.5)


def forget_a_layer(model: Any, optimizer: Any) -> None:
    """Parameters that the optimizer is not given."""
    left = {id(parameter) for parameter in model.model.layers[1].parameters()}
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if id(p) not in left]


MISTAKES: dict[str, Callable[[Any, Any], None] | None] = {
    "optimizer before apply": None,
    "a parameter replaced": replace_a_norm,
    "parameters missing": forget_a_layer,
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_optimizer_built_before_apply(mistake: Callable[[Any, Any], None] | None) -> None:
    """No parameter is another object after `apply`: what the optimizer trains, and what it does not, is as in vanilla."""

    def loop(model: Any, feature: Feature, folder: Path, apply: bool = False) -> Run:
        optimizer = runs.adamw(model)
        if mistake is not None:
            mistake(model, optimizer)
        if apply:
            accel.apply(model)
        done = Run(model)
        for batches in runs.steps(feature):
            for inputs in batches:
                loss = model(**inputs).loss
                done.saw(loss)
                loss.backward()
            optimizer.step()
            model.zero_grad()
        return done

    done = [runs.run(one, llama(), Feature(), Path()) for one in (functools.partial(loop, apply=True), loop)]
    runs.assert_same(*done)
    runs.assert_fused(done[0])
    still = "model.norm.weight" if mistake is replace_a_norm else "model.layers.1.mlp.up_proj.weight"
    factor = 1.5 if mistake is replace_a_norm else 1.0
    moved = not torch.equal(done[0].end[still], done[0].start[still] * factor)
    assert moved == (mistake is None)


def test_applied_between_backward_and_step() -> None:
    """Gradients that wait for the optimizer are left alone."""
    model = llama()
    step(model, **batch())
    before = gradients(model)
    accel.apply(model)
    assert all(torch.equal(gradients(model)[name], gradient) for name, gradient in before.items())
    accel.revert(model)
    assert all(torch.equal(gradients(model)[name], gradient) for name, gradient in before.items())


# a loss of the user's own in the Trainer


class ReadsLogits(Watched):
    """A penalty on the logits' normaliser, beside the model's own loss."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss + 1e-3 * outputs.logits.logsumexp(-1).square().mean()
        self.done.saw(loss)
        return loss


class OwnCrossEntropy(Watched):
    """What scripts do for a loss by sample or by class: labels go in, the loss of the model is thrown away."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        logits = model(**inputs).logits[..., :-1, :].contiguous()
        labels = inputs["labels"][..., 1:].contiguous()
        losses = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), reduction="none")
        loss = losses.sum() / (labels != runs.IGNORED).sum()
        self.done.saw(loss)
        return loss


class TakesLabelsOut(Watched):
    """The other way: the model gets no labels, and its logits are real."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        self.done.saw(loss)
        return loss


TRAINERS: dict[str, tuple[type[Watched], int, int]] = {  # losses without logits, and logits built
    "reads logits": (ReadsLogits, MICRO_BATCHES, MICRO_BATCHES),
    "own cross entropy": (OwnCrossEntropy, 2 * MICRO_BATCHES, 0),
    "takes labels out": (TakesLabelsOut, 0, 0),
}


@pytest.mark.parametrize(("kind", "losses", "materialised"), TRAINERS.values(), ids=TRAINERS)
def test_a_trainer_with_a_loss_of_its_own(kind: type[Watched], losses: int, materialised: int, tmp_path: Path) -> None:
    def loop(model: Any, feature: Feature, folder: Path) -> Run:
        trainer = kind(model, runs.arguments(feature, folder), data_collator=feature.collate, train_dataset=runs.rows())
        trainer.done = Run(model)
        trainer.train()
        return trainer.done

    done = [runs.run(loop, model, Feature(), tmp_path) for model in (accel.apply(llama()), llama())]
    runs.assert_same(*done)
    runs.assert_fused(done[0], losses, materialised)


# at odd moments, and more than once


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_applied_inside_of_a_mode(mode: Callable[[], Any]) -> None:
    """As if it were applied outside: what is proved and what is kept of it does not depend on the mode."""
    model = llama()
    with mode():
        accel.apply(model)
    for _ in range(2):
        assert_close(step(model, **batch()), step(llama(), **batch()))
    counts = accel.report(model).counts
    assert counts.fused["loss"] == 2
    assert not counts.passed_on


def test_built_in_inference_mode() -> None:
    """Torch refuses to train such a model, applied or not, in the same words."""
    said = []
    for apply in (accel.apply, lambda model: model):
        with torch.inference_mode():
            model = apply(llama())
        with pytest.raises(RuntimeError, match="Inference tensors") as caught:
            step(model, **batch())
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_default_dtype_of_another_kind() -> None:
    model = llama()
    torch.set_default_dtype(torch.float64)
    try:
        accel.apply(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(step(model, **batch()), step(llama(), **batch()))
    assert accel.report(model).counts.fused["loss"] == 1


@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy], ids=["itself", "a deep copy"])
def test_applied_twice(again: Callable[[Any], Any], caplog: pytest.LogCaptureFixture) -> None:
    model = accel.apply(llama())
    twin = again(model)
    with caplog.at_level(logging.WARNING):
        assert accel.apply(twin) is twin
    assert "this LlamaForCausalLM is already applied; nothing was changed" in caplog.text
    with pytest.raises(ValueError, match=r"call revert\(model\) before applying"):
        accel.apply(twin, loss=False)
    assert_close(step(twin, **batch()), step(llama(), **batch()))
    assert accel.report(twin).counts.fused["loss"] == 1
    accel.revert(twin)
    assert is_vanilla(twin)
    assert is_vanilla(model) == (twin is model)
    accel.apply(twin, loss=False)
    assert accel.report(twin).places("loss") == 0


@pytest.mark.parametrize(("tied", "size"), [(False, VOCABULARY + 8), (True, VOCABULARY + 8), (True, VOCABULARY - 8)])
def test_vocabulary_resized_after_apply(tied: bool, size: int) -> None:
    """A head of its own is a new module then, which stays vanilla until `apply` is called again; a tied one is served on."""
    ours, model = accel.apply(tiny(tie_word_embeddings=tied)), tiny(tie_word_embeddings=tied)
    inputs = {name: tensor.clamp(max=size - 1) for name, tensor in batch().items()}
    for one in (ours, model):
        torch.manual_seed(0)
        one.resize_token_embeddings(size, mean_resizing=False)
    expected = step(model, **inputs)
    assert_close(step(ours, **inputs), expected)
    counts = accel.report(ours).counts
    said = "loss: the head is a Linear now, not the one that was proved; revert and apply again to fuse it"
    assert counts.passed_on == ({} if tied else {said: 1})
    assert counts.fused["loss"] == int(tied)
    accel.apply(accel.revert(ours))
    assert_close(step(ours, **inputs), expected)
    assert accel.report(ours).counts.fused["loss"] == 1
    assert not accel.report(ours).counts.passed_on
