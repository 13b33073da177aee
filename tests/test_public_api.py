"""Public names and signatures, against the snapshot public_api.txt beside this file.

python -m tests.test_public_api > tests/public_api.txt
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import automodel_accel
import automodel_accel.kernels.gated_linear
import automodel_accel.kernels.linear_cross_entropy
import automodel_accel.kernels.rms_norm
from automodel_accel.kernels import contract, facts
from automodel_accel.plan import Plan
from automodel_accel.report import Report

SNAPSHOT = Path(__file__).with_name("public_api.txt")
OPERATIONS = (
    automodel_accel.kernels.rms_norm.rms_norm,
    automodel_accel.kernels.gated_linear.gated_linear,
    automodel_accel.kernels.linear_cross_entropy.linear_cross_entropy,
)
CLASSES = (
    automodel_accel.AccelConfig,
    Plan,
    Report,
    facts.Facts,
    contract.Spec,
    contract.Refusal,
    contract.Implementation,
    contract.Choice,
    contract.Kernel,
)


def signature(of: Any) -> str:
    """Names, kinds and defaults of the parameters; how annotations are printed depends on Python's version."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in inspect.signature(of).parameters.values()
    ]
    return str(inspect.Signature(parameters))


def members(kind: type) -> Iterator[str]:
    """Public methods and properties that a class defines itself."""
    for name, member in vars(kind).items():
        if isinstance(member, property):
            yield f"{kind.__name__}.{name}"
        elif not name.startswith("_") and callable(getattr(kind, name)):
            yield f"{kind.__name__}.{name}{signature(getattr(kind, name))}"


def public_api() -> list[str]:
    lines = [f"automodel_accel.{name}" for name in automodel_accel.__all__]
    functions = (getattr(automodel_accel, name) for name in automodel_accel.__all__)
    lines += [f"{of.__name__}{signature(of)}" for of in (*functions, *OPERATIONS) if inspect.isfunction(of)]
    for kind in CLASSES:
        lines += [f"{kind.__name__}{signature(kind.__init__)}", *members(kind)]
    return sorted(lines)


def test_the_public_api_is_as_recorded() -> None:
    recorded, now = set(SNAPSHOT.read_text(encoding="utf-8").splitlines()), set(public_api())
    assert now == recorded, (
        f"gone: {sorted(recorded - now)}; new: {sorted(now - recorded)}. Where that is meant: an entry in CHANGELOG.md, then "
        "python -m tests.test_public_api > tests/public_api.txt"
    )


def test_every_public_function_says_what_it_does() -> None:
    for name in automodel_accel.__all__:
        assert inspect.getdoc(getattr(automodel_accel, name)), f"{name} has no docstring"


if __name__ == "__main__":
    print(*public_api(), sep="\n")  # noqa: T201 - writes the snapshot
