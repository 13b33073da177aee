"""automodel-accel eval, generate and export: of a model, of an adapter, of a run and of its checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from automodel_accel.cli import app
from automodel_accel.recipes.recipe import load
from automodel_accel.recipes.running import run_recipe
from tests.data.tokenizers_made import made

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
    for word in ("yes", "no", "perhaps", "never", "always", "today")
]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = made(TEMPLATE)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["full", "lora"])
def a_run(request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param
    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {
        "model": {"path": str(model_folder)},
        "data": {"kind": "chat", "path": str(rows)},
        "validation": {"same": {"kind": "chat", "path": str(rows)}},
        "batching": {"seq_length": 64},
        "lora": {"r": 4} if request.param == "lora" else None,
        "optimizer": {"lr": 1e-2},
        "training": {"steps": 4, "global_batch_size": 2},
        "checkpoint": {"every": 2},
        "output": str(folder),
    }
    path = folder.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: one for name, one in recipe.items() if one is not None}))
    chosen = load(path)
    run_recipe(chosen, chosen.mesh.ranks(), said=lambda text: None)
    return folder


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "validation.jsonl").read_text().splitlines()
    return {row["step"]: row["val_loss"] for row in map(json.loads, lines)}


def measured(*arguments: object) -> dict[str, Any]:
    result = run("eval", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_eval_measures_what_the_run_has_validated(a_run: Path) -> None:
    found = measured(a_run)["same"]
    assert found["loss"] == pytest.approx(losses(a_run)[4], abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert measured(a_run, "--base")["same"]["loss"] == pytest.approx(losses(a_run)[0], abs=1e-5)
    assert losses(a_run)[0] - found["loss"] > 0.05
    middle = measured(a_run, "--step", 2)["same"]["loss"]
    assert found["loss"] < middle < losses(a_run)[0]


def test_an_exported_folder_is_what_transformers_writes(a_run: Path, tmp_path: Path) -> None:
    result = run("export", a_run, "--to", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    ours, theirs = ({path.name for path in (tmp_path / name).iterdir()} for name in ("merged", "theirs"))
    assert ours - theirs == {"README.md"}
    assert theirs <= ours
    tensors = []
    for name in ("merged", "theirs"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            tensors.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 - no mapping
    assert {key: (one.shape, one.dtype) for key, one in tensors[0].items()} == {
        key: (one.shape, one.dtype) for key, one in tensors[1].items()
    }
    assert tokenizer.chat_template == TEMPLATE
    data = ["--data.kind=chat", f"--data.path={a_run.parent / 'rows.jsonl'}", "--seq-length", 64]
    assert measured(tmp_path / "merged", *data)["data"]["loss"] == pytest.approx(losses(a_run)[4], abs=1e-5)


def test_an_adapter_of_a_step_is_one_for_peft(a_run: Path, model_folder: Path, tmp_path: Path) -> None:
    result = run("export", a_run, "--step", 2, "--adapter", "--to", tmp_path / "adapter")
    if a_run.name == "full":
        assert result.exit_code == 2
        assert "has no adapter" in result.stderr
        return
    assert result.exit_code == 0, result.output
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert PeftModel.from_pretrained(base, tmp_path / "adapter").peft_config["default"].r == 4  # type: ignore[arg-type]
    data = ["--data.kind=chat", f"--data.path={a_run.parent / 'rows.jsonl'}", "--seq-length", 64]
    of_adapter = measured(tmp_path / "adapter", *data)["data"]["loss"]
    assert of_adapter == pytest.approx(measured(a_run, "--step", 2)["same"]["loss"], abs=1e-5)


def test_generate_goes_by_the_chat_template(a_run: Path, model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    inputs = tokenizer("<|im_start|>user\nsay yes<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    result = run("generate", a_run, "--base", "--prompt", "say yes", "--max-new-tokens", 5, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"prompt": "say yes", "answer": expected}
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "say yes"}\n{"messages": [{"role": "user", "content": "say no"}]}\n')
    drawn = ["--temperature", 1, "--seed", 3, "--max-new-tokens", 8, "--json"]
    first, second = (run("generate", a_run, "--prompts", asked, *drawn).stdout for _ in range(2))
    assert first == second
    assert len(first.splitlines()) == 2
    streamed = run("generate", a_run, "--base", "--prompt", "say yes", "--max-new-tokens", 5)
    assert streamed.stdout.strip() == expected.strip()


def test_hellaswag_is_asked_as_the_harness_asks_it(model_folder: Path, tmp_path: Path) -> None:
    rows = [
        {
            "activity_label": "Walking",
            "ctx_a": "A man [step] walks.",
            "ctx_b": "he",
            "endings": ["runs fast", "sits [title] down", "stands", "sings a very long song"],
            "label": label,
        }
        for label in ("0", 3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "label": str(row["label"])}) + "\n" for row in rows))
    found = measured(model_folder, "--task", "hellaswag", f"--data.path={path}", "--batch-size", 3)["hellaswag"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    scores = []
    for ending in ("runs fast", "sits.  down".replace("  ", " "), "stands", "sings a very long song"):
        context = tokenizer("Walking: A man walks. He")["input_ids"]
        both = tokenizer(f"Walking: A man walks. He {ending}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(both).logits[0].float().log_softmax(-1)
        own = [logs[at - 1, both[0, at]].item() for at in range(len(context), both.shape[1])]
        scores.append((sum(own), sum(own) / len(ending)))
    best = [max(range(4), key=lambda at: scores[at][way]) for way in (0, 1)]
    assert found["acc"] == sum(best[0] == label for label in (0, 3)) / 2
    assert found["acc_norm"] == sum(best[1] == label for label in (0, 3)) / 2
    assert found["questions"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eval", "{model}"), "has no validation data of its own"),
        (("eval", "{model}", "--task", "mmlu"), "expected loss or hellaswag"),
        (("eval", "{model}", "--step", "3"), "a step is of a run's folder"),
        (("eval", "{model}", "--data.kind=chat", "--data.pth=x"), "unknown key 'pth'"),
        (("eval", "./nowhere"), "does not exist"),
        (("generate", "{model}"), "nothing is asked"),
        (("generate", "{model}", "--prompts", "nowhere.jsonl"), "No such file"),
        (("export", "{model}", "--to", "{model}"), "is there already and not empty"),
        (("export", "{model}", "--to", "new", "--dtype", "int3"), "expected bfloat16"),
    ],
)
def test_wrong_input_is_one_sentence(model_folder: Path, arguments: tuple[str, ...], said: str) -> None:
    result = run(*(one.format(model=model_folder) for one in arguments))
    assert result.exit_code == 2, result.output
    assert said in result.stderr
