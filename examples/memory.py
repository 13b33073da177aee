"""How much memory a training process takes, in bytes: of the GPU by tensors, of the CPU by the whole process."""

import resource
import sys
from pathlib import Path

import torch


def memory_in_use(device: torch.device) -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _process_memory("VmRSS")


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use since the process began."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_memory("VmHWM")


def _process_memory(field: str) -> int:
    # Linux: getrusage would count in the parent process, and knows the peak alone
    status = Path("/proc/self/status")
    if status.exists():
        line = next(
            line for line in status.read_text(encoding="ascii", errors="replace").splitlines() if line.startswith(field)
        )
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
