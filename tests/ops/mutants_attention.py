"""Plausible mistakes in attention: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

BLOCKS = "attention/blocks.py"
PACKED = "attention/packed.py"
HOST = "attention/__init__.py"

IN_TORCH = (
    Mutant(BLOCKS, ".transpose(-1, -2)).mul_(self.scale)", ".transpose(-1, -2))", "scale forgotten"),
    Mutant(BLOCKS, "scores.div_(self.softcap)", "scores", "soft-cap does not divide"),
    Mutant(BLOCKS, "hides(tile, self.causal, self.window,", "hides(tile, self.causal, None,", "window ignored"),
    Mutant(BLOCKS, "weights.sum(-1) + torch.exp(sinks - peak)", "weights.sum(-1)", "sink takes no weight"),
    Mutant(BLOCKS, "torch.maximum(scores.amax(-1), sinks)", "scores.amax(-1)", "a large sink overflows"),
    Mutant(BLOCKS, ".sub_(delta[..., None])", "", "delta forgotten"),
    Mutant(BLOCKS, "            grad_scores.mul_(slope)\n", "            pass\n", "slope of the soft-cap forgotten"),
    Mutant(BLOCKS, "grad_scores = grad_scores.mul_(scale)\n", "grad_scores = grad_scores\n", "gradient not scaled"),
    Mutant(BLOCKS, "grad_value_BKTE[keys] += ", "grad_value_BKTE[keys] = ", "a tile overwrites the values' gradient"),
    Mutant(BLOCKS, "grad_key_BKTD[keys] += ", "grad_key_BKTD[keys] = ", "a tile overwrites the keys' gradient"),
    Mutant(BLOCKS, "grad_sinks_H = -(share", "grad_sinks_H = (share", "sign of the sinks' gradient"),
    Mutant(BLOCKS, ".sub_(peak).exp_().div_(total)", ".sub_(peak).exp_()", "weights not normalised in backward"),
    Mutant(BLOCKS, "scores.sub_(peak[..., None])", "scores", "overflows where scores are large"),
    Mutant(BLOCKS, "self.documents_BS if self", "None if self", "documents ignored"),
    Mutant(
        BLOCKS,
        "tile.start : tile.stop]\n            mask",
        "tile.start : tile.stop] * 0\n            mask",
        "mask ignored",
    ),
)

IN_PACKED = (
    Mutant(
        PACKED,
        "0.0, only_causal, attn_mask=hidden, scale=scale)\n        output",
        "0.0, only_causal, attn_mask=hidden)\n        output",
        "scale forgotten",
    ),
    Mutant(
        PACKED, "not causal or tile.start == tile.first", "True", "later tiles of a window start at their first key"
    ),
    Mutant(
        PACKED,
        "inside = window is None or tile.stop - tile.first <= window",
        "inside = True",
        "window ignored inside a tile",
    ),
    Mutant(PACKED, "grad_key[keys] += found[1]", "grad_key[keys] = found[1]", "a tile overwrites the keys' gradient"),
    Mutant(
        PACKED, "grad_value[keys] += found[2]", "grad_value[keys] = found[2]", "a tile overwrites the values' gradient"
    ),
    Mutant(
        PACKED,
        "output_BHSE[at], lse_BHS[at] = output[..., :width], lse",
        "output_BHSE[at], lse_BHS[at] = output[..., :width], lse + 1",
        "saves the wrong statistic",
    ),
)

IN_HOST_CODE = (
    Mutant(HOST, "window >= query.shape[2]", "window >= query.shape[2] // 2", "a wide window is dropped"),
    Mutant(HOST, "query.shape[-1] ** -0.5 if", "1.0 if", "default scale"),
    Mutant(HOST, "None if saved[3] is None else grad_sinks", "None", "sinks get no gradient"),
)

MUTANTS = (*IN_TORCH, *IN_PACKED, *IN_HOST_CODE)
