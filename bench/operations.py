"""The operations that are measured: their inputs, their tests, and what they cost at least."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bench.case import Inputs, Operation, Sizes
from bench.models import GATED, PLAIN, Model

IGNORE_INDEX = -100
FAST = ("-m", "not slow and not gpu", "-k", "test_every_option or test_every_pattern or test_shapes or test_rows")


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def _rows(sizes: Sizes, width: str) -> tuple[int, int]:
    return int(sizes["tokens"]), int(sizes[width])


def _norm_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    shape = _rows(sizes, "hidden")
    x, grad = (_normal(shape, dtype, device, seed) for seed in (0, 1))
    return {"x": x.requires_grad_(), "weight": _normal(shape[1:], dtype, device, 2).requires_grad_(), "grads": (grad,)}


def _add_norm_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    inputs = _norm_inputs(sizes, dtype, device)
    residual, grad_sum = (_normal(_rows(sizes, "hidden"), dtype, device, seed) for seed in (3, 4))
    return {**inputs, "residual": residual.requires_grad_(), "grads": (*inputs["grads"], grad_sum)}


def _layer_norm_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    bias = _normal((int(sizes["hidden"]),), dtype, device, 3)
    return {**_norm_inputs(sizes, dtype, device), "bias": bias.requires_grad_()}


def _gated_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    gate, up, grad = (_normal(_rows(sizes, "intermediate"), dtype, device, seed) for seed in range(3))
    return {"gate": gate.requires_grad_(), "up": up.requires_grad_(), "grads": (grad,)}


def adapted_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """(in, out) of the linears that have adapters: gate and up, or where there are heads all seven of a layer of Llama."""
    hidden, wide = int(sizes["hidden"]), int(sizes["intermediate"])
    gate_up = {"gate_proj": (hidden, wide), "up_proj": (hidden, wide)}
    if "heads" not in sizes:
        return gate_up
    q, k = (int(sizes[name] * sizes["head_dim"]) for name in ("heads", "key_heads"))
    attention = {"q_proj": (hidden, q), "k_proj": (hidden, k), "v_proj": (hidden, k), "o_proj": (q, hidden)}
    return {**attention, **gate_up, "down_proj": (wide, hidden)}


def frozen_flops(sizes: Sizes) -> float:
    """FLOPs of those linears without adapters: their outputs and the gradient of their inputs."""
    return 4.0 * sizes["tokens"] * sum(wide * high for wide, high in adapted_shapes(sizes).values())


def _adapter_flops(sizes: Sizes) -> float:
    """The low-rank products and their gradients, those of both weights too."""
    return 6.0 * sizes["tokens"] * sizes["rank"] * sum(wide + high for wide, high in adapted_shapes(sizes).values())


def _adapted(sizes: Sizes, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Weight, A and B of each linear; no A and B for rank 0."""
    found: dict[str, Any] = {}
    rank = int(sizes["rank"])
    for seed, (name, (wide, high)) in enumerate(adapted_shapes(sizes).items()):
        weight = _normal((high, wide), dtype, device, 10 + seed).mul_(wide**-0.5)
        found[f"{name}_weight"] = nn.Parameter(weight, requires_grad=False)
        if rank:
            found[f"{name}_a"] = nn.Parameter(_normal((rank, wide), dtype, device, 20 + seed).mul_(wide**-0.5))
            found[f"{name}_b"] = nn.Parameter(_normal((high, rank), dtype, device, 30 + seed).mul_(rank**-0.5))
    return found


def _lora_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    """Gate and up of an MLP, frozen, and an adapter of each."""
    grads = tuple(_normal(_rows(sizes, "intermediate"), dtype, device, 40 + seed) for seed in (0, 1))
    x = _normal(_rows(sizes, "hidden"), dtype, device).requires_grad_()
    return {"x": x, **_adapted(sizes, dtype, device), "grads": grads}


