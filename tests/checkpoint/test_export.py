"""What is exported is what plain transformers and plain PEFT would have written, and load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import automodel_accel as accel
from automodel_accel.checkpoint import export
from tests.checkpoint.forks import Forks
from tests.tiny import batch, tiny

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gemma2": {},
    "qwen3_moe": EXPERTS,  # whose file names are not those of its parameters
}


def made(name: str) -> Any:
    """The same each time."""
    return tiny(name, **MODELS[name])


def adapted() -> Any:
    """With adapters that are not zero, and a head that is saved whole."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama", tie_word_embeddings=False), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of all safetensors files in a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def assert_same(ours: Path, theirs: Path, *configs: str) -> None:
    """The same tensors under the same names, and the same configurations."""
    own, wanted = weights(ours), weights(theirs)
    assert own.keys() == wanted.keys()
    assert [name for name in own if not torch.equal(own[name], wanted[name])] == []
    for name in configs:
        assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())


def assert_loads(folder: Path, model: Any) -> None:
    """Into plain transformers, whole."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch()).logits, model.eval()(**batch()).logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_written_as_transformers_writes_it(tmp_path: Path, name: str) -> None:
    plain, model = made(name), accel.apply(made(name))
    plain.save_pretrained(tmp_path / "theirs")
    export(model, tmp_path / "ours")
    assert_same(tmp_path / "ours", tmp_path / "theirs", "config.json", "generation_config.json")
    assert_loads(tmp_path / "ours", plain)


def test_adapters_are_written_as_peft_writes_them(tmp_path: Path) -> None:
    plain, model = adapted(), accel.apply(adapted())
    plain.save_pretrained(tmp_path / "theirs")
    export(model, tmp_path / "ours")
    assert_same(tmp_path / "ours", tmp_path / "theirs", "adapter_config.json")
    loaded = PeftModel.from_pretrained(tiny("llama", tie_word_embeddings=False), str(tmp_path / "ours"))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch()).logits, plain.eval()(**batch()).logits)


def test_sharded_models_are_written_whole(forks: Forks, tmp_path: Path) -> None:
    forks.run("export_sharded", tmp_path / "ours", 2)
    for name in MODELS:
        made(name).save_pretrained(tmp_path / "theirs" / name, max_shard_size="20KB")
        assert_same(tmp_path / "ours" / name, tmp_path / "theirs" / name, "config.json", "model.safetensors.index.json")
        assert_loads(tmp_path / "ours" / name, made(name))
    adapted().save_pretrained(tmp_path / "theirs" / "adapter")
    assert_same(tmp_path / "ours" / "adapter", tmp_path / "theirs" / "adapter")


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Linear has no save_pretrained"):
        export(nn.Linear(2, 2), tmp_path / "new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        export(made("llama"), tmp_path / "old")
