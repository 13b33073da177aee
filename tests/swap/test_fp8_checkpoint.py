"""Checkpoints whose weights are blocks of 8-bit floats already, as the frozen base of adapters."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import finegrained_fp8 as library

import automodel_accel as accel
from tests.swap.compare import applied, assert_as_good, assert_close, only, step
from tests.swap.test_fp8 import defined, linears_of
from tests.tiny import batch, tiny

BLOCK = (16, 16)
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit values, and what each block of them is multiplied by."""
    rows, columns = (size // block for size, block in zip(weight.shape, BLOCK, strict=True))
    blocks = weight.float().view(rows, BLOCK[0], columns, BLOCK[1])
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    return (blocks / scale).to(torch.float8_e4m3fn).view(weight.shape), scale.view(rows, columns)


def in_blocks_of(model: nn.Module) -> nn.Module:
    """The linears of the layers as transformers loads them onto a GPU."""
    for name, linear in linears_of(model).items():
        made = library.FP8Linear(linear.in_features, linear.out_features, BLOCK)
        made.weight.data, made.weight_scale_inv.data = in_blocks(linear.weight.data)
        model.set_submodule(name, made.requires_grad_(False))
    return model


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the library's kernel, which needs a GPU: the weight as it stands, and its input unrounded."""

    def fp8_linear(x: Any, weight: Any, scale: Any, block: Any, bias: Any, *_: Any) -> torch.Tensor:
        return F.linear(x, library._dequantize_fp8_weight(weight, scale, block, x.dtype), bias)

    monkeypatch.setattr(library, "fp8_linear", fp8_linear)


def adapted(model: nn.Module, **config: Any) -> Any:
    torch.manual_seed(0)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, **config))  # type: ignore[arg-type]
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return made.train()


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("recompute", [None, "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_adapters_beside_the_librarys_product(dropout: float, recompute: Any) -> None:
    theirs = adapted(in_blocks_of(tiny()), lora_dropout=dropout)
    ours: Any = applied(theirs, **only("quantised"), recompute=recompute)
    assert "LoRA on fp8" in str(accel.report(ours))
    torch.manual_seed(1)
    expected = step(theirs, **batch())
    torch.manual_seed(1)
    assert_close(step(ours, **batch()), expected)
    counts = accel.report(ours).counts
    assert counts.fused["quantised"] == 2 * 3  # q and v of one input, gate and up, down
    assert not counts.passed_on
    state = theirs.state_dict()
    assert all(torch.equal(value.float(), state[name].float()) for name, value in ours.state_dict().items())


def _lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=TARGETS)


def saved(folder: Path) -> nn.Module:
    """A folder as such a checkpoint is published, and the model that it came from."""
    model = tiny(dtype=torch.bfloat16)
    tensors = {}
    linears = {f"{name}.weight" for name in linears_of(model)}
    for name, value in model.state_dict().items():
        if name in linears:
            tensors[name], tensors[f"{name}_scale_inv"] = in_blocks(value)
        else:
            tensors[name] = value.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict()
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
        "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return model


def test_loaded_where_there_is_no_gpu(tmp_path: Path) -> None:
    """Transformers widens it there; as a frozen base under `fp8` it takes one byte a weight again."""
    original = saved(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, linear in linears_of(model).items():
        apart = (linear.weight - linears_of(original)[name].weight).abs().max()
        assert 0 < apart < linear.weight.abs().max() / 16
    ours = accel.apply(copy.deepcopy(model), lora=_lora(), fp8="rowwise")
    theirs, truth = (peft.get_peft_model(copy.deepcopy(model), _lora()).train() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    truth.load_state_dict(ours.state_dict())
    found, expected = step(ours.train(), **batch()), step(defined(theirs, "rowwise"), **batch())
    assert_as_good(found, expected, step(truth.double(), **batch()), torch.bfloat16)
    assert all(linear.weight.untyped_storage().nbytes() == 2 for linear in linears_of(ours).values())