def _lora_layer_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    """What comes into a layer, its weights and adapters, and the weight of the norm after it."""
    x, grad = (_normal(_rows(sizes, "hidden"), dtype, device, seed)[None] for seed in (0, 1))
    norms = {}
    for seed, name in enumerate(("input_layernorm", "post_attention_layernorm", "norm")):
        weight = _normal((int(sizes["hidden"]),), dtype, device, 50 + seed).mul_(0.1).add_(1)
        norms[f"{name}_weight"] = nn.Parameter(weight, requires_grad=False)
    tables = _rope_tables(sizes, dtype, device)
    whole = {"head_dim": int(sizes["head_dim"])}
    return {"x": x.requires_grad_(), **_adapted(sizes, dtype, device), **norms, **tables, **whole, "grads": (grad,)}


def _linear_groups(model: Model) -> tuple[Sizes, ...]:
    """Linears of one input: q, k and v; o; gate and up; down."""
    q, k = model.heads * model.head_dim, model.key_heads * model.head_dim
    groups = (model.hidden, q, k, k), (q, model.hidden), (model.hidden, *2 * (model.intermediate,))
    names = "in_features", "out_features", "out_features_2", "out_features_3"
    every = (*groups, (model.intermediate, model.hidden))
    return tuple({**dict(zip(names, widths, strict=False)), "trains": 1} for widths in every)


def _out_features(sizes: Sizes) -> list[int]:
    return [int(size) for name, size in sizes.items() if name.startswith("out_features")]


def _linear_elements(sizes: Sizes) -> tuple[float, float, float]:
    """Of the input, of the outputs and of the weights."""
    tokens, wide, high = sizes["tokens"], sizes["in_features"], sum(_out_features(sizes))
    return float(tokens * wide), float(tokens * high), float(wide * high)


def _fp8_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    """x, a weight of each linear, which trains or is frozen, and a gradient of each output."""
    x = _normal(_rows(sizes, "in_features"), dtype, device).requires_grad_()
    found: dict[str, Any] = {"x": x}
    for number, high in enumerate(_out_features(sizes)):
        weight = _normal((high, x.shape[1]), dtype, device, 10 + number).mul_(x.shape[1] ** -0.5)
        found[f"weight_{number}"] = nn.Parameter(weight, requires_grad=bool(sizes["trains"]))
    grads = (_normal((x.shape[0], high), dtype, device, 40 + i) for i, high in enumerate(_out_features(sizes)))
    return {**found, "grads": tuple(grads)}


def _fp8_bytes(sizes: Sizes, itemsize: int) -> float:
    """Forward reads x and the weights and writes the outputs, backward the reverse; what it reads again is kept in 8 bits."""
    x, y, weights = _linear_elements(sizes)
    once = 2 * x + 2 * y + (1 + sizes["trains"]) * weights
    return once * itemsize + weights + sizes["trains"] * x


def _activation_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    x, grad = (_normal(_rows(sizes, "intermediate"), dtype, device, seed) for seed in range(2))
    return {"x": x.requires_grad_(), "grads": (grad,)}


