"""Heads that are cut along the vocabulary over ranks, and what each rank checks of a training step with one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import automodel_accel as accel
from automodel_accel.kernels.collectives import part_sizes
from automodel_accel.patches.heads import base_linear, linears_of
from automodel_accel.patches.vocab import VOCAB_SHARD, VocabShard
from tests.ops.allocations import Allocations
from tests.swap.compare import Step, assert_close, gradients, only
from tests.swap.test_heads import HEAD, adapted
from tests.tiny import batch, tiny

PREFIX = 90  # classes of a loss that leaves out the last ones


def biased(model: Any) -> Any:
    """With a bias on its head."""
    torch.manual_seed(5)
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    return model


def with_row(model: Any) -> Any:
    """With a vector that the model adds to its logits, and trains."""
    torch.manual_seed(6)
    row = torch.randn_like(model.final_logits_bias)
    del model.final_logits_bias
    model.final_logits_bias = nn.Parameter(row)
    return model


def plain(name: str = "llama", **config: Any) -> Any:
    """A head of its own."""
    return tiny(name, tie_word_embeddings=False, **config)


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and whether the adapters of its head are cut as well."""

    build: Callable[[], Any]
    adapters_cut: bool = True


CASES: dict[str, Case] = {
    "plain": Case(plain),
    "a bias": Case(lambda: biased(plain())),
    "soft-capped": Case(lambda: plain("gemma2")),
    "scaled": Case(lambda: plain("cohere")),
    "a row of the model's": Case(lambda: with_row(plain("bart"))),
    "LoRA": Case(lambda: adapted(plain(), **HEAD)),
    "LoRA, biases": Case(lambda: adapted(biased(plain()), **{**HEAD, "lora_bias": True}, bias="all")),
    "LoRA, adapters whole": Case(lambda: adapted(plain(), **HEAD), adapters_cut=False),
}


def cut_head(model: Any, group: Any, mesh: DeviceMesh | None = None, adapters: bool = True) -> dict[str, VocabShard]:
    """Keep this rank's rows of the head; on a mesh as DTensors, which are plain while a linear is called.

    Returns:
        The names of the parameters that were cut, and to which rows.
    """
    head = model.get_output_embeddings()
    vocab = base_linear(head).out_features
    sizes, rank = part_sizes(vocab, dist.get_world_size(group)), dist.get_rank(group)
    shard = VocabShard(group, sum(sizes[:rank]), sum(sizes[: rank + 1]), vocab)
    chosen = [linear for linear in linears_of(head) if adapters or linear is base_linear(head)]
    for linear in chosen:
        for name, whole in list(linear.named_parameters(recurse=False)):
            rows = whole.detach()[shard.start : shard.stop].clone()
            own = rows if mesh is None else distribute_tensor(whole.detach(), mesh, [Shard(0)])
            linear._parameters[name] = nn.Parameter(own, whole.requires_grad)
        setattr(linear, VOCAB_SHARD, shard)
        if mesh is not None:
            _plain_while_called(linear)
    names = {module: path for path, module in model.named_modules()}
    return {f"{names[linear]}.{name}": shard for linear in chosen for name in linear._parameters}


def _plain_while_called(linear: nn.Module) -> None:
    at_rest: dict[str, Any] = {}

    def before(module: nn.Module, args: Any) -> None:
        at_rest.update(module._parameters)
        for name, parameter in at_rest.items():
            if parameter is not None:
                module._parameters[name] = parameter.to_local()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(at_rest)

    linear.register_forward_pre_hook(before)
    linear.register_forward_hook(after, always_call=True)


def losses(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's own loss, one of the user's on its lazy logits, and one on real ones."""
    outputs = model(**inputs)
    target = inputs["labels"].reshape(-1)
    few = outputs.logits[..., :PREFIX].reshape(-1, PREFIX)
    some = target.masked_fill(target >= PREFIX, -100)
    return {
        "own": outputs.loss,
        "smoothed, of a prefix": F.cross_entropy(few, some, label_smoothing=0.1),
        "of real logits": model(**inputs).logits.float().logsumexp(-1).mean(),
    }


def check(case: Case, ours: Any, vanilla: Any, group: Any, mesh: DeviceMesh | None = None) -> None:
    """Loss, gradients and logits of one rank are vanilla's, without logits where nobody looks at them."""
    shards = cut_head(ours, group, mesh, case.adapters_cut)
    inputs = batch()
    report = accel.report(ours)
    sizes = []
    if mesh is None:  # the storage of a DTensor has no address
        with Allocations() as allocations:
            ours(**inputs).loss.backward()
        sizes = allocations.sizes
    else:
        ours(**inputs).loss.backward()
    assert (report.counts.fused["loss"], report.materialised_logits, dict(report.counts.passed_on)) == (1, 0, {})
    whole = 4 * inputs["labels"].numel() * vanilla.config.vocab_size
    assert not [size for size in sizes if size >= whole], "whole logits were built"
    for name in ("own", "smoothed, of a prefix", "of real logits"):
        steps = []
        for model in (ours, vanilla):
            model.zero_grad()
            loss = losses(model, inputs)[name]
            loss.backward()
            steps.append(Step(loss.detach(), gradients(model)))
        mine = {
            path: grad.to_local() if hasattr(grad, "to_local") else grad for path, grad in steps[0].gradients.items()
        }
        theirs = {
            path: grad[shards[path].start : shards[path].stop] if path in shards else grad
            for path, grad in steps[1].gradients.items()
        }
        assert_close(Step(steps[0].loss, mine), Step(steps[1].loss, theirs))
    check_logits(ours, vanilla, inputs)


def check_logits(ours: Any, vanilla: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Lazy or real, they are those of the whole vocabulary."""
    mine, theirs = ours(**inputs).logits, vanilla(**inputs).logits
    assert (type(mine).__name__, mine.shape) == ("LazyLogits", theirs.shape)
    assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
    ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, theirs, rtol=1e-5, atol=1e-5)
    ours.train()
    late = ours(**inputs).logits
    with torch.no_grad():
        base_linear(ours.get_output_embeddings()).weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="the output head has changed since"):
        late.argmax(-1)


def build(case: Case) -> tuple[Any, Any]:
    """(ours, vanilla), alike."""
    return accel.apply(case.build(), **only("loss")), case.build()
