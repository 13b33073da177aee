"""Plausible mistakes in linear_cross_entropy: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "linear_cross_entropy/fused.py"
EAGER = "linear_cross_entropy/eager.py"
HOST = "linear_cross_entropy/__init__.py"
CHUNKS = "linear_cross_entropy/chunks.py"

KERNEL = (
    Mutant(FUSED, "lane_sum * shrunk + 1.0", "lane_sum + 1.0", "a new maximum does not shrink the sum"),
    Mutant(FUSED, "lane_max = tl.where(rise > 0, z, lane_max)", "lane_max = z", "the maximum falls again"),
    Mutant(FUSED, "tl.where(z == lane_max, 0.0, z - lane_max)", "z - lane_max", "infinity less infinity"),
    Mutant(FUSED, "lane_sum * tl.exp(lane_max - row_max)", "lane_sum", "lanes added at different scales"),
    Mutant(FUSED, '        z = tl.where(cols < n_cols, z, float("-inf"))\n', "", "the padding counts"),
    Mutant(FUSED, "(target_logit - row_max)", "target_logit", "the maximum forgotten in the loss"),
    Mutant(FUSED, "tl.sum(lane_distance, 0) / n_cols", "tl.sum(lane_distance, 0) / limit", "a mean over the padding"),
    Mutant(
        FUSED,
        'tl.where(tl.abs(target_logit) < float("inf"), target_logit, 0.0)',
        "target_logit",
        "distances to an infinite logit",
    ),
    Mutant(FUSED, "tl.where(cols < n_cols, z - origin, 0.0)", "z - origin", "the padding smoothed in"),
    Mutant(FUSED, "(n_blocks - 1 - turn) * BLOCK", "turn // 2 * BLOCK", "a block turned twice"),
    Mutant(
        FUSED,
        "tl.where(cols == target, 1.0 - smoothing, 0.0)",
        "tl.where(cols == target, 1.0, 0.0)",
        "target not smoothed",
    ),
    Mutant(FUSED, "grad -= smoothing / n_cols", "grad -= smoothing", "every class gets the whole share"),
    Mutant(FUSED, "grad *= 1.0 - capped * capped", "grad *= 1.0 - capped", "wrong slope of tanh"),
    Mutant(
        FUSED, "1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)", "1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)", "tanh of negatives"
    ),
    Mutant(FUSED, "- 3.33332819422e-1", "- 3.43332819422e-1", "a wrong coefficient of tanh"),
    Mutant(FUSED, "+ row * stride_weight) * scale", "+ row * stride_weight)", "the scale forgotten in the gradient"),
    Mutant(FUSED, "tl.load(WEIGHT + row * stride_weight)", "tl.load(WEIGHT)", "the first row's weight for all"),
    Mutant(
        FUSED,
        'target_logit = tl.load(Z + target, mask=is_class, other=float("nan")).to(tl.float32) * scale',
        'target_logit = tl.load(Z + target, mask=is_class, other=float("nan")).to(tl.float32)',
        "the target's logit not scaled",
    ),
    Mutant(
        FUSED,
        "(target >= 0) & (target < n_cols)",
        "target < n_cols",
        "a negative target reads the padding of the row above",
    ),
    Mutant(
        FUSED, 'weight = tl.where(is_class, weight, float("nan"))', "weight = weight", "a finite gradient for no class"
    ),
    Mutant(FUSED, "tl.store(LOSS + row, 0.0)", "tl.store(LOSS + row, 1.0)", "an ignored row has a loss"),
    Mutant(
        FUSED,
        "        if NEEDS_GRAD:\n            for block",
        "        if not NEEDS_GRAD:\n            for block",
        "logits left where the row is ignored",
    ),
    Mutant(FUSED, "    if factor != 1.0:", "    if factor > 1.0:", "only factors above 1 applied"),
    Mutant(
        FUSED,
        "tl.program_id(0), tl.cdiv(n_elements, BLOCK), PROGRAMS",
        "tl.program_id(0), tl.cdiv(n_elements, BLOCK) - 1, PROGRAMS",
        "the last block not scaled",
    ),
    Mutant(FUSED, "0 if weight_C is None else weight_C.stride(0)", "0", "the weights' stride ignored"),
    Mutant(FUSED, "lse = row_max + tl.log(total)", "lse = tl.log(total)", "the maximum forgotten in lse"),
    Mutant(FUSED, "loss += z_loss * lse * lse", "loss += z_loss * lse", "lse not squared"),
    Mutant(FUSED, "more = 2.0 * z_loss * lse", "more = z_loss * lse", "half the gradient of lse^2"),
    Mutant(FUSED, "        grad += added\n", "        grad += 0.0\n", "no gradient of it"),
    Mutant(FUSED, "HAS_Z_LOSS=z_loss > 0", "HAS_Z_LOSS=False", "no z-loss at all"),
)

ROWS = (
    Mutant(EAGER, "    z.sub_(largest)\n", "", "no maximum taken off: overflow"),
    Mutant(EAGER, "(smoothing - 1.0) * z.gather", "-z.gather", "the target's share not lessened"),
    Mutant(
        EAGER,
        "loss -= smoothing * z.mean(1, keepdim=True)",
        "loss -= smoothing * z.sum(1, keepdim=True)",
        "sum for mean",
    ),
    Mutant(
        EAGER, "(loss + total.log()).masked_fill_(ignored, 0.0)", "(loss + total.log())", "ignored rows have a loss"
    ),
    Mutant(EAGER, "weight[:, None].masked_fill(ignored, 0.0)", "weight[:, None]", "ignored rows have a gradient"),
    Mutant(EAGER, "    z.masked_fill_(ignored, 0.0)  #", "    #", "NaN in an ignored row"),
    Mutant(
        EAGER,
        ".masked_fill(ignored, 0.0) * scale, smoothing",
        ".masked_fill(ignored, 0.0), smoothing",
        "the scale forgotten in the gradient",
    ),
    Mutant(EAGER, "z.gather(1, target) - (1.0 - smoothing)", "z.gather(1, target) - 1.0", "target not smoothed"),
    Mutant(EAGER, "z.sub_(smoothing / z.shape[1])", "z.sub_(smoothing)", "every class gets the whole share"),
    Mutant(EAGER, "1.0 - z * z", "1.0 - z", "wrong slope of tanh"),
    Mutant(EAGER, "        z.mul_(slope)\n", "        pass\n", "slope of tanh forgotten"),
    Mutant(EAGER, "    z.mul_(softcap)\n", "", "not scaled back after tanh"),
    Mutant(
        EAGER,
        "None if weight_C is None else weight_C[rows]",
        "None if weight_C is None else weight_C[: min(rows.stop, weight_C.shape[0]) - rows.start]",
        "weights of the first block for all",
    ),
    Mutant(EAGER, "            logits_CV[rows] = wide\n", "            pass\n", "16-bit gradient not written back"),
    Mutant(EAGER, "        x.mul_(factor)\n", "        x.mul_(factor.abs())\n", "sign of the factor lost"),
    Mutant(EAGER, "lse = largest + total.log()", "lse = total.log()", "the maximum forgotten in lse"),
    Mutant(EAGER, "z_loss * lse.square()", "z_loss * lse", "lse not squared"),
    Mutant(
        EAGER,
        "(z_loss * lse.square()).masked_fill_(ignored, 0.0)",
        "z_loss * lse.square()",
        "ignored rows have a z-loss",
    ),
    Mutant(EAGER, "more = 2.0 * z_loss * lse", "more = z_loss * lse", "half the gradient of lse^2"),
    Mutant(EAGER, "z.scatter_add_(1, target, own * more)", "own = own * more", "no gradient of lse^2 at the target"),
    Mutant(EAGER, "z.mul_(1.0 + more)", "z", "no gradient of lse^2 beside the target"),
)

LOOP = (
    Mutant(CHUNKS, "    if first:\n", "    if True:\n", "each chunk overwrites the weight's gradient"),
    Mutant(
        CHUNKS,
        "self.bias_wide.add_(z_CV.sum(0))",
        "self.bias_wide.copy_(z_CV.sum(0))",
        "each chunk overwrites the bias's gradient",
    ),
    Mutant(
        CHUNKS,
        "row_weight_N[rows], *options",
        "row_weight_N[: target_C.shape[0]], *options",
        "weights of the first chunk for all",
    ),
    Mutant(CHUNKS, "            of_rows.zero_()", "            pass", "ignored rows not initialised"),
    Mutant(
        CHUNKS,
        "            self.weight_VH.zero_()\n",
        "            pass\n",
        "no row: the weight's gradient not initialised",
    ),
    Mutant(
        CHUNKS,
        "ignored_N.to(torch.uint8), stable=True",
        "(~ignored_N).to(torch.uint8), stable=True",
        "ignored tokens first",
    ),
    Mutant(
        CHUNKS,
        "count = (target != options.ignore_index).sum()",
        "count = (target >= 0).sum()",
        "a class that is ignored counts",
    ),
    Mutant(CHUNKS, "    elif num_items is None:\n", "    elif True:\n", "num_items ignored"),
    Mutant(
        CHUNKS,
        "torch.addmm(tensors.bias, hidden_CH, weight_HV, out=z_CV)",
        "z_CV.copy_(torch.addmm(tensors.bias, hidden_CH, weight_HV))",
        "rounded by autocast",
    ),
    Mutant(
        HOST,
        "    if options.ready_in_forward(hidden.dtype):\n        _scale",
        "    if ready:\n        _scale",
        "second backward not scaled",
    ),
    Mutant(
        HOST,
        "    _scale_all_(grads, grad_output, ctx.vocab, ctx.options)\n",
        "",
        "first backward not scaled",
    ),
    Mutant(
        HOST,
        "    grads, ctx.ready = ctx.ready, []\n",
        "    grads = ctx.ready\n",
        "gradients handed out, and scaled, twice",
    ),
    Mutant(
        HOST,
        "once = torch.ones_like(grad_output) if options.ready_in_forward(hidden.dtype) else grad_output",
        "once = grad_output",
        "second backward scaled twice",
    ),
    Mutant(HOST, "(torch.ones_like(number) / number)", "torch.ones_like(number)", "gradient of a mean not divided"),
    Mutant(CHUNKS, "return self[:5]", "return *self[:4], 0.0", "the z-loss not handed on"),
    Mutant(HOST, "    return loss / number, *grads", "    return loss, *grads", "mean not divided"),
)

LOW_RANK = (
    Mutant(CHUNKS, "        wide.addmm_(lora_x_CR[part], lora_b_RV)\n", "", "the adapter forgotten"),
    Mutant(
        CHUNKS, "lora_b_RV = tensors.lora_x[rows],", "lora_b_RV = tensors.lora_x[: z_CV.shape[0]],", "the first chunk's"
    ),
    Mutant(
        CHUNKS, "wide.addmm_(lora_x_CR[part]", "wide.addmm_(lora_x_CR[: wide.shape[0]]", "the first part's rows for all"
    ),
    Mutant(CHUNKS, "            z_CV[part] = wide\n", "            pass\n", "the wide sum not put back"),
    Mutant(CHUNKS, "-(-z_CV.shape[0] // WIDENED_PARTS)", "z_CV.shape[0]", "a whole chunk widened at once"),
    Mutant(
        CHUNKS, "        if self.wanted[3] or self.wanted[4]:", "        if self.wanted[3]:", "lora_b alone not served"
    ),
    Mutant(
        CHUNKS, "            if self.wanted[4]:", "            if self.wanted[1]:", "lora_b served with the weight only"
    ),
    Mutant(
        CHUNKS,
        "lora_x_CR[part], first and part.start == 0)",
        "lora_x_CR[part], first)",
        "each part overwrites the others",
    ),
    Mutant(
        CHUNKS,
        "lora_x_CR[part], first and part.start == 0)",
        "lora_x_CR[part], part.start == 0)",
        "each chunk overwrites",
    ),
    Mutant(CHUNKS, "out=product_CR[part])", "out=product_CR[: wide.shape[0]])", "each part over the first"),
    Mutant(CHUNKS, "            self.lora_x_NR[rows] = product_CR\n", "            pass\n", "lora_x has no gradient"),
    Mutant(
        CHUNKS,
        "            self.lora_b_VR.zero_()\n",
        "            pass\n",
        "no row: lora_b's gradient not initialised",
    ),
    Mutant(
        CHUNKS,
        "for of_rows in (self.hidden_NH, self.lora_x_NR):",
        "for of_rows in (self.hidden_NH,):",
        "ignored rows of lora_x not initialised",
    ),
    Mutant(
        CHUNKS,
        "x.new_empty(x.shape if want else (0,))",
        "x.new_empty(x.shape)",
        "memory for gradients that nobody wants",
    ),
    Mutant(
        HOST,
        "differentiated and x is not None and x.requires_grad for x in tensors",
        "differentiated and x is not None and tensors[0].requires_grad for x in tensors",
        "a frozen weight gets a gradient",
    ),
)

MUTANTS = (*KERNEL, *ROWS, *LOOP, *LOW_RANK)
