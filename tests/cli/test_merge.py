"""automodel-accel merge: a plain model that computes what the adapted one does, and what it says to wrong input."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import automodel_accel as accel
from automodel_accel.cli import app
from tests.tiny import batch, tiny


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """As it comes out of a training with ours."""
    lora = {"r": 4, "target_modules": ["*_proj"], "init_lora_weights": False}
    model = accel.apply(AutoModelForCausalLM.from_pretrained(base), lora=lora)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "adapter"


def test_the_merged_model_is_a_plain_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = run(adapter, "--to", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.stdout
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "chat_template.jinja"} <= files
    assert not any("adapter" in name for name in files)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        logits = [model.eval()(**batch()).logits for model in (merged, adapted)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], AutoModelForCausalLM.from_pretrained(base)(**batch()).logits)


LINEARS = ["q_proj", "down_proj"]


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": LINEARS, "modules_to_save": ["norm", "lm_head"]},
        {"target_modules": LINEARS, "use_dora": True},
        {"target_modules": LINEARS, "trainable_token_indices": [3, 4]},
    ],
    ids=["head", "embedding", "saved modules", "DoRA", "tokens"],
)
def test_whatever_peft_saves_is_merged(lora: dict[str, Any], tmp_path: Path) -> None:
    tiny(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **lora))
    model.save_pretrained(tmp_path / "adapter")
    assert run(tmp_path / "adapter", "--to", tmp_path / "merged").exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = [one.eval()(**batch()).logits for one in (merged, model)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapter_of_another_model(base: Path, tmp_path: Path, task_type: str | None) -> None:
    """PEFT itself loads what fits and says nothing of the rest."""
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules=LINEARS, task_type=task_type)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    others = {"three": tiny(num_hidden_layers=3), "one": tiny(num_hidden_layers=1), "qwen": tiny("qwen3")}
    said = {
        "three": "it lacks base_model.model.model.layers.2.mlp.down_proj.lora_A.weight (4 weights in all)",
        "one": "it holds base_model.model.model.layers.1.mlp.down_proj.lora_A.weight (4 weights in all)",
        "qwen": "it was trained on a LlamaForCausalLM; give that model with --base.",
    }
    for name, other in others.items():
        if name == "qwen" and task_type:
            continue  # then PEFT saves no class, and every weight fits
        other.save_pretrained(tmp_path / name)
        result = run(tmp_path / "adapter", "--to", tmp_path / "merged", "--base", tmp_path / name)
        assert result.exit_code == 2
        assert "is no adapter of" in result.stderr
        assert said[name] in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "merged").exists()


def test_wrong_input(adapter: Path, base: Path, tmp_path: Path) -> None:
    wide = tiny(hidden_size=48)
    wide.save_pretrained(tmp_path / "wide")
    gpt = tiny("gpt_neox")
    gpt.save_pretrained(tmp_path / "gpt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a file").touch()
    for arguments, said in (
        ((base, "--to", tmp_path / "a"), "holds no adapter_config.json"),
        ((adapter, "--to", tmp_path / "full"), "is there already and not empty"),
        ((adapter, "--to", tmp_path / "b", "--base", tmp_path / "wide"), "is no adapter of"),
        (
            (adapter, "--to", tmp_path / "c", "--base", tmp_path / "gpt"),
            "a GPTNeoXForCausalLM: it was trained on a Llama",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "b").exists()
