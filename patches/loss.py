"""The loss without logits: the output head answers with `LazyLogits` in training steps that carry labels.

Re-typed are the head (an `nn.Linear`) and the model that owns it, whose forward only raises a flag on the head around the
original forward. No forward is copied, and `loss_function` is not touched: whatever the model does between its head and
`F.cross_entropy` is recorded, and models with a loss of their own work alike. So do adapters: where PEFT has put its modules
around the head, before `apply` or after it, the linears in them are re-typed like the head, and PEFT's own forward runs on what
they give. A LoRA adapter's is recorded as a low-rank sum; what is not recorded builds the logits.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from automodel_accel.kernels.collectives import copy_to
from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.linear_cross_entropy import KERNEL, linear_cross_entropy
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.head_call import HeadCall, LossRequest, Recipe, Summand, widest
from automodel_accel.patches.heads import (
    LOGITS_STAY,
    drops_weights,
    is_dropped_with_others,
    is_plain_linear,
    labels_parameter,
    linears_of,
    named_head,
    objection,
    output_head,
)
from automodel_accel.patches.lazy_logits import LazyLogits
from automodel_accel.patches.probe import functional_copy
from automodel_accel.patches.rebind import named_in
from automodel_accel.patches.retype import MODEL, changed_by_accelerator, forward_replaced, has_backward_hooks, retype
from automodel_accel.patches.vocab import VocabShard, own_rows, parallel_logits, prefix, vocab_length, vocab_shard

PROBE_HIDDEN = 8
PROBE_TOKENS = 5
PROBE_RANK, PROBE_FACTOR, PROBE_REACHED = 2, 0.5, 64
ADAPTED_VOCAB = 4096  # the kernel that walks along the vocabulary is proved without an adapter
FLAG = "_accel_lazy"  # on the head's linears: not 0 while their owner runs a training forward with labels
RAISED, ASKED = 1, 2
LOSS_ONLY = "_accel_loss_only"  # on the class of each owner; on an owner: nobody looks at what it returns but the loss
TORCHS_OWN = F.softmax.__module__  # another accelerator may replace cross_entropy, and would be given what is no tensor
LAZY = "_accel_head"  # on the class of a linear whose product may wait


@dataclass(frozen=True, slots=True)
class LossForm:
    """Sizes of the head."""

    vocab: int
    hidden: int
    bias: bool

    def label(self) -> str:
        """For the plan."""
        return f"linear_cross_entropy, vocabulary {self.vocab}, hidden {self.hidden}" + (", bias" if self.bias else "")


class LossPatch:
    """Matches, proves and swaps a model's head and loss."""

    fusion = "loss"
    kernel = KERNEL

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise a model that owns an output head."""
        head = output_head(module)
        if head is None and (path or not hasattr(type(module), "get_output_embeddings")):
            return None  # the body of a model; its owner is asked too
        if head is None:
            return Refusal(
                path or MODEL,
                "has no output head (get_output_embeddings() is None)",
                "norms and mlps are served all the same",
            )
        paths = {child: f"{path}.{name}" if path and name else path + name for name, child in module.named_modules()}
        if head not in paths:
            return Refusal(path or MODEL, "its output head is not one of its modules", LOGITS_STAY)
        base, *others = linears_of(head)
        changed = changed_by_accelerator(path, module) or forward_replaced(path, module)
        if (refusal := changed or objection(paths[base], base)) is not None:
            return refusal
        assert isinstance(base, nn.Linear)
        if labels_parameter(type(module).forward) is None:
            return Refusal(
                path or MODEL, "its forward takes no labels", "it computes no loss, so there is nothing to fuse"
            )
        form = LossForm(base.out_features, base.in_features, base.bias is not None)
        dtype: torch.dtype = base.weight.dtype
        choices = context.choices(KERNEL, dtype, form.vocab)
        served = [paths[linear] for linear in others if objection(paths[linear], linear) is None]
        label = form.label() + (", adapted" if head is not base else "")
        return Claim(self.fusion, (path, *served, paths[base]), label, dtype, form, choices)

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """Native dtype first; then those that autocast or a cast of the whole model would bring.

        A third entry is the dtype of a LoRA adapter: that of the head, or the float32 in which PEFT keeps it.
        """
        dtypes = list(dict.fromkeys((claim.dtype, torch.float32, torch.bfloat16)))
        adapted = [(dtype, low) for dtype in dtypes for low in (dtype, torch.promote_types(dtype, torch.float32))]
        return [*((device, dtype) for dtype in dtypes), *((device, *pair) for pair in dict.fromkeys(adapted))]

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """A narrow head of the real vocabulary with an ignored label, through lazy logits, in the two ways of a training step.

        The mean of plain logits, and the sum of scaled and soft-capped ones: what a kernel could get wrong in one way only.
        """
        form: LossForm = claim.form  # type: ignore[assignment]
        device, dtype, *low = key
        inputs = _draw(form, adapted=bool(low))
        dtypes = {name: low[0] if name.startswith("lora") else dtype for name in inputs}
        vocab = inputs["weight"].shape[0]
        target = torch.randint(vocab, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(1))
        target[2] = -100
        target = target.to(device)

        def losses(head: Callable[[], Any]) -> torch.Tensor:
            logits, capped = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (head(), head()))
            capped = torch.tanh(capped * 0.5) * 3.0
            total = F.cross_entropy(capped, target, reduction="sum") / 8  # as with num_items_in_batch
            return F.cross_entropy(logits, target) + total

        def real(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return losses(lambda: _adapted(leaves, F.linear))

        def ours(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            proven = dict.fromkeys((key, key[:2], (device, *low)), implementation)

            def lazy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
                linear = _narrow_head(weight, bias)
                retype(linear, {"forward": _head_forward(nn.Linear.forward, proven, Counts())}, None)
                setattr(linear, FLAG, RAISED)
                return linear(x)

            return losses(lambda: _adapted(leaves, lazy))

        return Experiment(
            inputs={name: tensor.to(device) for name, tensor in inputs.items()},
            dtypes=dtypes,
            theirs=real,
            ours=ours,
            truth=real,
        )

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the owner and the linears of its head."""
        owner, *linears = modules
        for linear in linears:
            _make_lazy(linear, proven, counts)
        find: Callable[[nn.Module], Any] = named_head
        if named_head(owner) is None:
            find = operator.methodcaller("get_submodule", claim.paths[-1].removeprefix(claim.paths[0]).lstrip("."))
        forward = _owner_forward(type(owner).forward, find, proven, counts)
        retype(owner, {"forward": forward, LOSS_ONLY: False}, counts)  # type: ignore[dict-item]


