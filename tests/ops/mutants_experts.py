"""Plausible mistakes in experts: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "experts/fused.py"
EAGER = "experts/eager.py"
HOST = "experts/__init__.py"

COMBINE = (
    Mutant(FUSED, "y *= tl.load(WEIGHTS + slot)", "y *= tl.load(WEIGHTS + token)", "the weight of another token"),
    Mutant(FUSED, "row = tl.load(INVERSE + slot)", "row = slot", "rows taken for sorted by token"),
    Mutant(
        FUSED,
        "tl.load(BIAS + tl.load(EXPERT + slot)",
        "tl.load(BIAS + tl.load(EXPERT + token)",
        "another expert's bias",
    ),
    Mutant(FUSED, "total += y\n", "total = y\n", "the last expert only"),
    Mutant(FUSED, "slot = token * top_k + k", "slot = token + k", "slots of a top one"),
)

DIFFERENTIATE = (
    Mutant(FUSED, "slot = tl.load(ORDER + row)", "slot = row", "weights in the order of the tokens"),
    Mutant(FUSED, "dgate = du * weight * up * slope", "dgate = du * up * slope", "the router's weight forgotten"),
    Mutant(FUSED, "dup = du * weight * act", "dup = du * act", "the router's weight forgotten, of up"),
    Mutant(
        FUSED, "dgate = du * weight * up * slope", "dgate = du * weight * up * act", "activation for its derivative"
    ),
    Mutant(
        FUSED,
        "            dgate = du * weight\n",
        "            dgate = du\n",
        "the router's weight forgotten, own gate",
    ),
    Mutant(
        FUSED,
        "differentiate_plain(du * weight, gate",
        "differentiate_plain(du, gate",
        "the router's weight forgotten, no gate",
    ),
    Mutant(FUSED, "dweight += du * activated", "dweight = du * activated", "the last tile only"),
    Mutant(FUSED, "dweight += du * activated", "dweight += du * gate", "router's gradient before the activation"),
    Mutant(FUSED, "weighted = activated * weight", "weighted = activated", "gradient of down without weights"),
    Mutant(FUSED, "tl.store(DWEIGHTS + slot", "tl.store(DWEIGHTS + row", "router's gradient in the order of the rows"),
)

SUM_ROWS = (
    Mutant(FUSED, "tl.load(OFFSETS + group - 1, mask=group > 0, other=0)", "0", "sums from the first row"),
    Mutant(FUSED, "mask = (rows < end)[:, None]", "mask = (rows < end + 1)[:, None]", "a row of the next group"),
    Mutant(FUSED, "total += tl.sum(x, 0)", "total = tl.sum(x, 0)", "the last rows only"),
)

IN_TORCH = (
    Mutant(EAGER, "y_SD.index_select(0, inverse)", "y_SD.index_select(0, inverse.argsort())", "order for its inverse"),
    Mutant(
        EAGER,
        "bias_ED.index_select(0, expert)",
        "bias_ED.index_select(0, expert.sort().values)",
        "biases by row, not by slot",
    ),
    Mutant(
        EAGER,
        "grad_rows = grad_activated.mul_(weights_S1)",
        "grad_rows = grad_activated",
        "the router's weight forgotten",
    ),
    Mutant(
        EAGER,
        "return grad_inner, activated.mul_(weights_S1)",
        "return grad_inner, activated",
        "gradient of down without weights",
    ),
    Mutant(
        EAGER, ".scatter_(0, order, grad_weights)", ".copy_(grad_weights)", "router's gradient in the order of the rows"
    ),
    Mutant(EAGER, "grad_up.mul_(grad_rows)", "grad_up.copy_(grad_rows)", "the activation forgotten in up's gradient"),
    Mutant(
        EAGER,
        "torch.mul(grad_rows, up, out=grad_gate)",
        "grad_gate.copy_(grad_rows)",
        "up forgotten in the gate's gradient",
    ),
)

IN_HOST_CODE = (
    Mutant(
        HOST,
        "        grad_bias = module.sum_rows(grad_inner, offsets)",
        "        grad_bias = module.sum_rows(grad_inner * 2, offsets)",
        "twice the bias' gradient",
    ),
    Mutant(
        HOST,
        "inner += bias.index_select(0, expert.index_select(0, order))",
        "inner += bias.index_select(0, expert)",
        "bias by slot, not by row",
    ),
    Mutant(HOST, "torch.empty_like(order).scatter_(0, order, slots)", "order", "order for its inverse"),
    Mutant(HOST, "right=True", "right=False", "the first row of each expert belongs to the one before"),
    Mutant(
        HOST,
        "return outer(inputs_SI, grad_SO, offsets) if is_transposed",
        "return outer(inputs_SI.flip(0), grad_SO, offsets) if is_transposed",
        "rows of the inputs reversed",
    ),
    Mutant(
        HOST,
        "else outer(grad_SO, inputs_SI, offsets)",
        "else outer(grad_SO, inputs_SI.flip(0), offsets)",
        "rows of the inputs reversed, not transposed",
    ),
    Mutant(
        HOST,
        "grad_weights = grad_weights + share.index_select(0, inverse)",
        "grad_weights = grad_weights + share",
        "share of the bias in the order of the rows",
    ),
    Mutant(HOST, "grad_weights = grad_weights + share.index_select(0, inverse)", "pass", "share of the bias forgotten"),
    Mutant(
        HOST,
        "(grad_rows * weights_S1).to(weight.dtype), offsets)",
        "grad_rows, offsets)",
        "gradient of down's bias without weights",
    ),
    Mutant(
        HOST,
        "grad_weight = _weight_gradient(weighted, grad_rows, offsets",
        "grad_weight = _weight_gradient(weighted * 2, grad_rows, offsets",
        "twice the gradient of down",
    ),
    Mutant(
        HOST,
        "inner, layout = gate(inner), OWN_GATE",
        "inner, layout = inner[:, : down.shape[1 if is_transposed else 2]], OWN_GATE",
        "the caller's gate forgotten",
    ),
    Mutant(
        HOST,
        "form = (activation, layout, is_transposed, hidden_states.dtype",
        'form = ("silu", layout, is_transposed, hidden_states.dtype',
        "activation lost",
    ),
    Mutant(
        HOST,
        "module.combine(grad_rows, None, None, order, inverse, x.shape[0], x.dtype)",
        "module.combine(grad_rows, None, None, order, order, x.shape[0], x.dtype)",
        "gradient of another token",
    ),
    Mutant(
        HOST,
        "if wanted[3] else weight.new_empty(0)\n\n\ndef _down_fake_backward",
        "* 0 if wanted[3] else weight.new_empty(0)\n\n\ndef _down_fake_backward",
        "no gradient of the router",
    ),
)

MUTANTS = (*COMBINE, *DIFFERENTIATE, *SUM_ROWS, *IN_TORCH, *IN_HOST_CODE)
