"""automodel-accel plan: what it prints, and what it says to wrong input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from automodel_accel.cli import app

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "dtype": "bfloat16",
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


@pytest.fixture
def llama(folder: Path) -> str:
    return str(folder)


def test_prints_the_tables(llama: str) -> None:
    result = run(llama)
    assert result.exit_code == 0, result.output
    assert "Plan for LlamaForCausalLM" in result.stdout
    assert all(fusion in result.stdout for fusion in ("norm", "mlp", "loss"))


@pytest.mark.parametrize("columns", [80, 120])
def test_fits_the_terminal(llama: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    widest = max(map(len, run(llama).stdout.splitlines()))
    assert columns // 2 < widest <= columns


def test_json_has_every_place_in_the_dtype_of_the_config(llama: str) -> None:
    found = json.loads(run(llama, "--json").stdout)
    assert found["model"] == "LlamaForCausalLM"
    assert sorted(claim["fusion"] for claim in found["claims"]) == sorted(
        ["loss", *["mlp", "rope", "residual"] * 2, *["attention"] * 3, *["linear"] * 4, *["norm"] * 5]
    )
    of_parameters = [claim for claim in found["claims"] if "masks" not in claim["recognised_as"]]
    assert {claim["dtype"] for claim in of_parameters} == {"torch.bfloat16"}


def test_a_config_file_is_as_good_as_its_folder(folder: Path) -> None:
    assert run(str(folder / "config.json")).stdout == run(str(folder)).stdout


def test_settings_are_those_of_accel_config(llama: str) -> None:
    off = [word for name in ("norm", "rope", "attention", "residual") for word in ("--set", f"{name}=False")]
    found = json.loads(run(llama, "--json", *off, "--set", "mlp=torch").stdout)
    assert {claim["fusion"] for claim in found["claims"]} == {"mlp", "loss", "linear"}


def test_takes_the_class_that_the_config_names(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}))
    assert "Plan for LlamaForSequenceClassification" in run(str(folder)).stdout


@pytest.mark.parametrize("model_type", ["llava", "t5", "vit"])  # with images, with two towers, with no head for text
def test_serves_other_kinds_than_causal_models(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    result = run(str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"].lower().startswith(model_type)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"model_type": "lama"}', "knows no model type 'lama'; a newer one may. Did you mean 'llama'?"),
        ('{"hidden_size": 8}', "expected a JSON object with a model_type"),
        ("[]", "expected a JSON object with a model_type"),
        ('{"model_type": ["llama"]}', "expected a JSON object with a model_type"),
        ('{"model_type": "llama"', "is not valid JSON"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "expected int, got str"),
        ('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}', "trust_remote_code=True"),
    ],
)
def test_a_wrong_config_is_one_sentence(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(content)
    result = run(str(tmp_path))
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["./nowhere"], "no such file or folder"),
        (["nowhere.json"], "no such file or folder"),
        (["some-org/no-such-model"], "no folder of that name here, and no config from the hub"),
        (["{llama}", "--set", "nrom=False"], "Did you mean 'norm'?"),
        (["{llama}", "--set", "norm"], "expected NAME=VALUE"),
        (["{llama}", "--set", "norm=tritn"], "unknown implementation for norm 'tritn'"),
    ],
)
def test_wrong_arguments_are_one_sentence(llama: str, arguments: list[str], expected: str) -> None:
    result = run(*(argument.format(llama=llama) for argument in arguments))
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    result = run(str(tmp_path))
    assert result.exit_code == 2
    assert "the folder has no config.json" in result.stderr


def test_runs_as_a_module_and_prints_json_alone_when_piped(llama: str) -> None:
    command = [sys.executable, "-m", "automodel_accel", "plan", llama, "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(printed.stdout)["model"] == "LlamaForCausalLM"


MESH = ("--mesh", "shard=4", "--seq-len", "128")


def test_a_mesh_prints_memory_and_traffic(llama: str) -> None:
    result = run(llama, *MESH, "--memory", "80", "--bandwidth", "shard=50", "--explain")
    assert result.exit_code == 0, result.output
    for words in (
        "Memory of one GPU",
        "backward of the last layer",
        "reduce-scatter",
        "It fits on GPUs of 80 GiB",
        "b (Q + C K",
    ):
        assert words in result.stdout


def test_what_does_not_fit_says_what_would(llama: str) -> None:
    most = json.loads(run(llama, *MESH, "--json").stdout)["peak_bytes"]
    least = json.loads(run(llama, *MESH, "--recompute", "full", "--json").stdout)["peak_bytes"]
    assert least < most
    given = (*MESH, "--memory", str((most + least) / 2 / 2**30), "--reserve", "0")
    assert run(llama, *given).exit_code == 0
    failed = run(llama, *given, "--fail", "--json")
    assert failed.exit_code == 1
    found = json.loads(failed.stdout)
    assert not found["fits"]
    assert found["would_fit"].startswith("--mesh shard=4 --recompute")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--mesh", "shrad=4"), "Did you mean 'shard'?"),
        (("--mesh", "shard=-1"), "give a size"),
        (("--mesh", "shard=0"), "expected a number of ranks"),
        (("--mesh", "shard=2,tensor=3"), "cannot be cut over 3 tensor ranks"),
        (("--mesh", "shard=2", "--dtype", "bf16"), "--dtype"),
        (("--mesh", "shard=2", "--optimizer", "adam"), "optimizer"),
        (("--mesh", "shard=2", "--seq-len", "0"), "expected 1 or more"),
        (("--mesh", "context=3", "--seq-len", "64"), "cannot be cut evenly"),
        (("--mesh", "shard=2", "--bandwidth", "shard=fast"), "GB a second"),
    ],
)
def test_a_wrong_mesh_is_one_sentence(llama: str, arguments: tuple[str, ...], expected: str) -> None:
    result = run(llama, *arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
