"""Bytes that a layer keeps for backward, per token. Letters: H hidden, Q K V O widths of queries, keys, values and attention's output,
A heads, F inner width of the MLP, E experts, k of them for a token, G inner width of one; b bytes of an element, T tensor ranks.

What plain transformers keeps (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, section 4,
for an attention that keeps no scores, and RMSNorms that widen to float32), then what the fusions keep:

    norm            (4 + b) H, and b H of its output       b H (its input), and b H
    q and k norms   (4 + b) (Q + K)                        b (Q + K)
    attention       b (Q + C K + C V + O) + 4 A            the same; C context ranks, which gather keys and values
    gated MLP       4 b F                                  3 b F
    plain MLP       2 b F                                  the same
    experts         k (2 b H + 4 b G) + 4 E + 34 k         k (2 b G) + 4 E + 26 k

Frozen weights (LoRA) spare what only they need: b H of each plain norm. Adapters keep b r each. `recompute="selective"` drops the
outputs of norms and activations, "mlp" keeps its input b H of a dense MLP alone, "full" the layer's input b H. Tensor ranks cut all but the
norms; with sequence parallel the inputs of norms too.
"""

from dataclasses import dataclass

from automodel_accel.scaling.job import Job
from automodel_accel.scaling.shape import Layer, Shape


@dataclass(frozen=True, slots=True)
class Kept:
    """A part of what is kept.

    Attributes:
        what: In words.
        formula: In the letters of this module.
        bytes: Per token, on one rank.
    """

    what: str
    formula: str
    bytes: float


def kept_by(layer: Layer, shape: Shape, job: Job, recompute: str | None) -> list[Kept]:
    """What one layer keeps, with `recompute` in the place of the job's."""
    b, tensor = shape.itemsize, job.mesh.tensor
    stream = tensor if job.mesh.sequence_parallel else 1
    if recompute == "full":
        return [Kept("input of the layer", "b H", b * shape.hidden / stream)]
    found = [*_norms(layer, shape, job, recompute, stream)]
    if layer.query:
        found += [_qk_norms(layer, shape, job)] if layer.qk_norm else []
        widths = layer.query + job.mesh.context * (layer.key + layer.value) + layer.output
        found.append(Kept("attention", "b (Q + C K + C V + O) + 4 A", (b * widths + 4 * layer.heads) / tensor))
    if layer.mlp:
        found.append(_mlp(layer, shape, job, recompute))
    if layer.experts:
        found.append(_experts(layer, shape, job))
    rank = layer.rank_attention + (0 if recompute == "mlp" else layer.rank_mlp)
    return [*found, Kept("adapters", "b r", b * rank)] if rank else found


def layer_bytes(layer: Layer, shape: Shape, job: Job, recompute: str | None) -> float:
    """The sum of `kept_by`."""
    return sum(kept.bytes for kept in kept_by(layer, shape, job, recompute))


def model_bytes(shape: Shape, job: Job) -> float:
    """What all layers keep, and what the last norm and the head's input do, per token."""
    rest = 2 * shape.itemsize * shape.hidden
    return rest + sum(layer_bytes(layer, shape, job, job.recompute) for layer in shape.layers)


def again_bytes(shape: Shape, job: Job) -> float:
    """What the largest layer computes again at once in its backward, per token."""
    b, tensor = shape.itemsize, job.mesh.tensor
    if job.recompute == "full":
        return max(layer_bytes(layer, shape, job, None) for layer in shape.layers)
    if job.recompute == "mlp":
        return max((3 if layer.gated else 2) * b * layer.mlp / tensor for layer in shape.layers)
    return max(b * layer.mlp / tensor for layer in shape.layers) if job.recompute else 0.0


def working_bytes(shape: Shape, job: Job) -> float:
    """Gradients of activations in the backward of the largest layer, per token: of an MLP's h, gate and up, and of its input and output."""
    inner = max(3 * layer.mlp + layer.chosen * (3 * layer.expert + 2 * shape.hidden) for layer in shape.layers)
    return shape.itemsize * (inner / job.mesh.tensor + 2 * shape.hidden)


def _norms(layer: Layer, shape: Shape, job: Job, recompute: str | None, stream: int) -> list[Kept]:
    b, hidden, wide = shape.itemsize, shape.hidden, layer.norms - layer.plain_norms
    if "norm" in job.fusions:
        formula, each = "b H + 4", b * hidden + 4.0
    else:
        formula = "(4 + b) H + 4" if not shape.frozen else "4 H + 4"
        each = (4 + (0 if shape.frozen else b)) * hidden + 4.0
    inputs = wide * each + layer.plain_norms * (b * hidden + 8.0)
    feeding = min(2, layer.norms)
    kept = _outputs(layer, shape, job, recompute, feeding)
    found = [Kept("inputs of norms", f"{layer.norms} ({formula})", inputs / stream)]
    return [*found, Kept("outputs of norms", f"{kept} b H", kept * b * hidden)] if kept else found


def _outputs(layer: Layer, shape: Shape, job: Job, recompute: str | None, feeding: int) -> int:
    """How many outputs of norms are kept, as inputs of linears that train or are adapted."""
    wanted = (not shape.frozen or layer.rank_attention > 0, not shape.frozen or layer.rank_mlp > 0)
    of = list(wanted[:feeding])
    if recompute is not None and "norm" in job.fusions and layer.query:
        of[0] = False
    if recompute is not None and "norm" in job.fusions and feeding > 1 and not layer.experts:
        of[1] = recompute == "mlp" and layer.mlp > 0
    after = layer.norms - feeding if "norm" in job.fusions else 0  # what a norm after a branch gives is summed later
    return sum(of) + after


def _qk_norms(layer: Layer, shape: Shape, job: Job) -> Kept:
    b, heads = shape.itemsize, layer.heads + layer.kv_heads
    each = b if "norm" in job.fusions else 4 if shape.frozen else 4 + b
    of = ((layer.query + layer.key) * each + 4 * heads) / job.mesh.tensor
    return Kept("norms of queries and keys", f"{each} (Q + K) + 4 heads", of)


def _mlp(layer: Layer, shape: Shape, job: Job, recompute: str | None) -> Kept:
    fused = "mlp" in job.fusions
    if fused and recompute == "mlp":
        return Kept("MLP", "0", 0.0)
    parts = 4 if layer.gated and not fused else 3 if layer.gated else 2
    h_needed = not shape.frozen or layer.rank_mlp > 0
    parts -= 1 if not h_needed or (fused and recompute is not None) else 0
    return Kept("MLP", f"{parts} b F", parts * shape.itemsize * layer.mlp / job.mesh.tensor)


def _experts(layer: Layer, shape: Shape, job: Job) -> Kept:
    b, chosen, tensor = shape.itemsize, layer.chosen, job.mesh.tensor
    router = 4 * layer.experts + (26 if "experts" in job.fusions else 34) * chosen
    if "experts" in job.fusions:
        return Kept("experts", "k 2 b G + 4 E + 26 k", 2 * b * chosen * layer.expert / tensor + router)
    if shape.frozen:
        return Kept("experts", "k 3 b G + 4 E + 34 k", 3 * b * chosen * layer.expert / tensor + router)
    inner, outer = 4 * b * chosen * layer.expert / tensor, 2 * b * chosen * shape.hidden
    return Kept("experts", "k (2 b H + 4 b G) + 4 E + 34 k", inner + outer + router)
