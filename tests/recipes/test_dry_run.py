"""Dry runs: figures that can be checked by hand, every problem at once, and two real steps of a tiny model."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from automodel_accel.cli import app
from automodel_accel.config import AccelConfig
from automodel_accel.data.settings import Batching, ChatData, MockData
from automodel_accel.data.vision_settings import CordV2
from automodel_accel.freezing import Freezing
from automodel_accel.parallel.mesh import Mesh
from automodel_accel.recipes import dry_run as module
from automodel_accel.recipes.building import build
from automodel_accel.recipes.dry_run import DryRun, dry_run
from automodel_accel.recipes.recipe import Fp8, Lora, Model, Recipe
from automodel_accel.recipes.tiny import tiny_model
from automodel_accel.recipes.tiny.building import MAPPINGS
from automodel_accel.recipes.trial import try_out
from automodel_accel.train.logs import Logging
from automodel_accel.train.optimizers import Group, Optimizer
from automodel_accel.train.schedules import Schedule
from automodel_accel.train.settings import Checkpointing, Training
from tests.recipes.test_tiny import NAMED

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
# what NeMo Automodel's recipes put adapters on
OTHER_TARGETS = {"gpt2": ("c_attn",), "gpt_neox": ("query_key_value",), "phi": ("q_proj", "v_proj")}
EXCLUDED = ("*.out_proj", "*vision*")
TRAINED = [name for name, kind in NAMED.items() if kind != "gemma3n"]  # whose tower is timm's
# of that: embeddings, and in each layer q, k, v, o, the gated MLP and two norms; the last norm
PARAMETERS = 500 * 64 + 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64


@pytest.fixture
def model(tmp_path: Path) -> Model:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return Model(path=str(folder), dtype="float32")


@pytest.fixture
def recipe(model: Model, tmp_path: Path) -> Recipe:
    return Recipe(
        model=model,
        data=MockData(vocab_size=500, samples=100),
        batching=Batching(seq_length=32, batch_size=2),
        training=Training(epochs=2, global_batch_size=8),
        checkpoint=Checkpointing(every=5),
        output=tmp_path / "run",
    )


def said(found: DryRun, name: str) -> str:
    return next(line.said for line in found.lines if line.name == name)


def errors(found: DryRun) -> dict[str, str]:
    return {problem.where: problem.said for problem in found.problems if problem.kind == "error"}


def test_a_recipe_that_works(recipe: Recipe, tmp_path: Path) -> None:
    found = dry_run(recipe)
    assert not found.problems
    assert found.exit_code == 0
    plain = json.loads(found.to_json())
    assert plain["model"]["parameters"] == plain["trained"]["trained"] == PARAMETERS
    # 100 full rows of 2 epochs, 2 at once, 4 micro-batches a step
    assert (plain["batch"]["micro_batches"], plain["steps"]["steps"], plain["steps"]["of_epoch"]) == (4, 25, 13)
    assert plain["checkpoints"]["number"] == 5  # after 5, 10, 15, 20, and at the end
    assert plain["accel"]["swapped"]["norm"] == 7
    assert plain["memory"]["peak_bytes"] > 4 * PARAMETERS * 4  # parameters, gradients, two states, float32
    assert not (tmp_path / "run").exists()


def test_it_fits_on_one_screen(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(dry_run(recipe)).splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 80
    assert len({len(line) - len(line[14:].lstrip()) for line in lines if line.startswith("batch")}) == 1


def test_adapters_and_frozen_parts_are_counted(recipe: Recipe) -> None:
    plain = dry_run(replace(recipe, lora=Lora(r=4, target_modules=("q_proj", "o_proj")))).to_dict()
    assert plain["model"]["parameters"] == PARAMETERS
    assert plain["trained"]["lora_modules"] == 6
    assert plain["trained"]["trained"] == 6 * 4 * (64 + 64)
    frozen = dry_run(replace(recipe, model=replace(recipe.model, freeze=Freezing(embeddings=True)))).to_dict()
    assert frozen["trained"]["trained"] == PARAMETERS - 500 * 64


def test_the_mesh_is_sized_and_divides_the_batch(recipe: Recipe) -> None:
    plain = dry_run(replace(recipe, mesh=Mesh(tensor=2)), world_size=4).to_dict()
    assert (plain["mesh"]["shard"], plain["mesh"]["tensor"], plain["batch"]["micro_batches"]) == (2, 2, 2)
    assert plain["memory"]["gpus"] == 4


def test_without_a_number_of_processes_it_is_the_mesh_s(recipe: Recipe) -> None:
    assert dry_run(replace(recipe, mesh=Mesh(shard=4))).to_dict()["mesh"]["world_size"] == 4


def test_plain_transformers_has_nothing_swapped(recipe: Recipe) -> None:
    plain = dry_run(replace(recipe, accel=False)).to_dict()
    assert plain["accel"]["swapped"] == {}
    assert plain["memory"]["peak_bytes"] == plain["memory"]["peak_bytes_of_plain_transformers"]


def test_all_problems_are_listed_at_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(module.this_machine(), packages={"datasets": "1"})
    monkeypatch.setattr(module, "this_machine", lambda: bare)
    found = dry_run(
        replace(
            recipe,
            data=ChatData(path="./nowhere/train.jsonl", streaming=True),
            validation={"held_out": ChatData(path="demo:chaterbot")},
            training=Training(global_batch_size=7),
            optimizer=Optimizer(groups=(Group(pattern="*.nothing.*"),)),
            batching=Batching(seq_length=4096, batch_size=2),
            lora=Lora(target_modules=("q_prj",)),
            logging=Logging(trackers=("wandb",)),
        ),
        world_size=1,
    )
    problems = errors(found)
    assert found.exit_code == 2
    assert "expected a multiple of 2" in problems["training.global_batch_size"]
    assert "nowhere/train.jsonl does not exist" in problems["data.path"]
    assert "demo:chatterbot" in problems["validation.held_out.path"]
    assert "streams" in problems["training.steps"]
    assert "fits no parameter" in problems["optimizer"]
    assert "q_proj" in problems["lora"]
    assert "pip install wandb" in problems["logging.trackers"]
    assert "no tokenizer" in problems["model.path"]
    notes = {problem.where for problem in found.problems if problem.kind == "note"}
    assert notes == {"batching.seq_length"}
    assert str(found).splitlines()[-1] == f"{len(problems)} errors: the run would stop."
    assert [problem.kind for problem in found.problems] == sorted(
        (problem.kind for problem in found.problems), key=module.GRAVEST.index
    )


@pytest.mark.parametrize(
    ("change", "where", "expected"),
    [
        ({"mesh": Mesh(shard=3)}, "mesh", "needs 3 processes, but there are 2"),
        ({"data": MockData(vocab_size=501)}, "data.vocab_size", "is 501, but the model has 500 words"),
        ({"schedule": Schedule(warmup=5000)}, "optimizer", "warmup takes 5000 steps"),
        ({"model": Model(path="./nowhere")}, "model.path", "does not exist"),
        ({"mesh": Mesh(tensor=8)}, "mesh", "needs a multiple of 8 processes"),
    ],
)
def test_a_problem_names_its_key(recipe: Recipe, change: dict[str, Any], where: str, expected: str) -> None:
    assert expected in errors(dry_run(replace(recipe, **change), world_size=2))[where]


def test_a_folder_that_holds_another_run_is_said(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_5").mkdir(parents=True)
    found = dry_run(replace(recipe, checkpoint=Checkpointing(resume="never")))
    assert "resume is never" in errors(found)["output"]


def test_a_name_of_the_hub_without_a_network_leads_to_tiny(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(model: Model) -> None:
        raise ValueError(f"model.path {model.path}: We couldn't connect.")

    monkeypatch.setattr(module, "load_config", offline)
    found = dry_run(replace(recipe, model=Model(path="nobody/Qwen3-0.6B")))
    assert "--tiny" in errors(found)["model.path"]
    assert said(found, "steps")  # what can be known without the model is told


RECIPES = {
    "full": Recipe(model=Model(path="Qwen/Qwen3-0.6B"), data=ChatData(path="./none.jsonl")),
    "lora of experts": Recipe(
        model=Model(path="Qwen/Qwen3-30B-A3B"),
        data=ChatData(path="./none.jsonl"),
        lora=Lora(r=64, target_modules=("*_proj",)),
    ),
    "fp8, recompute": Recipe(
        model=Model(path="meta-llama/Llama-3.2-1B", dtype="bfloat16"),
        data=ChatData(path="./none.jsonl"),
        fp8=Fp8(recipe="rowwise"),
        accel=AccelConfig(recompute="selective"),
        schedule=Schedule(kind="wsd", warmup=100, decay=500),
        training=Training(steps=1000, average=0.99),
    ),
    "images": Recipe(
        model=Model(path="google/gemma-3-4b-it", freeze=Freezing(vision_tower=True)),
        data=CordV2(),
        batching=Batching(packing=False, batch_size=2),
    ),
    "plain": Recipe(
        model=Model(path="Qwen/Qwen2.5-0.5B", weights="random", config={"num_hidden_layers": 40, "hidden_size": 896}),
        data=ChatData(path="./none.jsonl"),
        accel=False,
    ),
    "text with a model that sees": Recipe(
        model=Model(path="mistralai/Ministral-3-3B-Instruct-2512"), data=ChatData(path="./none.jsonl")
    ),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_tiny_trains_two_steps(recipe: Recipe, tmp_path: Path) -> None:
    found = dry_run(replace(recipe, output=tmp_path / "run"), tiny=True)
    assert errors(found) == {}
    plain = found.to_dict()
    rows = plain["tried"]["rows"]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert plain["model"]["parameters"] < 2e6
    assert plain["model"]["path"] == recipe.model.path
    assert plain["tried"]["images"] == recipe.has_images
    assert not (tmp_path / "run").exists()
    if isinstance(recipe.data, ChatData):
        assert ("data.path", "missing") in {(problem.where, problem.kind) for problem in found.problems}


def test_text_trains_a_model_that_is_always_given_with_its_tower(recipe: Recipe, tmp_path: Path) -> None:
    made = tiny_model("mistral3", "image_text_to_text")
    made.save_pretrained(tmp_path / "model")
    mixed = replace(recipe, model=Model(path=str(tmp_path / "model"), dtype="float32"), data=MockData(vocab_size=200))
    assert dry_run(mixed).to_dict()["model"]["class"] == "Mistral3ForConditionalGeneration"
    run = build(mixed, Mesh(shard=1).ranks())
    assert isinstance(run.model, type(made))
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        build(replace(mixed, model=replace(mixed.model, task="causal_lm")), Mesh(shard=1).ranks())


def test_the_trial_takes_what_the_recipe_asks_for(tmp_path: Path) -> None:
    tried = try_out(RECIPES["fp8, recompute"], tmp_path)
    assert tried.report is not None
    assert tried.report.plan.config.recompute == "selective"
    assert tried.report.plan.config.fp8 == "rowwise"
    assert next(tried.model.parameters()).dtype == torch.bfloat16
    assert tried.found.where == "its name"
    assert tried.rows[1]["lr"] != tried.rows[0]["lr"]


def test_a_wrong_recipe_is_wrong_with_a_tiny_model_too() -> None:
    recipe = replace(RECIPES["full"], lora=Lora(target_modules=("q_prj",)))
    assert "q_proj" in errors(dry_run(recipe, tiny=True))["tried"]


def test_a_type_that_there_is_not_is_said(tmp_path: Path) -> None:
    found = dry_run(replace(RECIPES["full"], model=Model(path="moonshotai/Kimi-VL-A3B-Instruct")), tiny=True)
    assert found.exit_code == 2
    assert "its type is 'kimi_vl', which transformers" in errors(found)["model.path"]


PAGE = Path(__file__).resolve().parents[2] / "docs" / "dry_run.md"
SCREEN = re.compile(r"^```text\n\$ automodel-accel (?P<command>.*)\n(?P<printed>(?:(?!```).*\n)*)```$", re.MULTILINE)
OF_MACHINE = re.compile(r"^accel .*\n(?: .*\n)*", re.MULTILINE)  # which kernels serve


def printed(command: str) -> str:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_screen_in_the_docs_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m tests.recipes.test_dry_run` writes it."""
    pytest.importorskip("gguf")
    monkeypatch.chdir(PAGE.parents[1])
    screen = SCREEN.search(PAGE.read_text(encoding="utf-8"))
    assert screen is not None
    shown, now = (OF_MACHINE.sub("", text) for text in (screen["printed"], printed(screen["command"])))
    assert shown == now


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_tiny_trains_every_family(name: str) -> None:
    sees = NAMED[name] in MAPPINGS["vlm"] and NAMED[name] not in MAPPINGS["causal"]
    data = CordV2() if sees else ChatData(path="./none.jsonl")
    targets = OTHER_TARGETS.get(NAMED[name], ("*_proj",))
    lora = Lora(r=8, target_modules=targets, exclude_modules=EXCLUDED)
    found = dry_run(Recipe(model=Model(path=name), data=data, lora=lora), tiny=True)
    assert errors(found) == {}
    assert found.to_dict()["tried"]["images"] == sees


if __name__ == "__main__":
    PAGE.write_text(
        SCREEN.sub(
            lambda screen: f"```text\n$ automodel-accel {screen['command']}\n{printed(screen['command'])}```",
            PAGE.read_text(encoding="utf-8"),
        ),
        encoding="utf-8",
    )
