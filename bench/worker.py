"""The process that measures: one variant, imported here and nowhere else.

Reads requests as lines of JSON and answers each with a line of JSON, until its input ends. An error ends the process, and its last
line says why: whoever asked goes on without it.
"""

import json
import math
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from automodel_accel.kernels.facts import this_machine
from bench.case import Case, Forward, Inputs, UnsupportedError, as_tuple, backward, leaves, make_inputs
from bench.measure import copy_bytes_per_second, matmul_flops_per_second, measure
from bench.operations import OPERATIONS
from bench.peers import PEERS

# sizes at which an operation is held against its truth: small, and what every library's kernels take
TRIED: dict[str, int | float] = {
    "tokens": 128,
    "hidden": 256,
    "intermediate": 512,
    "vocab": 2048,
    "heads": 8,
    "key_heads": 4,
    "in_features": 256,
    "out_features": 512,
    "out_features_2": 256,
    "out_features_3": 256,
}
COMPILE = "compile"  # eager's own code, which is tried as such: to compile it for one more size takes longer than to measure it
WRONG = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # not a rounding: another operation


def answer(request: dict[str, Any], tried: dict[str, float]) -> dict[str, Any]:
    """Measure what a request asks for; `tried` remembers what was held against its truth."""
    device = "cuda" if this_machine().device == "cuda" else "cpu"
    if "rates" in request:
        dtype = getattr(torch, request["rates"])
        flops = matmul_flops_per_second(device, dtype)
        return {"copy_bytes_per_second": copy_bytes_per_second(device), "matmul_flops_per_second": flops}
    case = Case(**request["case"])
    peer, operation, dtype = PEERS[request["peer"]], OPERATIONS[case.operation], getattr(torch, case.dtype)
    forward = peer.forward(case.operation)
    try:
        key = json.dumps([case.operation, dict(case.options), case.dtype])
        if key not in tried and peer.name != COMPILE:
            tried[key] = error(peer.forward(case.operation), case, device)
        if tried.get(key, 0.0) > (operation.wrong or WRONG[dtype]):
            return {"refused": f"computes something else: its error is {tried[key]:.2g} of the largest value"}
        if peer.compiles:
            torch.compiler.reset()  # past a few shapes of one function, torch.compile leaves it to eager
        inputs = make_inputs(operation, case.sizes, case.options, dtype, device)
        found = measure(forward, inputs, request["seconds"], request["memory"], peer.compiles or operation.builds)
    except UnsupportedError as unsupported:
        return {"refused": str(unsupported)}
    if device == "cuda":
        del inputs
        torch.cuda.empty_cache()
    return {**asdict(found), "error": tried.get(key)}


def error(forward: Forward, case: Case, device: str) -> float:
    """Largest error of outputs and gradients at a small size, as a share of the largest true value; the truth is eager in float64."""
    operation, dtype = OPERATIONS[case.operation], getattr(torch, case.dtype)
    sizes = {name: min(size, TRIED.get(name, size)) for name, size in case.sizes.items()}
    if "key_heads" in sizes:
        sizes["heads"] = sizes["key_heads"] * max(1, int(case.sizes["heads"] // case.sizes["key_heads"]))
    small = replace(case, sizes=sizes)
    inputs = make_inputs(operation, small.sizes, small.options, dtype, device)
    truth = {name: _wide(value) for name, value in inputs.items()}
    found, expected = _results(forward, inputs), _results(PEERS["eager"].forward(case.operation), truth)
    if found.keys() != expected.keys():
        return math.inf  # an output or a gradient is missing
    return max(_difference(found[name], true) for name, true in expected.items())


def _difference(found: torch.Tensor, true: torch.Tensor) -> float:
    difference = float((found.double() - true).abs().max() / true.abs().max().clamp_min(1e-30))
    return math.inf if math.isnan(difference) else difference


def _wide(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _results(forward: Forward, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The outputs by number, and the gradients by name."""
    outputs = as_tuple(forward(inputs))
    found = {str(number): output.detach().clone() for number, output in enumerate(outputs)}
    backward(outputs, tuple(grad.clone() for grad in inputs["grads"]))
    gradients = {name: tensor.grad for name, tensor in leaves(inputs).items()}
    return found | {name: grad for name, grad in gradients.items() if grad is not None}


def main() -> None:
    """Answer requests until there are no more."""
    tried: dict[str, float] = {}
    for line in sys.stdin:
        sys.stdout.write(f"ANSWER {json.dumps(answer(json.loads(line), tried))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