def _heads(sizes: Sizes, count: str, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """[1, tokens, heads, head_dim], as a projection yields it."""
    return _normal((1, int(sizes["tokens"]), int(sizes[count]), int(sizes["head_dim"])), dtype, device, seed)


def _rope_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    q, grad_q = (_heads(sizes, "heads", dtype, device, seed) for seed in (0, 1))
    k, grad_k = (_heads(sizes, "key_heads", dtype, device, seed) for seed in (2, 3))
    grads = grad_q.transpose(1, 2), grad_k.transpose(1, 2)
    return {"q": q.requires_grad_(), "k": k.requires_grad_(), **_rope_tables(sizes, dtype, device), "grads": grads}


def _rope_tables(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    """[1, tokens, head_dim] each."""
    width = int(sizes["head_dim"])
    frequencies = 10000.0 ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.arange(int(sizes["tokens"]), device=device)[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)[None]
    return {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}


def _attention_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    q, grad = (_heads(sizes, "heads", dtype, device, seed) for seed in (0, 1))
    k, v = (_heads(sizes, "key_heads", dtype, device, seed) for seed in (2, 3))
    named = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    return {**named, "grads": (grad.transpose(1, 2),)}


def _targets(sizes: Sizes, device: str) -> torch.Tensor:
    tokens, vocab = int(sizes["tokens"]), int(sizes["vocab"])
    target = torch.randint(vocab, (tokens,), generator=torch.Generator(device).manual_seed(5), device=device)
    target[: round(tokens * sizes["ignored"])] = IGNORE_INDEX
    return target


def _head_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    tokens, hidden, vocab = (int(sizes[name]) for name in ("tokens", "hidden", "vocab"))
    weight = _normal((vocab, hidden), dtype, device, 1).mul_(hidden**-0.5)
    x = _normal((tokens, hidden), dtype, device)
    grad = torch.ones((), dtype=torch.float32, device=device)
    named = {"hidden": x.requires_grad_(), "weight": weight.requires_grad_(), "target": _targets(sizes, device)}
    return {**named, "grads": (grad,)}


def _loss_inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    logits = _normal(_rows(sizes, "vocab"), dtype, device).requires_grad_()
    grad = torch.ones((), dtype=torch.float32, device=device)
    return {"logits": logits, "target": _targets(sizes, device), "grads": (grad,)}


def _elements(sizes: Sizes, width: str) -> float:
    return float(sizes["tokens"]) * sizes[width]


def _norm_options(model: Model) -> dict[str, Any]:
    return {"eps": model.eps, "offset": model.offset, "order": model.order}


def _head_shape(model: Model) -> dict[str, int]:
    return {"heads": model.heads, "key_heads": model.key_heads, "head_dim": model.head_dim}


def _head_elements(sizes: Sizes) -> float:
    return sizes["tokens"] * (sizes["heads"] + sizes["key_heads"]) * sizes["head_dim"]


HEADS = {"tokens": 1024, "heads": 16, "key_heads": 8, "head_dim": 128}

RMS_NORM = Operation(
    name="rms_norm",
    about="root mean square norm of the rows",
    tests=("tests/ops/test_rms_norm.py", *FAST),
    models=GATED,
    custom={"tokens": 4096, "hidden": 2048},
    sizes=lambda model: {"hidden": model.hidden},
    options=_norm_options,
    inputs=_norm_inputs,
    flops=lambda sizes: 16 * _elements(sizes, "hidden"),
    # forward reads x and writes y; backward reads x and the gradient of y, and writes that of x
    bytes_floor=lambda sizes, itemsize: 5 * _elements(sizes, "hidden") * itemsize,
)
ADD_RMS_NORM = Operation(
    name="add_rms_norm",
    about="a residual sum and its root mean square norm",
    tests=("tests/ops/test_add_rms_norm.py", *FAST),
    models=GATED,
    custom={"tokens": 4096, "hidden": 2048},
    sizes=lambda model: {"hidden": model.hidden},
    options=_norm_options,
    inputs=_add_norm_inputs,
    flops=lambda sizes: 18 * _elements(sizes, "hidden"),
    # forward reads x and residual, writes y and h; backward reads h and both gradients, and writes one that x and residual share
    bytes_floor=lambda sizes, itemsize: 8 * _elements(sizes, "hidden") * itemsize,
)
LAYER_NORM = Operation(
    name="layer_norm",
    about="layer norm of the rows, with a bias",
    tests=("tests/ops/test_layer_norm.py", *FAST),
    models=PLAIN,
    custom={"tokens": 4096, "hidden": 1600},
    sizes=lambda model: {"hidden": model.hidden},
    options=lambda model: {"eps": model.eps, "offset": 0.0},
    inputs=_layer_norm_inputs,
    flops=lambda sizes: 20 * _elements(sizes, "hidden"),
    bytes_floor=lambda sizes, itemsize: 5 * _elements(sizes, "hidden") * itemsize,
)
GATED_LINEAR = Operation(
    name="gated_linear",
    about="an activated gate times up, between the projections of an MLP",
    tests=("tests/ops/test_gated_linear.py", *FAST),
    models=GATED,
    custom={"tokens": 4096, "intermediate": 8192},
    sizes=lambda model: {"intermediate": model.intermediate},
    options=lambda model: {"activation": model.activation},
    inputs=_gated_inputs,
    flops=lambda sizes: 16 * _elements(sizes, "intermediate"),
    # forward reads gate and up, writes y; backward reads gate, up and the gradient of y, and writes two gradients
    bytes_floor=lambda sizes, itemsize: 8 * _elements(sizes, "intermediate") * itemsize,
)
LORA = Operation(
    name="lora",
    about="gate and up of an MLP, frozen, with a low-rank adapter each",
    tests=("tests/ops/test_lora.py",),
    models=GATED,
    custom={"tokens": 4096, "hidden": 1024, "intermediate": 4096, "rank": 16},
    sizes=lambda model: {"hidden": model.hidden, "intermediate": model.intermediate, "rank": 16},
    options=lambda model: {"scale": 2.0},
    inputs=_lora_inputs,
    flops=lambda sizes: frozen_flops(sizes) + _adapter_flops(sizes),
    # forward reads x and two weights and writes two outputs; backward reads their gradients, the weights and x, and writes one
    bytes_floor=lambda sizes, itemsize: (
        (3 * _elements(sizes, "hidden") + 4 * (sizes["tokens"] + sizes["hidden"]) * sizes["intermediate"]) * itemsize
    ),
    cpu_cut={"intermediate": 4},
    beside={"rank": 0},
)
LORA_LAYER = Operation(
    name="lora_layer",
    about="a frozen layer of Llama with a low-rank adapter on each linear, and the norm after it",
    tests=("tests/swap/test_lora.py", "-k", "test_equal_to_peft or test_merged"),
    models=("Llama-3.2-1B", "Llama-3-8B"),
    custom={
        "tokens": 4096,
        "hidden": 1024,
        "intermediate": 4096,
        "heads": 16,
        "key_heads": 8,
        "head_dim": 64,
        "rank": 16,
    },
    sizes=lambda model: {"hidden": model.hidden, "intermediate": model.intermediate, **_head_shape(model), "rank": 16},
    options=lambda model: {"scale": 2.0, "eps": model.eps},
    inputs=_lora_layer_inputs,
    # and two products of attention forward and five backward, over the half of the pairs that causality leaves
    flops=lambda sizes: (
        frozen_flops(sizes)
        + _adapter_flops(sizes)
        + 7 * sizes["tokens"] * _elements(sizes, "head_dim") * sizes["heads"]
    ),
    # every weight is read in both directions; x and its gradient, the output and its gradient pass once
    bytes_floor=lambda sizes, itemsize: (
        (frozen_flops(sizes) / sizes["tokens"] / 2 + 4 * _elements(sizes, "hidden")) * itemsize
    ),
    cpu_cut={"intermediate": 4, "hidden": 2},
    beside={"rank": 0},
    builds=True,
)
FP8 = Operation(
    name="fp8",
    about="linears of one input, of which each library multiplies 8-bit values and eager those of the dtype",
    tests=("tests/ops/test_fp8_linear.py", "-k", "test_equals_its_definition or test_noise_of_each_product"),
    models=("Llama-3.2-1B", "Llama-3-8B"),
    custom={"tokens": 4096, "in_features": 1024, "out_features": 4096, "trains": 1},
    sizes=lambda model: _linear_groups(model)[0],
    parts=_linear_groups,
    options=lambda model: {},
    inputs=_fp8_inputs,
    # two products where the weights are frozen, three where they train; as a share of the rate of the dtype's own products
    flops=lambda sizes: (4 + 2 * sizes["trains"]) * sizes["tokens"] * _linear_elements(sizes)[2],
    bytes_floor=_fp8_bytes,
    cpu_cut=dict.fromkeys(("in_features", "out_features", "out_features_2", "out_features_3"), 4),
    beside={"trains": 0},
    wrong=0.1,  # one value in 8 bits is up to 1/16 off
)
ACTIVATION = Operation(
    name="activation",
    about="the activation of an MLP without a gate",
    tests=("tests/ops/test_activation.py", *FAST),
    models=PLAIN,
    custom={"tokens": 4096, "intermediate": 6400},
    sizes=lambda model: {"intermediate": model.intermediate},
    options=lambda model: {"activation": model.activation},
    inputs=_activation_inputs,
    flops=lambda sizes: 12 * _elements(sizes, "intermediate"),
    bytes_floor=lambda sizes, itemsize: 5 * _elements(sizes, "intermediate") * itemsize,
)
ROPE = Operation(
    name="rope",
    about="queries and keys rotated by their positions",
    tests=("tests/ops/test_rope.py", *FAST),
    models=GATED,
    custom=HEADS,
    sizes=_head_shape,
    options=lambda model: {},
    inputs=_rope_inputs,
    flops=lambda sizes: 6 * _head_elements(sizes),
    # both ways read and write queries and keys, and read one row of cos and sin a token
    bytes_floor=lambda sizes, itemsize: 4 * (_head_elements(sizes) + _elements(sizes, "head_dim")) * itemsize,
)
ATTENTION = Operation(
    name="attention",
    about="causal attention",
    tests=("tests/ops/test_attention.py", *FAST),
    models=tuple(name for name in GATED if name != "Gemma-2-2B"),  # its scores have a soft-cap
    custom=HEADS,
    sizes=_head_shape,
    options=lambda model: {},
    inputs=_attention_inputs,
    # two products forward and five backward (one of them again), over the half of the pairs that causality leaves
    flops=lambda sizes: 7 * sizes["tokens"] * _elements(sizes, "head_dim") * sizes["heads"],
    bytes_floor=lambda sizes, itemsize: 6 * _head_elements(sizes) * itemsize,
)
LINEAR_CROSS_ENTROPY = Operation(
    name="linear_cross_entropy",
    about="output head and loss",
    tests=(
        "tests/ops/test_linear_cross_entropy.py",
        "-k",
        "test_every_option or test_rows or test_details or test_memory",
    ),
    models=GATED,
    custom={"tokens": 4096, "hidden": 512, "vocab": 128256, "ignored": 0.0},
    sizes=lambda model: {"hidden": model.hidden, "vocab": model.vocab},
    options=lambda model: {"softcap": model.softcap},
    inputs=_head_inputs,
    # three products on the tokens that count
    flops=lambda sizes: 6 * sizes["hidden"] * _elements(sizes, "vocab") * (1 - sizes["ignored"]),
    # the weight is read for the logits and for the gradient of hidden, and its gradient is written; likewise hidden
    bytes_floor=lambda sizes, itemsize: 3.0 * (sizes["vocab"] + sizes["tokens"]) * sizes["hidden"] * itemsize,
    ignored=(0.0, 0.5, 0.9),
    cpu_cut={"vocab": 8},
)
CROSS_ENTROPY = Operation(
    name="cross_entropy",
    about="the loss on logits that are there",
    tests=("tests/ops/test_cross_entropy.py", *FAST),
    models=GATED,
    custom={"tokens": 1024, "vocab": 128256, "ignored": 0.0},
    sizes=lambda model: {"vocab": model.vocab},
    options=lambda model: {"softcap": model.softcap},
    inputs=_loss_inputs,
    flops=lambda sizes: 8 * _elements(sizes, "vocab") * (1 - sizes["ignored"]),
    # the logits of tokens that count are read for the loss and for the gradient, all of which is written
    bytes_floor=lambda sizes, itemsize: (2 * (1 - sizes["ignored"]) + 1) * _elements(sizes, "vocab") * itemsize,
    ignored=(0.0, 0.5, 0.9),
    cpu_cut={"vocab": 8},
)


def _all() -> Mapping[str, Operation]:
    elementwise = [RMS_NORM, ADD_RMS_NORM, LAYER_NORM, GATED_LINEAR, ACTIVATION, ROPE]
    operations = [*elementwise, LORA, LORA_LAYER, FP8, ATTENTION, LINEAR_CROSS_ENTROPY, CROSS_ENTROPY]
    return {operation.name: operation for operation in operations}


OPERATIONS = _all()
