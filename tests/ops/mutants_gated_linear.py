"""Plausible mistakes in gated_linear: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "gated_linear/fused.py"
EAGER = "gated_linear/eager.py"
HOST = "gated_linear/__init__.py"

FORWARD = (
    Mutant(
        FUSED, "y = activated.to(GATE.dtype.element_ty).to(tl.float32) * up", "y = activated * up", "rounds once only"
    ),
    Mutant(FUSED, "y = activated.to(GATE.dtype.element_ty).to(tl.float32) * up", "y = activated + up", "up added"),
    Mutant(FUSED, "activated, _ = activate", "_, activated = activate", "derivative for the activation"),
    Mutant(
        FUSED,
        "        gate_NF.stride(0),\n        up_NF.stride(0),\n        y_NF",
        "        n_cols,\n        up_NF.stride(0),\n        y_NF",
        "takes the gate for contiguous",
    ),
    Mutant(
        FUSED,
        "        gate_NF.stride(0),\n        up_NF.stride(0),\n        y_NF",
        "        gate_NF.stride(0),\n        gate_NF.stride(0),\n        y_NF",
        "stride of the gate for up",
    ),
    Mutant(FUSED, "_rows_and_cols(gate_NF, up_NF, y_NF)", "_rows_and_cols(up_NF, y_NF)", "flattens a strided gate"),
    Mutant(FUSED, "_rows_and_cols(gate_NF, up_NF, y_NF)", "_rows_and_cols(gate_NF, y_NF)", "flattens a strided up"),
)

BACKWARD = (
    Mutant(FUSED, "dgate = dy * up * slope", "dgate = dy * slope", "up forgotten"),
    Mutant(FUSED, "dgate = dy * up * slope", "dgate = up * slope", "incoming gradient forgotten"),
    Mutant(FUSED, "dgate = dy * up * slope", "dgate = dy * up * activated", "activation for its derivative"),
    Mutant(FUSED, "dup = dy * activated", "dup = dy * slope", "derivative for the activation"),
    Mutant(FUSED, "dup = dy * activated", "dup = dy * gate", "activation forgotten"),
    Mutant(FUSED, "row * stride_dy", "row * stride_up", "strides of the incoming gradient ignored"),
    Mutant(
        FUSED,
        "tl.store(DGATE + row * stride_dgate + cols, dgate",
        "tl.store(DGATE + row * stride_dgate + cols, dup",
        "dup twice",
    ),
    Mutant(
        FUSED,
        "tensors = (grad_output_NF, gate_NF, up_NF, grad",
        "tensors = (grad_output_NF, up_NF, gate_NF, grad",
        "gate and up swapped",
    ),
    Mutant(FUSED, "_rows_and_cols(*tensors)", "_rows_and_cols(*tensors[1:])", "flattens a strided incoming gradient"),
)

IN_TORCH = (
    Mutant(EAGER, ".mul_(up_NF)", "", "up forgotten"),
    Mutant(EAGER, "grad_up_NF).mul_(grad_output_NF)", "grad_up_NF)", "incoming gradient forgotten"),
    Mutant(EAGER, "out=grad_gate_NF)", "out=grad_output_NF)", "overwrites the incoming gradient"),
)

IN_HOST_CODE = (
    Mutant(
        HOST,
        "grads_NF = _gate_and_up(grad_gate, None if up is None else grad_up, layout)",
        'grads_NF = _gate_and_up(grad_gate, None if up is None else grad_up, "gate_up")',
        "layout of the gradient",
    ),
    Mutant(HOST, "(rows(gate), rows(up))", "(rows(gate), rows(gate))", "gate for up"),
    Mutant(HOST, "_call(gate, up, activation, layout", '_call(gate, up, activation, "gate_up"', "layout lost"),
    Mutant(HOST, "_call(gate, up, activation,", '_call(gate, up, "silu",', "activation lost"),
)

MUTANTS = (*FORWARD, *BACKWARD, *IN_TORCH, *IN_HOST_CODE)
