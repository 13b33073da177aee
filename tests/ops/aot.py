"""Compile kernels ahead of time and report what the machine code needs: `python -m tests.ops.aot OPERATION` writes JSON lines.

Run in a process of its own with TRITON_INTERPRET unset: Triton either interprets or compiles, for the whole life of a process.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from automodel_accel.kernels import launch
from tests.ops.aot_cases import CASES, AotCase

TARGETS = (
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
)
EIGHT_BIT_CAST = re.compile(r"cvt\.rn\.\S*e[45]m[23]x2\S*|v_cvt_\S*pk_(?:fp8|bf8)_f32")


def name_of(target: GPUTarget) -> str:
    """Such as "sm_90" or "gfx942"."""
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A driver without a device: it names the target to compile for."""

    index: int

    def get_current_device(self) -> int:
        """One number a target: Triton keeps one cache for each."""
        return self.index

    def get_current_stream(self, device: int) -> int:
        """Never used: nothing is launched."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return TARGETS[self.index]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel of one case needs on one target.

    Attributes:
        threads: Of one program.
        registers: Of one thread.
        spilled: Bytes of stack and local memory of a thread (NVIDIA), or spilled registers (AMD).
        shared: Bytes of shared memory of a program.
        widest: Widest access to global memory, in bytes.
        narrow: How many accesses to global memory take 2 bytes or less.
        eight_bit_casts: Instructions that round to 8 bits.
        short_products: Sizes and strides that the kernel multiplies in 32 bits, which overflows past 2^31 elements.
    """

    case: str
    kernel: str
    target: str
    threads: int
    registers: int
    spilled: int
    shared: int
    widest: int
    narrow: int
    eight_bit_casts: list[str]
    short_products: list[str]
    programs_per_processor: int
    may_spill: bool
    single_values: int


def compile_case(case: AotCase, index: int) -> list[Compiled]:
    """Record the launches of a case, compiled for one target."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    driver.set_active(Machine(index))
    launch.WARP_LANES = TARGETS[index].warp_size
    JITFunction.run = compile_only
    try:
        case.launch()
    finally:
        JITFunction.run = run
    return [_measured(case, TARGETS[index], kernel) for kernel in kernels]


def _measured(case: AotCase, target: GPUTarget, kernel: Any) -> Compiled:
    registers, spilled = (
        _cuda_usage(kernel.asm["cubin"]) if target.backend == "cuda" else _hip_usage(kernel.asm["amdgcn"])
    )
    widths = _cuda_widths(kernel.asm["ptx"]) if target.backend == "cuda" else _hip_widths(kernel.asm["amdgcn"])
    return Compiled(
        case=case.name,
        kernel=kernel.metadata.name,
        target=name_of(target),
        threads=kernel.metadata.num_warps * target.warp_size,
        registers=registers,
        spilled=spilled,
        shared=kernel.metadata.shared,
        widest=max(widths, default=0),
        narrow=sum(width <= 2 for width in widths),
        eight_bit_casts=sorted(
            set(EIGHT_BIT_CAST.findall(kernel.asm["ptx" if target.backend == "cuda" else "amdgcn"]))
        ),
        short_products=_short_products(kernel.asm["ttir"]),
        programs_per_processor=case.programs_per_processor,
        may_spill=case.may_spill,
        single_values=case.single_values,
    )


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert found is not None, listing
    return int(found[1]), int(found[2]) + int(found[3])


def _hip_usage(amdgcn: str) -> tuple[int, int]:
    registers, spilled = (re.search(rf"\.{name}:\s+(\d+)", amdgcn) for name in ("vgpr_count", "vgpr_spill_count"))
    assert registers is not None
    assert spilled is not None
    return int(registers[1]), int(spilled[1])


def _cuda_widths(ptx: str) -> list[int]:
    plain = re.findall(r"(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)", ptx)
    asynchronous = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(0x[0-9a-f]+|\d+)", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in plain] + [int(size, 0) for size in asynchronous]


def _hip_widths(amdgcn: str) -> list[int]:
    words = re.findall(r"(?:global|buffer)_(?:load|store)_(dwordx(\d)|dword|[su]?short\w*|[su]?byte\w*)", amdgcn)
    return [4 * int(count or 1) if name.startswith("dword") else 2 for name, count in words]


def _short_products(ttir: str) -> list[str]:
    sizes = set(re.findall(r"%(\w+): i32", ttir))
    tensors = {name: size for name, size in re.findall(r"%(\w+) = tt\.splat %(\w+) : i32", ttir) if size in sizes}
    named = {**{size: size for size in sizes}, **tensors}
    factors = re.findall(r"arith\.muli %(\w+), %(\w+) : (?:i32|tensor<[\dx]+xi32>)", ttir)
    return sorted({named[factor] for pair in factors for factor in pair if factor in named})


def main(operation: str) -> None:
    """Compile every case of one operation for every target of its own."""
    for case in CASES[operation]:
        for index, target in enumerate(TARGETS):
            if case.targets and name_of(target) not in case.targets:
                continue
            for compiled in compile_case(case, index):
                sys.stdout.write(json.dumps(dataclasses.asdict(compiled)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
