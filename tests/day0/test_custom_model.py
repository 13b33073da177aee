"""A model class that transformers has never seen gets its norms, MLPs, rotary, residual sums and loss."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import automodel_accel as accel
from tests.day0.checks import training_step
from tests.day0.custom_model import HarborConfig, HarborForCausalLM
from tests.swap.compare import assert_as_good, assert_close, step
from tests.tiny import shake


def _model() -> HarborForCausalLM:
    torch.manual_seed(0)
    model = HarborForCausalLM(HarborConfig())
    shake(model)
    return model.train()


def _batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(131, (2, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": torch.where(torch.arange(24) < 5, -100, tokens)}


def test_every_fusion_serves_it() -> None:
    model = _model()
    ours = accel.apply(copy.deepcopy(model))
    assert_close(step(ours, **_batch()), step(model, **_batch()))
    report = accel.report(ours)
    # of 5 norms, 2 take the sum of their layer
    assert report.counts.fused == {"norm": 3, "residual": 2, "mlp": 2, "rope": 2, "linear": 2, "loss": 1}
    assert report.materialised_logits == 0


def test_bfloat16() -> None:
    model = _model().bfloat16()
    truth = step(copy.deepcopy(model).float(), **_batch())
    ours = accel.apply(copy.deepcopy(model))
    assert_as_good(step(ours, **_batch()), step(model, **_batch()), truth, torch.bfloat16)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    model = _model()
    ours = accel.apply(copy.deepcopy(model))
    torch._dynamo.reset()
    assert_close(training_step(ours, _batch(), torch.compile(ours, backend=backend)), training_step(model, _batch()))


def test_generation_reads_real_scores() -> None:
    model = _model().eval()
    ours = accel.apply(copy.deepcopy(model))
    with torch.no_grad():
        tokens = _batch()["input_ids"]
        torch.testing.assert_close(ours(tokens).scores, model(tokens).scores)


class Parrot(torch.nn.Module):
    """No class of transformers, a head that nothing names, and targets in place of labels."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.say = torch.nn.Embedding(57, 32), torch.nn.Linear(32, 57)
        self.calm = torch.nn.LayerNorm(32)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        scores = self.say(self.calm(self.words(tokens)))
        loss = None if targets is None else F.cross_entropy(scores.view(-1, 57), targets.view(-1))
        return scores, loss


def test_a_head_that_nothing_names_is_found_by_its_length() -> None:
    torch.manual_seed(0)
    model, tokens = Parrot(), torch.randint(57, (2, 9))
    ours = accel.apply(copy.deepcopy(model))
    losses = [one(tokens, tokens.roll(-1, 1))[1] for one in (ours, model)]
    torch.testing.assert_close(*losses)
    losses[0].backward(), losses[1].backward()
    for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-7)
    assert accel.report(ours).counts.fused == {"norm": 1, "loss": 1}
    assert accel.report(ours).materialised_logits == 0
    assert isinstance(ours(tokens)[0], torch.Tensor)
