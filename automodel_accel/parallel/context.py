"""Context parallelism: the tokens of a row are cut over the ranks of the `context` axis, which all are given the whole row.

The model cuts what it is given itself, so a loop stays as it is: each rank's loss is its share, of which the average over the
ranks is the loss of the whole rows, and averaged gradients (FSDP2's over shard and context) are those of the whole rows. Between
layers each rank holds its tokens only; attention gathers keys and values (context_attention.py). Exact for every mask that
transformers' causal mask functions build; anything else that mixes tokens is found by a probe (context_proof.py) and refused.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from automodel_accel.parallel.context_attention import ContextInterface, MaskFunction, Running
from automodel_accel.parallel.context_proof import check_rows, check_tokens_apart
from automodel_accel.parallel.context_rows import Rows
from automodel_accel.parallel.mesh import Ranks
from automodel_accel.patches.attention_call import INTERFACE, Dispatcher
from automodel_accel.patches.attention_masks import SERVED, makers_in, with_mask_functions
from automodel_accel.patches.heads import output_head
from automodel_accel.patches.rebind import loaded_globals, named_in, rebind_within
from automodel_accel.patches.retype import owner_of, retype

IGNORED = -100
REMEDY = "train it with Mesh(context=1)"
PROVED = "_accel_context_proved"  # on the model: whether its layers were seen to mix tokens by attention alone
# per token: name -> what the rows are filled up with; position ids go on counting
_PER_TOKEN: Mapping[str, int] = {"input_ids": 0, "inputs_embeds": 0, "attention_mask": 1, "token_type_ids": 0}
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")
_AS_IT_IS = ("return_dict", "output_attentions", "output_hidden_states")


def cut(model: nn.Module, ranks: Ranks) -> None:
    """Have `model` cut the rows it is given over the context ranks. After `apply`, before FSDP2; undone by `revert`.

    A forward with labels takes the whole rows, [B, S], the same on all ranks of the context axis, and returns the logits of this
    rank's tokens and its share of the loss: with `num_items_in_batch`, the sum over its labels divided by that; without, such
    that the average over the ranks is the mean over all labels. A forward without labels is not cut.

    Args:
        model: A causal language model whose attention asks transformers' interface, "sdpa" (or "eager", if `apply` proved it).
        ranks: With a context axis; one of size 1 changes nothing.

    Raises:
        ValueError: the model cannot be cut, and why; nothing was changed. The first forward raises one where something but
            attention mixes tokens, or the ranks were given different rows.
    """
    if ranks.mesh.context == 1:
        return
    owner = _owner(model)
    masked = [module for module in owner.modules() if "forward" in makers_in(type(module))]
    attentions = [module for module in owner.modules() if _asks_interface(module)]
    _check(owner, masked, attentions)
    running = Running()
    for module in masked:
        masks = with_mask_functions(type(module).forward, functools.partial(MaskFunction, running=running))  # type: ignore[arg-type]
        retype(module, {"forward": masks}, owner_of(module))
    served: dict[Any, Any] = {}  # one copy for all instances that are alike: torch.compile then compiles one
    for module in attentions:
        forward: Any = type(module).forward
        interface = _interface(module)
        if forward not in served:
            ours = ContextInterface(interface, running, *_scores(interface))
            served[forward] = rebind_within(forward, {INTERFACE: ours})
        retype(module, {"forward": served[forward]}, owner_of(module))
    counts_positions = any("cumsum" in named_in(type(module).forward) for module in masked)
    cutting = _owner_forward(type(owner).forward, running, ranks, counts_positions)
    retype(owner, {"forward": cutting, PROVED: False}, owner_of(owner))  # type: ignore[dict-item]


def _owner(model: nn.Module) -> nn.Module:
    """The module that computes the loss: the innermost one with an output head."""
    owners = [module for module in model.modules() if hasattr(module, "loss_function") and output_head(module)]
    if not owners:
        raise ValueError(
            f"context: this {type(model).__name__} has no output head and loss of transformers', of which tokens could be cut; "
            f"{REMEDY}."
        )
    return owners[-1]


def _check(owner: nn.Module, masked: list[nn.Module], attentions: list[nn.Module]) -> None:
    config: Any = owner.config
    name = type(owner).__name__
    parameters = inspect.signature(owner.loss_function).parameters  # type: ignore[arg-type]
    takes = inspect.signature(type(owner).forward).parameters.values()
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes)
    problems = {
        "is an encoder with a decoder": getattr(config, "is_encoder_decoder", False),
        "has an auxiliary loss over all tokens (output_router_logits)": getattr(config, "output_router_logits", False),
        "computes its loss itself, and would shift labels within a part of the row": (
            "loss_function" not in named_in(type(owner).forward)
            or not {"shift_labels", "num_items_in_batch"} <= parameters.keys()
            or not passes_on
        ),
        "builds no causal mask by transformers' mask functions": not masked,
        "has no attention that asks transformers' interface": not attentions,
        "takes no position_ids": any(
            "position_ids" not in inspect.signature(type(module).forward).parameters for module in masked
        ),
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"context: this {name} {problem}; {REMEDY}.")
    for module in attentions:
        implementation = module.config._attn_implementation  # type: ignore[union-attr]
        interface = _interface(module)
        if implementation not in SERVED or (implementation == "eager" and not isinstance(interface, Dispatcher)):
            raise ValueError(
                f"context: a {type(module).__name__} has the attention implementation {implementation!r}; expected 'sdpa', or "
                "'eager' where apply() has proved it. Load the model with attn_implementation='sdpa'."
            )


def _asks_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return inspect.isfunction(forward) and INTERFACE in loaded_globals(forward)


def _interface(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward).__globals__[INTERFACE]


def _scores(interface: Any) -> tuple[float | None, bool]:
    """The soft-cap and whether there are sinks, of an attention that `apply` proved."""
    site = interface.site if isinstance(interface, Dispatcher) else None
    return (None, False) if site is None else (site.softcap, site.sinks)


def _owner_forward(
    original: Callable[..., Any], running: Running, ranks: Ranks, counts_positions: bool
) -> Callable[..., Any]:
    names = [name for name in inspect.signature(original).parameters if name != "self"]
    group, size, rank = ranks.group("context"), ranks.mesh.context, ranks.rank_of("context")

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("labels") is None and given.get("shift_labels") is None:
            return original(self, *args, **kwargs)
        first = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        if first is None:
            raise ValueError("context: the model was given neither input_ids nor inputs_embeds.")
        if counts_positions and given.get("position_ids") is None and given.get("attention_mask") is not None:
            raise ValueError(
                "context: this model counts positions by its attention_mask; give it position_ids as well."
            )
        rows = Rows(group, size, rank, first.shape[1])
        if not getattr(self, PROVED):
            check_rows(first, rows)
            check_tokens_apart(self, original, running, first.device)
            setattr(self, PROVED, True)
        whole = _whole(given, first, rows)
        with _running(running, rows, whole):
            if given.get("position_ids") is None:  # of one document a row: mask functions need not look at them
                running.whole = {**whole, "position_ids": None}
            return original(self, **_own(given, running))

    return forward


@contextmanager
def _running(running: Running, rows: Rows, whole: Mapping[str, torch.Tensor | None]) -> Iterator[None]:
    running.rows, running.whole = rows, whole
    running.own = {name: None if x is None else rows.own(x) for name, x in whole.items()}
    try:
        yield
    finally:
        running.rows, running.whole, running.own = None, {}, {}


def _whole(given: Mapping[str, Any], first: torch.Tensor, rows: Rows) -> dict[str, torch.Tensor | None]:
    """What lies along tokens, in rows that are filled up."""
    for name, value in given.items():
        known = name in (*_PER_TOKEN, *_OF_THE_LOSS, *_AS_IT_IS, "position_ids", "use_cache")
        if value is not None and value is not False and not known:
            raise ValueError(
                f"context: the model was given {name}, and whether that lies along the tokens is not known; leave it out "
                f"(documents of packed rows are said by position_ids), or {REMEDY}."
            )
    shape = first.shape[:2]
    whole: dict[str, torch.Tensor | None] = {}
    for name, fill in _PER_TOKEN.items():
        if (x := given.get(name)) is not None:
            if x.shape[:2] != shape or (name != "inputs_embeds" and x.dim() != 2):
                raise ValueError(f"context: {name} has shape {tuple(x.shape)}; expected {tuple(shape)}.")
            whole[name] = rows.filled(x, fill)
    whole["position_ids"] = _positions(given.get("position_ids"), first, rows)
    whole["shift_labels"] = rows.filled(_shifted(given, shape), IGNORED)
    return {"attention_mask": None, **whole}


def _positions(position_ids: Any, first: torch.Tensor, rows: Rows) -> torch.Tensor:
    if position_ids is None:
        return torch.arange(rows.length, device=first.device)[None]
    if position_ids.dim() != 2 or position_ids.shape[1] != rows.tokens:
        raise ValueError(
            f"context: position_ids have shape {tuple(position_ids.shape)}; expected [1 or B, {rows.tokens}]."
        )
    more = torch.arange(1, rows.length - rows.tokens + 1, device=position_ids.device)
    return torch.cat([position_ids, position_ids[:, -1:] + more], 1)


def _shifted(given: Mapping[str, Any], shape: torch.Size) -> torch.Tensor:
    """[B, S] labels of the next token: shifted before the cut, so that none is lost at its edges."""
    shifted: torch.Tensor | None = given.get("shift_labels")
    if shifted is None:
        shifted = F.pad(given["labels"], (0, 1), value=IGNORED)[:, 1:]
    if shifted.shape != shape:
        raise ValueError(f"context: labels have shape {tuple(shifted.shape)}; expected {tuple(shape)}.")
    return shifted


def _own(given: Mapping[str, Any], running: Running) -> dict[str, Any]:
    """The arguments of the forward of this rank's tokens."""
    rows, whole, own = running.rows, running.whole, running.own
    assert rows is not None
    items = given.get("num_items_in_batch")
    if items is None:
        items = (whole["shift_labels"] != IGNORED).sum() / rows.size  # type: ignore[union-attr]
    kept = {name: given[name] for name in _AS_IT_IS if given.get(name) is not None}
    return {**kept, **own, "labels": own["shift_labels"], "num_items_in_batch": items, "use_cache": False}
