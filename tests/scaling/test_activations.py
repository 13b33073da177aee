"""What a layer keeps for backward: the formulae against what autograd saves, counted by saved_tensors_hooks."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from automodel_accel.adapters import with_lora
from automodel_accel.parallel.mesh import Mesh
from automodel_accel.scaling.activations import layer_bytes
from automodel_accel.scaling.job import Job
from automodel_accel.scaling.reading import shape_of
from tests.budgets import layers

ONE = Mesh(shard=1)
RANK = 16
SHAPE: dict[str, Any] = {
    **{
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
EXPERTS: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96}
# architecture -> its sizes, and the error that is allowed
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "llama": (SHAPE, 0.001),
    "qwen3": (SHAPE, 0.001),
    "qwen3_moe": (SHAPE | EXPERTS, 0.01),
    "mixtral": (SHAPE | {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 96}, 0.02),
    "gemma3_text": (SHAPE, 0.01),
}
# its norms multiply before they narrow, so a plain one keeps 8 bytes an element and not 6
WIDER = {("gemma3_text", "plain"): 0.16}
OURS = frozenset({"norm", "mlp", "experts", "rope", "linear", "loss"})


def formula(
    architecture: str, sizes: dict[str, Any], fused: bool, recompute: str | None, rank: int | None = None
) -> float:
    config = CONFIG_MAPPING[architecture](**sizes, num_hidden_layers=2, vocab_size=64, pad_token_id=0)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if rank is not None:
        model = with_lora(model, {"r": rank, "target_modules": layers.LINEARS})
    job = Job(mesh=ONE, fusions=OURS if fused else frozenset(), recompute=recompute)
    shape = shape_of(model)
    return layer_bytes(shape.layers[0], shape, job, recompute)


@pytest.mark.parametrize("recompute", ["plain", None, "selective", "mlp", "full"])
@pytest.mark.parametrize("architecture", MODELS)
def test_kept_by_a_layer(architecture: str, recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, error = MODELS[architecture]
    monkeypatch.setitem(layers.SHAPES, architecture, (architecture, sizes | {"pad_token_id": 0}))
    monkeypatch.setattr(layers, "TOKENS", 64)
    fused = recompute != "plain"
    given = recompute if fused else None
    change = layers.ours(**layers.TORCH_ATTENTION, recompute=given) if fused else layers.vanilla
    counted = layers.saved_bytes(architecture, change)
    assert formula(architecture, sizes, fused, given) == pytest.approx(
        counted, rel=WIDER.get((architecture, recompute), error)
    )


@pytest.mark.parametrize("recompute", ["plain", None, "selective", "mlp", "full"])
def test_kept_by_an_adapted_layer(recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.SHAPES, "qwen3", ("qwen3", SHAPE))
    monkeypatch.setattr(layers, "TOKENS", 64)
    fused = recompute != "plain"
    given = recompute if fused else None
    then = layers.ours(**layers.TORCH_ATTENTION, recompute=given) if fused else layers.vanilla
    counted = layers.saved_bytes("qwen3", layers.lora(0.0, then))
    assert formula("qwen3", SHAPE, fused, given, RANK) == pytest.approx(counted, rel=0.001)


def test_llama_3_8b_by_hand() -> None:
    """kB: plain, and fused by what is computed again; the first three and the last are those of docs/how_it_works.md."""
    found = [formula("llama", layers.LLAMA_8B, False, None)]
    found += [formula("llama", layers.LLAMA_8B, True, recompute) for recompute in (None, "selective", "mlp", "full")]
    assert [round(of / 1000, 1) for of in found] == [200.8, 139.4, 94.3, 45.2, 8.2]
