"""The loss without logits: the output head answers with `LazyLogits` in training steps that carry labels.

Two instances are re-typed: the head (an `nn.Linear`), and the model that owns it, whose forward only raises a flag on the head
around the original forward. No forward is copied, and `loss_function` is not touched: whatever the model does between its head
and `F.cross_entropy` is recorded, and models with a loss of their own work alike.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.linear_cross_entropy import KERNEL, linear_cross_entropy
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.lazy_logits import HeadCall, LazyLogits, LossRequest, Recipe, apply_recipe
from automodel_accel.patches.probe import PROBE_ERRORS, functional_copy
from automodel_accel.patches.retype import (
    MODEL,
    changed_by_accelerator,
    forward_replaced,
    has_backward_hooks,
    is_retyped,
    retype,
)

PROBE_HIDDEN = 8
PROBE_TOKENS = 5
FLAG = "_accel_lazy"  # set on the head while its owner runs a training forward with labels
LOGITS_STAY = "the model's own loss stays, with its logits"


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
        if not hasattr(type(module), "get_output_embeddings"):
            return None
        head = _output_head(module)
        if head is None and path:
            return None  # the body of a model; its owner is asked too
        if head is None:
            return Refusal(
                path or MODEL,
                "has no output head (get_output_embeddings() is None)",
                "norms and mlps are served all the same",
            )
        names = [name for name, child in module.named_modules() if child is head]
        if not names:
            return Refusal(path or MODEL, "its output head is not one of its modules", LOGITS_STAY)
        head_path = f"{path}.{names[0]}" if path else names[0]
        objection = _changed(path, module) or _changed(head_path, head) or _objection(head_path, head)
        if objection is not None:
            return objection
        if "labels" not in inspect.signature(type(module).forward).parameters:
            return Refusal(
                path or MODEL, "its forward takes no labels", "it computes no loss, so there is nothing to fuse"
            )
        form = LossForm(head.out_features, head.in_features, head.bias is not None)
        dtype: torch.dtype = head.weight.dtype
        choices = context.choices(KERNEL, dtype, form.vocab)
        return Claim(self.fusion, (path, head_path), form.label(), dtype, form, choices)

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """Native dtype first; then those that autocast or a cast of the whole model would bring."""
        return [(device, dtype) for dtype in dict.fromkeys((claim.dtype, torch.float32, torch.bfloat16))]

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """A narrow head of the real vocabulary with an ignored label, through lazy logits, in the two ways of a training step.

        The mean of plain logits, and the sum of scaled and soft-capped ones: what a kernel could get wrong in one way only.
        """
        form: LossForm = claim.form  # type: ignore[assignment]
        device: str = key[0]
        dtype: torch.dtype = key[1]
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "x": torch.randn(PROBE_TOKENS, PROBE_HIDDEN, generator=generator, dtype=torch.float64),
            "weight": torch.randn(form.vocab, PROBE_HIDDEN, generator=generator, dtype=torch.float64)
            * PROBE_HIDDEN**-0.5,
        }
        if form.bias:
            inputs["bias"] = torch.randn(form.vocab, generator=generator, dtype=torch.float64)
        target = torch.randint(form.vocab, (PROBE_TOKENS,), generator=generator)
        target[2] = -100
        target = target.to(device)
        plain = Recipe(torch.float32, computed_in=dtype, vocab=form.vocab)
        capped = replace(plain, scale=0.5, tanh=True, after=3.0)

        def losses(logits: Callable[[Recipe], Any], plain: Recipe, capped: Recipe) -> torch.Tensor:
            total = F.cross_entropy(logits(capped), target, reduction="sum") / 8  # as with num_items_in_batch
            return F.cross_entropy(logits(plain), target) + total

        def real(leaves: Mapping[str, torch.Tensor], *recipes: Recipe) -> torch.Tensor:
            def logits(recipe: Recipe) -> torch.Tensor:
                z = F.linear(leaves["x"], leaves["weight"], leaves.get("bias"))
                return apply_recipe(z.to(recipe.dtype), recipe)

            return losses(logits, *recipes)

        def ours(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            head = _narrow_head(leaves["weight"], leaves.get("bias"))
            retype(head, {"forward": _head_forward(nn.Linear.forward, {key: implementation}, Counts())}, None)
            return losses(lambda recipe: LazyLogits(leaves["x"], HeadCall(head, Counts()), recipe), plain, capped)

        wide = tuple(replace(recipe, dtype=torch.float64) for recipe in (plain, capped))
        return Experiment(
            inputs={name: tensor.to(device) for name, tensor in inputs.items()},
            dtypes=dict.fromkeys(inputs, dtype),
            theirs=lambda leaves: real(leaves, plain, capped),
            ours=ours,
            truth=lambda leaves: real(leaves, *wide),
        )

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the owner and its head."""
        owner, head = modules
        retype(head, {"forward": _head_forward(type(head).forward, proven, counts)}, counts)
        retype(owner, {"forward": _owner_forward(type(owner).forward)}, counts)


