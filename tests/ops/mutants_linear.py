"""Plausible mistakes in linears: each changes what is computed or kept, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

EAGER = "linear/eager.py"
HOST = "linear/__init__.py"

VALUES = (
    Mutant(EAGER, "grad_x.addmm_(grad, ", "grad_x.addmm_(beta=0, mat1=grad, mat2=", "only the last gradient"),
    Mutant(EAGER, "for i, grad in others:", "for i, grad in others[:1]:", "a third linear forgotten"),
    Mutant(EAGER, "return grad_output.t() @ x", "return grad_output.t() @ x.abs()", "gradient of a weight"),
    Mutant(HOST, "given[i].sum(0)", "given[i].mean(0)", "mean for sum in the gradient of a bias"),
    Mutant(
        HOST,
        "ctx.module.grad_weight(given[i], narrow)",
        "ctx.module.grad_weight(given[i], narrow * 2)",
        "twice the input",
    ),
)
"""Caught by values and gradients of several linears."""

SOURCES = (
    Mutant(HOST, "else source.tensors", "else (x,)", "the input is kept in place of its source"),
    Mutant(HOST, "ctx.source.again(kept)", "kept[0]", "the source is taken for the input"),
    Mutant(
        HOST, "if any((*needs_weights, *needs_a)) else ()", "if True else ()", "kept although no weight has a gradient"
    ),
)
"""Caught by what is saved, and by gradients with a source."""
