"""What only looks like a place that we serve, inside a whole model: the original runs, the report says why, the result is exact."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import (
    ALL_ATTENTION_FUNCTIONS,
    LlamaAttention,
    LlamaForCausalLM,
    LlamaRMSNorm,
    eager_attention_forward,
)

import automodel_accel as accel
from tests.swap.compare import assert_close, step
from tests.tiny import batch, tiny


class NormOfGroups(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        groups = hidden_states.unflatten(-1, (4, -1))
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * groups.flatten(-2)


class NormWithMatrix(LlamaRMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.weight = nn.Parameter(torch.rand(1, size) + 0.5)


class NormWithGate(LlamaRMSNorm):
    """Its layer hands it a second input, which the plain form does not take."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * torch.sigmoid(gate) * 1.5


class GateGiver(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = NormWithGate(size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden_states, hidden_states.tanh())  # type: ignore[no-any-return]


class NearlyGelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x) * 1.001


class AttentionWithKeyword(LlamaAttention):
    """Passes a keyword that no attention function knows."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {"dropout": 0.0, "scaling": self.scaling, "temperature_of_the_room": 21.0}
        output, weights = function(self, query, key, value, attention_mask, **options)
        return self.o_proj(output.flatten(2)), weights


class AttentionThroughSuper(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, temperature_of_the_room=21.0, **kwargs)


class ReadsLogits(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.loss = outputs.loss + 1e-3 * outputs.logits.float().logsumexp(-1).square().mean()
        return outputs


class WritesLogits(LlamaForCausalLM):
    """Forbids a word by writing into the logits."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        outputs = self.model(input_ids, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        logits[..., 7] = -20.0
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size) if labels is not None else None
        outputs.loss, outputs.logits = loss, logits
        return outputs


def _norm(make: Callable[[int], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: Any) -> None:
        model.model.layers[0].input_layernorm = make(32)

    return change


def _activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = NearlyGelu()


def _attention(cls: type[nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: Any) -> None:
        model.model.layers[0].self_attn.__class__ = cls

    return change


def _model(cls: type[nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.__class__ = cls

    return change


# what is done to a Llama, and what its report must say
CASES: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "a norm of groups": (_norm(NormOfGroups), "not root mean square"),
    "a norm with a matrix": (_norm(NormWithMatrix), "not one vector"),
    "a norm with an extra gate": (_norm(GateGiver), "more than one input"),
    "an activation that is nearly gelu": (_activation, "computes something else than"),
    "an attention that passes an unknown keyword": (_attention(AttentionWithKeyword), "temperature_of_the_room"),
    "an unknown keyword through super()": (_attention(AttentionThroughSuper), "through super()"),
    "a forward that reads logits": (_model(ReadsLogits), "materialised logits (logsumexp"),
    "a write into logits": (_model(WritesLogits), "materialised logits (writing into logits"),
}


@pytest.mark.parametrize(("change", "reason"), CASES.values(), ids=CASES)
def test_the_original_runs_and_the_report_says_why(change: Callable[[nn.Module], None], reason: str) -> None:
    model = tiny("llama")
    change(model)
    ours = accel.apply(copy.deepcopy(model))
    assert_close(step(ours, **batch()), step(model, **batch()))
    assert reason in " ".join(str(accel.report(ours)).split())
    accel.revert(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in model.modules()]
