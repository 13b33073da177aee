"""Plausible mistakes in gated_linear: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "gated_linear/fused.py"
EAGER = "gated_linear/eager.py"
HOST = "gated_linear/__init__.py"

ACTIVATION = (
    Mutant(FUSED, "tl.where(z >= 0, inverse, small * inverse)", "inverse", "sigmoid of a negative number"),
    Mutant(FUSED, "small * inverse * inverse\n", "small * inverse\n", "slope of the sigmoid"),
    Mutant(FUSED, "small = tl.exp(-tl.abs(z))", "small = tl.exp(-z)", "sigmoid overflows"),
    Mutant(FUSED, "tl.erf(gate * 0.7071067811865476)", "tl.erf(gate)", "erf without the square root of two"),
    Mutant(FUSED, "share = 0.5 * (1.0 + tl.erf", "share = 0.5 + (1.0 + tl.erf", "half added"),
    Mutant(
        FUSED,
        "0.3989422804014327 * tl.exp(-0.5 * gate * gate)",
        "0.3989422804014327 * tl.exp(-gate * gate)",
        "density of gelu",
    ),
    Mutant(FUSED, "share_slope = 0.3989422804014327 * ", "share_slope = ", "density of gelu not normalised"),
    Mutant(FUSED, "0.044715 * gate * gate", "0.044715 * gate", "gelu_tanh without the cube"),
    Mutant(FUSED, "0.134145 * gate * gate", "0.044715 * gate * gate", "derivative of the cube"),
    Mutant(
        FUSED,
        "share_slope = slope_2z * 1.5957691216057308",
        "share_slope = slope_2z * 0.7978845608028654",
        "half the slope",
    ),
    Mutant(FUSED, "sigmoid_and_slope(1.5957691216057308", "sigmoid_and_slope(0.7978845608028654", "half the argument"),
    Mutant(FUSED, "share + gate * share_slope", "share + share_slope", "product rule"),
    Mutant(FUSED, "share + gate * share_slope", "gate * share_slope", "product rule, other half"),
)

FORWARD = (
    Mutant(
        FUSED, "y = activated.to(GATE.dtype.element_ty).to(tl.float32) * up", "y = activated * up", "rounds once only"
    ),
    Mutant(FUSED, "y = activated.to(GATE.dtype.element_ty).to(tl.float32) * up", "y = activated + up", "up added"),
    Mutant(FUSED, "activated, _ = activate", "_, activated = activate", "derivative for the activation"),
    Mutant(
        FUSED,
        "        gate_NF.stride(0),\n        up_NF.stride(0),\n        ACTIVATION",
        "        n_cols,\n        up_NF.stride(0),\n        ACTIVATION",
        "takes the gate for contiguous",
    ),
    Mutant(
        FUSED,
        "        gate_NF.stride(0),\n        up_NF.stride(0),\n        ACTIVATION",
        "        gate_NF.stride(0),\n        gate_NF.stride(0),\n        ACTIVATION",
        "stride of the gate for up",
    ),
    Mutant(FUSED, "_rows_and_cols(gate_NF, up_NF)", "_rows_and_cols(up_NF)", "flattens a strided gate"),
    Mutant(FUSED, "_rows_and_cols(gate_NF, up_NF)", "_rows_and_cols(gate_NF)", "flattens a strided up"),
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
    Mutant(EAGER, '"tanh" if activation == "gelu_tanh" else "none"', '"none"', "gelu for gelu_tanh"),
    Mutant(EAGER, 'return "tanh" if activation', 'return "none" if activation', "gelu and gelu_tanh swapped"),
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

MUTANTS = (*ACTIVATION, *FORWARD, *BACKWARD, *IN_TORCH, *IN_HOST_CODE)
