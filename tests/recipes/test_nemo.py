"""NeMo Automodel's recipes: each key has a counterpart, changes nothing, or is named with its place."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from automodel_accel.cli import app
from automodel_accel.recipes import nemo
from automodel_accel.recipes.filling import fill
from automodel_accel.recipes.reading import RecipeError, parse
from automodel_accel.recipes.recipe import Recipe, load

LLM = """\
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {global_batch_size: 64, local_batch_size: 4, ckpt_every_steps: 100, val_every_steps: 50, num_epochs: 2, max_steps: 300}
dist_env: {backend: nccl, timeout_minutes: 1}
rng: {_target_: nemo_automodel.components.training.rng.StatefulRNG, seed: 7, ranked: true}
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: org/some-llama
  torch_dtype: bf16
  attn_implementation: te
  backend: {_target_: nemo_automodel.components.models.common.BackendConfig, attn: te, linear: te, rms_norm: te}
peft:
  _target_: nemo_automodel.components._peft.lora.PeftConfig
  target_modules: ["*q_proj", "*v_proj"]
  dim: 8
  alpha: 16
  dropout: 0.05
  use_triton: true
distributed: {strategy: fsdp2, tp_size: 2, cp_size: 1, dp_size: none, sequence_parallel: true, activation_checkpointing: selective}
loss_fn: {_target_: nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy}
dataset:
  _target_: nemo_automodel.components.datasets.llm.squad.make_squad_dataset
  dataset_name: rajpurkar/squad
  split: train
  limit_dataset_samples: 1000
packed_sequence: {packed_sequence_size: 1024}
dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: nemo_automodel.components.datasets.utils.default_collater
  shuffle: false
validation_dataset:
  _target_: nemo_automodel.components.datasets.llm.squad.make_squad_dataset
  dataset_name: rajpurkar/squad
  split: validation
optimizer: {_target_: torch.optim.AdamW, lr: 2.0e-5, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, foreach: false}
lr_scheduler: {lr_decay_style: cosine, lr_warmup_steps: 10, min_lr: 2.0e-6}
clip_grad_norm: {max_norm: 0.5}
checkpoint: {enabled: true, checkpoint_dir: out/run, model_save_format: safetensors, save_consolidated: final}
wandb: {enable: true, project: mine, name: first}
neftune: {noise_alpha: 5.0}
"""
VLM = """\
recipe: FinetuneRecipeForVLM
step_scheduler: {global_batch_size: 8, local_batch_size: 1, max_steps: 20}
model:
  _target_: nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained
  pretrained_model_name_or_path: org/some-gemma
processor:
  _target_: transformers.AutoProcessor.from_pretrained
  pretrained_model_name_or_path: org/some-processor
  max_pixels: 100000
freeze_config: {freeze_vision_tower: true, freeze_audio_tower: true, freeze_language_model: false}
dataset:
  _target_: nemo_automodel.components.datasets.vlm.datasets.make_cord_v2_dataset
  path_or_dataset: naver-clova-ix/cord-v2
  split: train
dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn:
    _target_: nemo_automodel.components.datasets.vlm.collate_fns.default_collate_fn
    max_length: 4096