def _draw(form: LossForm, adapted: bool) -> dict[str, torch.Tensor]:
    """Normal values; with an adapter, such that logits are multiples of 1/32 below 8, which every dtype holds.

    Ours rounds the sum once, and PEFT each of its parts: on a handful of losses it would be chance which is nearer to the truth.
    For the same reason only every so many classes have weights: gradients are sums of few terms, in whatever order.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = min(form.vocab, ADAPTED_VOCAB) if adapted else form.vocab

    def draw(*shape: int, scale: float = 1.0, most: float = 1.0, steps: int = 2) -> torch.Tensor:
        if adapted:
            return torch.randint(-steps, steps + 1, shape, generator=generator, dtype=torch.float64) * (most / steps)
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    weight = draw(vocab, PROBE_HIDDEN, scale=PROBE_HIDDEN**-0.5, most=0.5)
    inputs = {"x": draw(PROBE_TOKENS, PROBE_HIDDEN), "weight": weight}
    if form.bias:
        inputs["bias"] = draw(vocab, steps=4)
    if adapted:
        reached = (torch.arange(vocab) % max(vocab // PROBE_REACHED, 1) == 0)[:, None]
        inputs["weight"] = weight * reached
        inputs["lora_a"] = draw(PROBE_RANK, PROBE_HIDDEN, most=0.5, steps=1)
        inputs["lora_b"] = draw(vocab, PROBE_RANK, most=0.5) * reached
    return inputs


def _adapted(leaves: Mapping[str, torch.Tensor], linear: Callable[..., Any]) -> Any:
    """A head's logits, and what PEFT's LoRA makes of them if there is an adapter."""
    logits = linear(leaves["x"], leaves["weight"], leaves.get("bias"))
    if "lora_a" not in leaves:
        return logits
    lora_x = F.linear(leaves["x"].to(leaves["lora_a"].dtype), leaves["lora_a"])
    return (logits + linear(lora_x, leaves["lora_b"]) * PROBE_FACTOR).to(logits.dtype)


@contextmanager
def loss_only(model: nn.Module) -> Iterator[None]:
    """Inside, a forward with labels builds no logits in evaluation either; for callers that take nothing but the loss."""
    owners = [module for module in model.modules() if hasattr(type(module), LOSS_ONLY)]
    for owner in owners:
        setattr(owner, LOSS_ONLY, True)
    try:
        yield
    finally:
        for owner in owners:
            delattr(owner, LOSS_ONLY)


def _make_lazy(linear: nn.Module, proven: Proven, counts: Counts) -> None:
    retype(linear, {"forward": _head_forward(type(linear).forward, proven, counts), LAZY: True}, counts)  # type: ignore[dict-item]


def _owner_forward(
    original: Callable[..., Any], find: Callable[[nn.Module], Any], proven: Proven, counts: Counts
) -> Callable[..., Any]:
    positions = [name for name in inspect.signature(original).parameters if name != "self"]
    name = labels_parameter(original)
    assert name is not None
    labels_at = positions.index(name) if name in positions else len(positions)
    builds_loss = "CrossEntropyLoss" in named_in(original)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        labels = args[labels_at] if len(args) > labels_at else kwargs.get(name)
        labels = kwargs.get("shift_labels") if labels is None else labels
        # a replica of nn.DataParallel must return tensors, which is all that it can gather
        wanted = (self.training and torch.is_grad_enabled()) or getattr(
            self, LOSS_ONLY, False
        )  # reverted, but called by a wrapper
        if labels is None or not wanted or hasattr(self, "_is_replica"):
            return original(self, *args, **kwargs)
        if F.cross_entropy.__module__ != TORCHS_OWN:
            counts.count(counts.passed_on, f"loss: torch's cross_entropy was replaced by {F.cross_entropy.__module__}")
            return original(self, *args, **kwargs)
        # Dynamo calls a loss module that is built inside of a forward by itself, and breaks the graph at anything but a tensor
        if builds_loss and torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        linears = _ready_linears(find(self), proven, counts)
        for linear in linears:
            setattr(linear, FLAG, RAISED)
        try:
            outputs = original(self, *args, **kwargs)
            if linears and all(getattr(linear, FLAG) == RAISED for linear in linears):
                counts.count(
                    counts.passed_on, "loss: the head's linear was not called; its weight is used by something else"
                )
            return outputs
        finally:
            for linear in linears:
                setattr(linear, FLAG, 0)

    return forward


def _ready_linears(head: Any, proven: Proven, counts: Counts) -> list[nn.Module]:
    """The linears that may give lazy products: none where the head is another one than that which was proved.

    Adapters may have come since `apply`: their linears are re-typed here, but not under torch.compile, which traces types.
    """
    linears = linears_of(head) if isinstance(head, nn.Module) else []
    if not linears or not _is_lazy(linears[0]):
        remedy = "; revert and apply again to fuse it" if is_plain_linear(head) else ""
        counts.count(
            counts.passed_on, f"loss: the head is a {type(head).__name__} now, not the one that was proved{remedy}"
        )
        return []
    if linears == [head]:
        return linears
    if drops_weights(head):
        counts.count(
            counts.passed_on,
            "loss: FSDP2 drops the weights of the adapted head after its forward; leave it to the root",
        )
        return []
    if not torch.compiler.is_compiling():
        for linear in linears:
            if is_plain_linear(linear):
                _make_lazy(linear, proven, counts)
    return [linear for linear in linears if _is_lazy(linear)]


def _head_forward(original: Callable[..., Any], proven: Proven, counts: Counts) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Linear, input: torch.Tensor, request: Any = None) -> Any:  # nn.Linear's own name
        if isinstance(request, LossRequest):
            return _loss(self, input, request, proven, counts)
        if request is not None or not getattr(self, FLAG, 0):
            return parallel_logits(original, self, input)
        setattr(self, FLAG, ASKED)
        if not _can_wait(self, input):
            return parallel_logits(original, self, input)
        if has_backward_hooks(self):
            counts.count(counts.passed_on, "loss: the head has backward hooks, which need logits")
            return parallel_logits(original, self, input)
        if is_dropped_with_others(self):
            counts.count(
                counts.passed_on, "loss: FSDP2 drops the head's weight together with other modules'; shard it alone"
            )
            return parallel_logits(original, self, input)
        autocast = torch.is_autocast_enabled(input.device.type)
        dtype = torch.get_autocast_dtype(input.device.type) if autocast else input.dtype
        if (input.device.type, dtype) not in proven:
            counts.count(counts.passed_on, f"loss: not proved for {(input.device.type, dtype)}")
            return parallel_logits(original, self, input)
        call = HeadCall((Summand(self, dtype),), counts, proven, autocast)
        return LazyLogits((input,), call, Recipe(dtype=dtype, computed_in=dtype, vocab=vocab_length(self)))

    return forward


def _loss(head: nn.Linear, hidden: torch.Tensor, request: LossRequest, proven: Proven, counts: Counts) -> torch.Tensor:
    recipe, dtype = request.recipe, request.recipe.computed_in
    shard = vocab_shard(head)
    group = None if shard is None else shard.group
    counted = None if shard is None else prefix(shard, recipe.vocab)
    vocab = recipe.vocab if counted is None else counted.stop - counted.start
    weight, bias = head.weight[:vocab], _bias(head, request, shard)
    lora_x, lora_b = _low_rank(request, shard)
    counts.count(counts.fused, "loss")
    return linear_cross_entropy(
        copy_to(hidden.to(dtype), group),
        weight.to(dtype),
        request.target,
        bias=None if bias is None else bias[:vocab].to(dtype),
        lora_x=None if lora_x is None else copy_to(lora_x, group),
        lora_b=None if lora_b is None else lora_b[:vocab],
        # after * tanh(scale * z) = softcap * tanh(scale * softcap * z / softcap)
        scale=recipe.scale * recipe.after if recipe.tanh else recipe.scale,
        softcap=abs(recipe.after) if recipe.tanh else None,
        ignore_index=request.ignore_index,
        label_smoothing=request.label_smoothing,
        z_loss=request.z_loss,
        reduction=request.reduction,
        shard=counted,
        implementation=proven[hidden.device.type, dtype],
    )


def _bias(head: nn.Linear, request: LossRequest, shard: VocabShard | None) -> torch.Tensor | None:
    """All that is the same for every token: biases of the head and of its adapters, and the model's own row."""
    rows: list[torch.Tensor] = [] if head.bias is None else [head.bias]
    for low, _ in request.low_rank:
        if low.linear.bias is not None:
            rows.append(own_rows(low.linear.bias, low.linear, shard) * low.factor)
    rows += [] if request.row is None else [own_rows(request.row, None, shard)]
    return functools.reduce(torch.add, rows) if rows else None


def _low_rank(request: LossRequest, shard: VocabShard | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The low-rank term; several adapters are one of the sum of their ranks."""
    if not request.low_rank:
        return None, None
    head = Summand(None, request.recipe.computed_in)
    dtype = widest([head, *(low for low, _ in request.low_rank)])
    x = [hidden.to(dtype) * low.factor for low, hidden in request.low_rank]
    b = [own_rows(low.linear.weight, low.linear, shard).to(dtype) for low, _ in request.low_rank]
    return (x[0], b[0]) if len(x) == 1 else (torch.cat(x, -1), torch.cat(b, -1))


def _can_wait(head: nn.Linear, hidden: Any) -> bool:
    return type(hidden) is torch.Tensor and hidden.dim() > 1 and hidden.shape[-1] == head.in_features


def _is_lazy(linear: nn.Module) -> bool:
    return isinstance(linear, nn.Linear) and getattr(type(linear), LAZY, False)


def _narrow_head(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    return functional_copy(  # type: ignore[return-value]
        nn.Linear(weight.shape[1], weight.shape[0], device="meta"),
        {"weight": weight, "bias": bias},  # type: ignore[dict-item]
    )
