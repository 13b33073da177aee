"""The command line of `automodel_accel.run`, and that a script behaves under it as under plain python."""

import json
import re
from pathlib import Path

import pytest

from automodel_accel.config import AccelConfig
from automodel_accel.run import HELP, SETTINGS, parse
from tests.loops.processes import RUN, SCRIPTS, python

BEHAVES = SCRIPTS / "behaves.py"
NO_MODEL = "no Hugging Face model was trained or called in this process; nothing was swapped."


def test_words_of_the_script_are_its_own() -> None:
    own = ["--lr=1e-4", "-x", "", "--", "--accel.norm=false", "a b"]
    command = parse(["--accel.mlp=false", "train.py", *own[:2], "--accel.recompute=selective", *own[2:]])
    assert command is not None
    assert (command.target, command.is_module, command.arguments) == ("train.py", False, own)
    assert command.settings == AccelConfig(mlp=False, recompute="selective")
    assert command.report is None


def test_module() -> None:
    command = parse(["--accel.norm=torch", "-m", "package.module", "-m", "x"])
    assert command is not None
    assert (command.target, command.is_module, command.arguments) == ("package.module", True, ["-m", "x"])
    assert command.settings == AccelConfig(norm="torch")


def test_patterns_are_no_yaml() -> None:
    command = parse(["--accel.fp8=tensorwise", "--accel.fp8_layers=*.mlp.*,*.o_proj", "train.py"])
    assert command is not None
    assert command.settings == AccelConfig(fp8="tensorwise", fp8_layers=("*.mlp.*", "*.o_proj"))


def test_single_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "accel.yaml"
    file.write_text("mlp: false\nnorm: torch\nstrict: true\n")
    command = parse(["train.py", "--accel.norm=off", f"--accel.config={file}", "--accel.recompute=null"])
    assert command is not None
    assert command.settings == AccelConfig(mlp=False, norm=False, strict=True)


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--help"]) is None
    assert parse(["--accel.mlp=false", "-h"]) is None
    command = parse(["train.py", "--help"])
    assert command is not None
    assert command.arguments == ["--help"], "after the script it is the script's"
    assert [name for name in SETTINGS if name not in HELP] == []


BAD = {
    "no script": ([], "no script was given"),
    "no module": (["-m"], "no module was given"),
    "another option": (["--mlp=false", "train.py"], "unknown option '--mlp=false' before the script"),
    "misspelt": (["train.py", "--accel.nrom=torch"], "unknown option '--accel.nrom'. Did you mean '--accel.norm'?"),
    "no value": (["train.py", "--accel.norm", "torch"], "--accel.norm: expected --accel.norm=VALUE"),
    "empty value": (["train.py", "--accel.norm="], "--accel.norm: expected --accel.norm=VALUE"),
    "wrong type": (["train.py", "--accel.strict=maybe"], "strict='maybe': expected True or False"),
    "not yaml": (["train.py", "--accel.norm={"], "--accel.norm={: not a YAML value"),
    "unknown mode": (["train.py", "--accel.recompute=selectiv"], "Did you mean 'selective'?"),
    "implementation": (["train.py", "--accel.norm=trition"], "for norm 'trition'. Did you mean 'triton'?"),
    "of any": (["train.py", "--accel.implementation=tritn"], "unknown implementation 'tritn'. Did you mean 'triton'?"),
    "no such file": (["train.py", "--accel.config=none.yaml"], "--accel.config=none.yaml: [Errno 2]"),
    "no such folder": (["train.py", "--accel.report=no/such/r.json"], "expected a file in a folder that exists"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=list(BAD))
def test_bad_option(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(words)


@pytest.mark.parametrize(
    ("text", "said"),
    [("mpl: false", "Did you mean 'mlp'?"), ("- mlp", "got list"), ("{", "while parsing"), ("", "NoneType")],
)
def test_bad_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "accel.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(f'--accel.config={file}: ')}(.|\n)*{re.escape(said)}"):
        parse([f"--accel.config={file}", "train.py"])


def test_bad_option_stops_before_the_script() -> None:
    found = python(*RUN, BEHAVES, "--accel.mpl=false")
    assert (found.code, found.output) == (2, "")
    assert found.errors.startswith(
        "automodel_accel.run: error: unknown option '--accel.mpl'. Did you mean '--accel.mlp'?"
    )


@pytest.mark.parametrize("end", ["well", "code", "text", "error", "hook", "interrupt", "optimizer"])
def test_script_behaves_as_under_python(end: str, tmp_path: Path) -> None:
    words, report = [BEHAVES, "--end", end, "--x=1", "--", "--accel.y=1"], tmp_path / "report.json"
    plain, ours = python(*words), python(*RUN, f"--accel.report={report}", *words)
    assert (ours.code, ours.output, ours.errors) == (plain.code, plain.output, plain.errors)
    assert "mind the gap" in plain.errors
    assert plain.output.endswith("at exit, in __main__\n")
    assert ours.lines == ((NO_MODEL,) if end == "well" else ())
    assert json.loads(report.read_text()) == [], "written whatever the end"


def test_module_behaves_as_under_python() -> None:
    words = ["-m", ".".join(BEHAVES.with_suffix("").parts), "--end", "error"]
    plain, ours = python(*words), python(*RUN, *words)
    assert (ours.code, ours.output, ours.errors) == (plain.code, plain.output, plain.errors)
    assert "tests.loops.scripts.behaves" in plain.output


def test_script_that_cannot_be_read_or_parsed(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("x = 1\nif x\n    pass\n")
    for words, code in ((tmp_path / "none.py",), 2), (("-m", "no.such.module"), 1), ((wrong,), 1):
        plain, ours = python(*words), python(*RUN, *words)
        assert plain.code == code
        assert (ours.code, ours.output, ours.errors) == (plain.code, plain.output, plain.errors)


def test_start_costs_below_a_second(tmp_path: Path) -> None:
    """Processor time of a script that imports torch, with what we add to it; the best of three."""
    script = tmp_path / "script.py"
    script.write_text("import json, sys, torch\nprint(json.dumps([name.split('.')[0] for name in sys.modules]))\n")
    plain = min(python(script).processor_seconds for _ in range(3))
    runs = [python(*RUN, script) for _ in range(3)]
    ours = min(run.processor_seconds for run in runs)
    assert ours - plain < 1.0, f"{plain:.2f} s by python, {ours:.2f} s by automodel_accel.run"
    brought = set(json.loads(runs[0].output))
    assert brought.isdisjoint({"transformers", "triton", "accelerate", "peft", "typer", "rich"})
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"], "nothing is cached beside a script"
