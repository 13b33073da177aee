"""Facts: what this machine and these package versions are.

Every decision of the project takes a `Facts` as an argument, so that it can be tested on a made-up machine. This file is
the only one that reads environment variables or looks for optional packages.
"""

import functools
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

# package -> what it brings; found once here, imported only where it is used
OPTIONAL_PACKAGES: Mapping[str, str] = MappingProxyType(
    {
        "triton": "fused kernels on NVIDIA and AMD GPUs",
        "transformer-engine": "norms, the loss of logits and FP8 linears by NVIDIA's kernels",
        "flash-attn": "attention by FlashAttention-2",
        "flash-attn-3": "attention by FlashAttention-3, on Hopper",
        "flash-attn-4": "attention by FlashAttention-4, on Hopper and Blackwell",
        "liger-kernel": "norms and gated activations by Liger's Triton kernels",
        "bitsandbytes": "8-bit and 4-bit base models, as transformers loads them",
        "megatron-fsdp": 'parameters over GPUs by Megatron-FSDP: Mesh(strategy="megatron_fsdp")',
        "datasets": "rows of a data set, from the hub or from files",
        "wandb": "figures of a run at Weights & Biases",
        "tensorboard": "figures of a run in TensorBoard",
        "mlflow": "figures of a run in MLflow",
        "matplotlib": "loss curves as pictures",
    }
)
# top module of a distribution that is not named after it, and what must lie inside of one that several distributions share
_MODULES: Mapping[str, str] = MappingProxyType({"flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn"})
_INSIDE: Mapping[str, str] = MappingProxyType({"flash-attn": "flash_attn_interface.py", "flash-attn-4": "cute"})


@dataclass(frozen=True, slots=True)
class Facts:
    """One machine, frozen.

    Attributes:
        python: Version of Python, such as "3.11.7".
        torch: Version of torch, such as "2.13.0+cpu".
        device: Torch device type on which training would run here: "cuda" (NVIDIA and AMD), "xpu" or "cpu".
        device_name: What the vendor calls it.
        arch: "sm_90", "gfx942", or the processor's architecture.
        memory_bytes: Memory of that device, in bytes.
        processors: Streaming multiprocessors of a GPU, or threads that torch uses on a CPU.
        triton_interpreter: Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), on the CPU.
        packages: Optional packages that are installed: name -> version.
    """

    python: str
    torch: str
    device: str
    device_name: str
    arch: str
    memory_bytes: int
    processors: int
    triton_interpreter: bool
    packages: Mapping[str, str]

    def has(self, package: str) -> bool:
        """Whether the optional package of that distribution name is installed."""
        return package in self.packages


@functools.cache
def this_machine() -> Facts:
    """The facts of the machine this process runs on, found once."""
    device = _device_type()
    name, arch, memory, processors = _device(device)
    return Facts(
        python=platform.python_version(),
        torch=torch.__version__,
        device=device,
        device_name=name,
        arch=arch,
        memory_bytes=memory,
        processors=processors,
        triton_interpreter=os.environ.get("TRITON_INTERPRET", "") not in ("", "0"),
        packages=MappingProxyType(_installed(OPTIONAL_PACKAGES)),
    )


def environment() -> Mapping[str, str]:
    """The environment variables of this process, as they are now."""
    return MappingProxyType(dict(os.environ))


def _device_type() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "xpu" if torch.xpu.is_available() else "cpu"


def _device(device: str) -> tuple[str, str, int, int]:
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        major, minor = torch.cuda.get_device_capability()
        arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{major}{minor}"
        return properties.name, arch, properties.total_memory, properties.multi_processor_count
    if device == "xpu":
        xpu = torch.xpu.get_device_properties()
        return xpu.name, "xpu", xpu.total_memory, xpu.max_compute_units
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return platform.processor() or "CPU", platform.machine(), memory, torch.get_num_threads()


def _installed(names: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name in names:
        if _is_installed(name):
            found[name] = _version(name)
    return found


def _is_installed(distribution: str) -> bool:
    spec = importlib.util.find_spec(_MODULES.get(distribution, distribution.replace("-", "_")))
    inside = _INSIDE.get(distribution)
    if spec is None or inside is None:
        return spec is not None
    return any((Path(folder) / inside).exists() for folder in spec.submodule_search_locations or ())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"