def _owner_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    names = [name for name in inspect.signature(original).parameters if name != "self"]
    labels_at = names.index("labels")

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        labels = args[labels_at] if len(args) > labels_at else kwargs.get("labels")
        labels = kwargs.get("shift_labels") if labels is None else labels
        head = self.get_output_embeddings() if labels is not None else None  # type: ignore[operator]
        # a replica of nn.DataParallel must return tensors, which is all that it can gather
        if not self.training or not torch.is_grad_enabled() or hasattr(self, "_is_replica") or not _is_lazy_head(head):
            return original(self, *args, **kwargs)
        setattr(head, FLAG, True)
        try:
            return original(self, *args, **kwargs)
        finally:
            setattr(head, FLAG, False)

    return forward


def _head_forward(original: Callable[..., Any], proven: Proven, counts: Counts) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Linear, input: torch.Tensor, request: Any = None) -> Any:  # nn.Linear's own name
        if isinstance(request, LossRequest):
            return _loss(self, input, request, proven, counts)
        if request is not None or not getattr(self, FLAG, False) or not _can_wait(self, input):
            return original(self, input)
        if has_backward_hooks(self):
            counts.count(counts.passed_on, "loss: the head has backward hooks, which need logits")
            return original(self, input)
        if _is_dropped_with_others(self):
            counts.count(
                counts.passed_on, "loss: FSDP2 drops the head's weight together with other modules'; shard it alone"
            )
            return original(self, input)
        dtype = _compute_dtype(input)
        if (input.device.type, dtype) not in proven:
            counts.count(counts.passed_on, f"loss: not proved for {(input.device.type, dtype)}")
            return original(self, input)
        return LazyLogits(
            input, HeadCall(self, counts), Recipe(dtype=dtype, computed_in=dtype, vocab=self.out_features)
        )

    return forward


def _loss(head: nn.Linear, hidden: torch.Tensor, request: LossRequest, proven: Proven, counts: Counts) -> torch.Tensor:
    recipe = request.recipe
    dtype = recipe.computed_in
    weight: torch.Tensor = head.weight
    bias: torch.Tensor | None = head.bias
    if recipe.vocab != weight.shape[0]:
        weight, bias = weight[: recipe.vocab], bias[: recipe.vocab] if bias is not None else None
    counts.count(counts.fused, "loss")
    return linear_cross_entropy(
        hidden.to(dtype),
        weight.to(dtype),
        request.target,
        bias=None if bias is None else bias.to(dtype),
        # after * tanh(scale * z) = softcap * tanh(scale * softcap * z / softcap)
        scale=recipe.scale * recipe.after if recipe.tanh else recipe.scale,
        softcap=abs(recipe.after) if recipe.tanh else None,
        ignore_index=request.ignore_index,
        label_smoothing=request.label_smoothing,
        reduction=request.reduction,
        implementation=proven[hidden.device.type, dtype],
    )


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which the head would compute: autocast's inside its region."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _can_wait(head: nn.Linear, hidden: Any) -> bool:
    return type(hidden) is torch.Tensor and hidden.dim() > 1 and hidden.shape[-1] == head.in_features


def _is_dropped_with_others(head: nn.Module) -> bool:
    """Whether FSDP2 frees the weight after the forward, in one unit with other modules.

    The loss would have to call the head, and so the unit, a second time: its backward would then free the others' weights early.
    """
    state = head._get_fsdp_state() if hasattr(head, "_get_fsdp_state") else None  # type: ignore[operator]
    if state is None or len(state._modules) == 1:
        return False
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)


def _is_lazy_head(head: Any) -> bool:
    return isinstance(head, nn.Linear) and hasattr(type(head), "_accel_owner")


def _output_head(module: nn.Module) -> Any:
    try:
        return module.get_output_embeddings()  # type: ignore[operator]
    except PROBE_ERRORS:  # a composite model may not say which of its heads it is
        return None


def _changed(path: str, module: nn.Module) -> Refusal | None:
    return changed_by_accelerator(path, module) or forward_replaced(path, module)


def _objection(path: str, head: nn.Module) -> Refusal | None:
    if is_retyped(head) or not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        return Refusal(
            path or MODEL, f"the output head is a {kind}, expected a torch.nn.Linear with its own forward", LOGITS_STAY
        )
    if type(head.weight) not in (nn.Parameter, torch.Tensor):
        return Refusal(
            path or MODEL, f"the head's weight is a {type(head.weight).__name__}: sharded or quantised", LOGITS_STAY
        )
    if not head.weight.dtype.is_floating_point or head.weight.dtype.itemsize < 2:
        return Refusal(path or MODEL, f"the head's weight is {head.weight.dtype}: quantised", LOGITS_STAY)
    return None


def _narrow_head(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    return functional_copy(  # type: ignore[return-value]
        nn.Linear(weight.shape[1], weight.shape[0], device="meta"),
        {"weight": weight, "bias": bias},  # type: ignore[dict-item]
    )
