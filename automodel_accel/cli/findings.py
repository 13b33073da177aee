"""What this machine offers, and what is missing."""

import importlib.metadata
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from automodel_accel.kernels.contract import Kernel, Spec, choose
from automodel_accel.kernels.facts import OPTIONAL_PACKAGES, Facts
from automodel_accel.tables import table

# the dependencies in pyproject.toml; a test compares them
MINIMUM: Mapping[str, str] = MappingProxyType(
    {
        "torch": "2.10",
        "triton": "3.6",
        "transformers": "5.10",
        "peft": "0.18",
        "accelerate": "1.10",
        "safetensors": "0.5",
        "typer": "0.12",
        "rich": "13",
        "tqdm": "4.60",
        "PyYAML": "6",
    }
)
ROWS_OF = MappingProxyType(
    {"rms_norm": 4096, "gated_linear": 14336, "linear_cross_entropy": 128256}
)  # those of Llama 3 8B


def examine(facts: Facts) -> tuple[str, list[str]]:
    """The findings as tables, and one sentence for each thing that is needed and not there."""
    versions = installed(MINIMUM)
    dtype = torch.float32 if facts.device == "cpu" else torch.bfloat16
    findings = (
        table("This machine", ("what", "is"), _machine_rows(facts)),
        table("Needed", ("package", "installed", "at least"), _version_rows(versions)),
        table(
            f"Kernels, as chosen for {str(dtype).removeprefix('torch.')} on {facts.device}",
            ("operation", "runs by", "why, and what was passed over"),
            _kernel_rows(facts, dtype),
        ),
        table("Optional", ("package", "installed", "brings"), _optional_rows(facts)),
    )
    return "\n".join(findings), problems(versions, facts)


def installed(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions by distribution name, None for what is missing."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def problems(versions: Mapping[str, str | None], facts: Facts) -> list[str]:
    """What is missing or too old, each with its remedy; Triton is only needed where there is a GPU."""
    from packaging.version import Version

    found = []
    for package, version in versions.items():
        remedy = f"pip install --upgrade '{package}>={MINIMUM[package]}'"
        if version is None and (package != "triton" or facts.device != "cpu"):
            found.append(f"{package} is missing: {remedy}")
        elif version is not None and Version(version) < Version(MINIMUM[package]):
            found.append(f"{package} {version} is too old, needs {MINIMUM[package]} or newer: {remedy}")
    return found


def _machine_rows(facts: Facts) -> list[tuple[str, str]]:
    return [
        ("Python", facts.python),
        ("torch", facts.torch),
        ("trains on", f"{facts.device}: {facts.device_name} ({facts.arch})"),
        ("memory", f"{facts.memory_bytes / 2**30:.1f} GiB"),
        ("threads" if facts.device == "cpu" else "multiprocessors", str(facts.processors)),
        ("Triton kernels", _triton(facts)),
    ]


def _triton(facts: Facts) -> str:
    if not facts.has("triton"):
        return "none: triton is not installed"
    if facts.device != "cpu":
        return "compiled for the GPU"
    return "in Triton's interpreter: right, but slow" if facts.triton_interpreter else "none: they need a GPU"


def _version_rows(versions: Mapping[str, str | None]) -> list[tuple[str, ...]]:
    return [(package, version or "missing", MINIMUM[package]) for package, version in versions.items()]


def _kernel_rows(facts: Facts, dtype: torch.dtype) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for kernel in _kernels():
        choice = choose(kernel, facts, Spec(facts.device, dtype, ROWS_OF[kernel.name]))
        refused = "; ".join(f"{no.what.removeprefix(kernel.name + ': ')}: {no.reason}" for no in choice.refused)
        said = "\n".join(filter(None, (choice.why, refused)))
        rows.append((kernel.name, choice.winner.name if choice.winner else "the original", said))
    return rows


def _kernels() -> tuple[Kernel, ...]:
    from automodel_accel.kernels import gated_linear, linear_cross_entropy, rms_norm

    return rms_norm.KERNEL, gated_linear.KERNEL, linear_cross_entropy.KERNEL


def _optional_rows(facts: Facts) -> list[tuple[str, ...]]:
    optional = {package: brings for package, brings in OPTIONAL_PACKAGES.items() if package not in MINIMUM}
    return [(package, facts.packages.get(package, "missing"), brings) for package, brings in optional.items()]