optimizer: {_target_: torch.optim.Adam, lr: 1e-5, betas: [0.9, 0.999], weight_decay: 0}
"""
MINIMAL = """\
step_scheduler: {{global_batch_size: 8, local_batch_size: 1}}
model: {{_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path: a/b}}
dataset: {{_target_: nemo_automodel.components.datasets.llm.hellaswag.HellaSwag, path_or_dataset: Rowan/hellaswag}}
{more}
"""


def translated(text: str) -> nemo.Translation:
    return nemo.translate(nemo.parse_theirs(text, "their.yaml"))


def filled(found: nemo.Translation) -> Recipe:
    return fill(Recipe, parse(yaml.safe_dump(found.recipe), "ours"))


def test_a_recipe_for_text() -> None:
    found = translated(LLM)
    assert found.is_whole
    assert not found.differs
    recipe = filled(found)
    assert recipe.model.path == "org/some-llama"
    assert recipe.model.dtype == "bfloat16"
    assert recipe.model.attn_implementation is None
    assert recipe.training.global_batch_size == 64
    assert (recipe.training.steps, recipe.training.epochs, recipe.training.validate_every) == (300, 2, 50)
    assert (recipe.training.seed, recipe.training.max_grad_norm, recipe.training.neftune_noise_alpha) == (7, 0.5, 5.0)
    assert (recipe.batching.batch_size, recipe.batching.packing, recipe.batching.seq_length) == (4, True, 1024)
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (8, 16, 0.05)
    assert recipe.lora.target_modules == ("*q_proj", "*v_proj")
    assert (recipe.mesh.tensor, recipe.mesh.sequence_parallel) == (2, True)
    assert recipe.accel
    assert recipe.accel.recompute == "selective"
    assert recipe.data.kind == "squad"
    assert (recipe.data.limit, recipe.data.shuffle) == (1000, False)
    assert recipe.held_out["validation"].split == "validation"  # type: ignore[union-attr]
    assert (recipe.optimizer.kind, recipe.optimizer.lr, recipe.optimizer.betas) == ("adamw", 2e-5, (0.9, 0.95))
    assert recipe.optimizer.groups[0].pattern == "*", "theirs decays norms and biases too"
    assert (recipe.schedule.kind, recipe.schedule.warmup) == ("cosine", 10)
    assert recipe.schedule.min_ratio == pytest.approx(0.1)
    assert recipe.checkpoint.every == 100
    assert str(recipe.output) == "out/run"
    assert recipe.logging.trackers == ("wandb",)
    assert recipe.logging.project == "mine"
    assert recipe.logging.settings == {"wandb": {"name": "first"}}


def test_a_recipe_for_images() -> None:
    found = translated(VLM)
    assert found.is_whole
    recipe = filled(found)
    assert recipe.has_images
    assert recipe.data.kind == "cord_v2"
    assert recipe.model.task == "image_text_to_text"
    assert recipe.model.tokenizer == "org/some-processor"
    assert recipe.model.processor == {"max_pixels": 100000}
    assert recipe.model.freeze.parts() == ("vision_tower",), "a gemma has no ears by its name"
    assert recipe.batching.seq_length == 4096
    assert (recipe.schedule.kind, recipe.schedule.warmup) == ("constant", 0), "as theirs without a scheduler"


def leaves(value: Any, key: str = "") -> list[str]:
    if isinstance(value, dict) and value:
        return [leaf for name, inner in value.items() for leaf in leaves(inner, f"{key}.{name}" if key else name)]
    return [key]


NAMES = st.sampled_from(
    [
        "model",
        "dataset",
        "optimizer",
        "peft",
        "distributed",
        "backend",
        "_target_",
        "lr",
        "tp_size",
        "x",
        "freeze_config",
    ]
)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(0, 9), st.floats(0, 1), st.text("abc._", max_size=9), st.just([1])
)


@given(
    st.dictionaries(NAMES, st.recursive(VALUES, lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=9))
)
def test_no_key_is_lost(theirs: dict[str, Any]) -> None:
    found = translated(yaml.safe_dump(theirs))
    told = [note.key for notes in (found.mapped, found.ignored, found.differs, found.unmapped) for note in notes]
    assert sorted(told) == sorted(leaves(theirs) if theirs else [""])


@pytest.mark.parametrize("text", [LLM, VLM], ids=["llm", "vlm"])
def test_no_key_of_a_recipe_is_lost(text: str) -> None:
    found = translated(text)
    told = [note.key for notes in (found.mapped, found.ignored, found.differs, found.unmapped) for note in notes]
    assert sorted(told) == sorted(leaves(yaml.safe_load(text)))


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        (
            "optimizer: {_target_: os.system, lr: 1}",
            "optimizer._target_",
            "os.system: has no counterpart, and is not imported",
        ),
        ("qat: {enabled: true}", "qat.enabled", "quantisation-aware"),
        ("mystery: 3", "mystery", "not known"),
        ("loss_fn: {_target_: my.own.Loss}", "loss_fn._target_", "my.own.Loss"),
        ("dataloader: {collate_fn: my.own.collate}", "dataloader.collate_fn", "collate function of its own"),
        ("checkpoint: {restore_from: out/epoch_0}", "checkpoint.restore_from", "does not read"),
    ],
)
def test_what_has_no_counterpart_is_named_with_its_place(more: str, key: str, said: str, tmp_path: Path) -> None:
    text = MINIMAL.format(more=more)
    (note,) = translated(text).unmapped
    assert note.key == key
    assert said in note.said
    assert note.place.line == 4
    path = tmp_path / "their.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"their\.yaml:4:\d+: {key.replace('.', '[.]')} = "):
        load(path)
    result = CliRunner().invoke(app, ["convert-recipe", str(path)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert said in result.stderr
    allowed = CliRunner().invoke(app, ["convert-recipe", str(path), "--allow-unmapped"])
    assert yaml.safe_load(allowed.stdout)["model"]["path"] == "a/b"


def test_a_key_of_their_program_that_names_code_runs_none(tmp_path: Path) -> None:
    mark = tmp_path / "imported"
    module = tmp_path / "theirs.py"
    module.write_text(f"open({str(mark)!r}, 'w')\n")
    found = translated(MINIMAL.format(more="loss_fn: {_target_: theirs.Loss}"))
    assert not mark.exists()
    assert not found.is_whole


def test_heads_for_further_tokens_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = translated(MINIMAL.format(more="").replace("a/b", "a/b, mtp_loss_scaling_factor: 0.1"))
    assert found.is_whole
    assert [note.key for note in found.differs] == ["model.mtp_loss_scaling_factor"]
    path = tmp_path / "their.yaml"
    path.write_text(MINIMAL.format(more="").replace("a/b", "a/b, mtp_loss_scaling_factor: 0.1"))
    load(path)
    assert "trained without their loss" in caplog.text


def test_train_reads_it_and_overrides_go_by_our_keys(tmp_path: Path) -> None:
    path = tmp_path / "their.yaml"
    path.write_text(LLM)
    recipe = load(path, ["--optimizer.lr=3e-4", "--training.steps=2"])
    assert (recipe.optimizer.lr, recipe.training.steps) == (3e-4, 2)
    with pytest.raises(RecipeError, match=r"step_scheduler\.max_steps: a key of NeMo.*training\.steps"):
        load(path, ["--step_scheduler.max_steps=2"])
    out = tmp_path / "ours.yaml"
    result = CliRunner().invoke(app, ["convert-recipe", str(path), "--to", str(out)])
    assert result.exit_code == 0, result.output
    assert load(out) == load(path)


def test_a_recipe_of_ours_is_not_taken_for_theirs(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("model: {path: a/b}\ndata: {kind: mock, vocab_size: 9}\n")
    result = CliRunner().invoke(app, ["convert-recipe", str(path)])
    assert result.exit_code == 2
    assert "neither a _target_ nor a step_scheduler" in result.stderr


def test_the_environment_is_read_as_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEIR_MODEL", "c/d")
    text = MINIMAL.format(more="wandb: {enable: false, project: '${WANDB_API_KEY}'}")
    found = translated(text.replace("a/b", "${oc.env:THEIR_MODEL}"))
    assert found.recipe["model"]["path"] == "c/d"
    assert translated(text.replace("a/b", "'${oc.env:NOT_SET_HERE,e/f}'")).recipe["model"]["path"] == "e/f"
