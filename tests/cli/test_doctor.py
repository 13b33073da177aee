"""automodel-accel doctor, on this machine and on made-up ones."""

import dataclasses

import pytest
from typer.testing import CliRunner

from automodel_accel.cli import app, findings
from automodel_accel.cli.findings import MINIMUM, examine, problems
from automodel_accel.kernels.facts import OPTIONAL_PACKAGES, Facts, this_machine

H100 = Facts(
    python="3.12.3",
    torch="2.13.0+cu130",
    device="cuda",
    device_name="NVIDIA H100 80GB HBM3",
    arch="sm_90",
    memory_bytes=80 * 2**30,
    processors=132,
    triton_interpreter=False,
    packages={"triton": "3.7.1", "wandb": "0.30"},
)
LAPTOP = dataclasses.replace(H100, torch="2.13.0+cpu", device="cpu", device_name="CPU", arch="x86_64", packages={})
AS_ASKED = dict(MINIMUM)


def test_this_machine_is_fine() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith("Everything that is needed is here.")
    assert this_machine().torch in result.stdout


def test_a_missing_package_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MINIMUM", {**MINIMUM, "a-package-that-nobody-has": "1.0"})
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert (
        "a-package-that-nobody-has is missing: pip install --upgrade 'a-package-that-nobody-has>=1.0'" in result.stderr
    )


def test_every_optional_package_says_what_it_brings() -> None:
    flat = " ".join(examine(H100)[0].split())
    for package, brings in OPTIONAL_PACKAGES.items():
        assert package in flat
        assert package in MINIMUM or brings.split()[0] in flat
    assert "0.30" in flat  # the version of wandb there


def test_a_gpu_takes_triton_and_a_laptop_says_why_not() -> None:
    assert "passed over" in examine(H100)[0]
    assert "the package triton is not installed" not in examine(H100)[0]
    assert "the package triton is not installed" in " ".join(examine(LAPTOP)[0].split())


@pytest.mark.parametrize(
    ("facts", "change", "expected"),
    [
        (H100, {}, []),
        (H100, {"transformers": "5.9.1"}, ["transformers 5.9.1 is too old, needs 5.10 or newer"]),
        (H100, {"torch": "2.10.0+cu130"}, []),
        (H100, {"torch": "2.9.1", "peft": None}, ["torch 2.9.1 is too old", "peft is missing"]),
        (H100, {"triton": None}, ["triton is missing"]),
        (LAPTOP, {"triton": None}, []),
        (LAPTOP, {"triton": "3.5.1"}, ["triton 3.5.1 is too old"]),
    ],
)
def test_versions_against_the_minimum(facts: Facts, change: dict[str, str | None], expected: list[str]) -> None:
    found = problems({**AS_ASKED, **change}, facts)
    assert len(found) == len(expected)
    assert all(sentence in problem for sentence, problem in zip(expected, found, strict=True))


@pytest.mark.parametrize("columns", [80, 120])
def test_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    widest = max(map(len, examine(H100)[0].splitlines()))
    assert columns // 2 < widest <= columns
