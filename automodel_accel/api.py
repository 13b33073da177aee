"""apply, parallelize, plan, report, revert, accelerated."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from automodel_accel.config import AccelConfig
from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.facts import Facts, this_machine
from automodel_accel.patches.checkpoint import checkpoint_layer, checkpointed_layers
from automodel_accel.patches.contract import Counts
from automodel_accel.patches.probe import undisturbed
from automodel_accel.patches.retype import is_retyped, owner_of, restore
from automodel_accel.plan import Plan, all_patches, make_plan
from automodel_accel.prove import proof_refusal, prove_all
from automodel_accel.report import Report

if TYPE_CHECKING:
    from peft import LoraConfig

    from automodel_accel.parallel.mesh import Mesh, Ranks

logger = logging.getLogger("automodel_accel")
Model = TypeVar("Model", bound=nn.Module)
# models in which nothing could be swapped: no class leads to their report
_REPORTS: "WeakKeyDictionary[nn.Module, Report]" = WeakKeyDictionary()


class RefusedError(ValueError):
    """With `strict=True`: an explicit request could not be met. Nothing was changed."""


def plan(
    model: nn.Module, config: AccelConfig | dict[str, Any] | None = None, *, facts: Facts | None = None, **fusions: Any
) -> Plan:
    """What `apply` would do to `model`, which is left untouched. Takes the arguments of `apply`.

    For a model that is applied already it is the plan that was followed.
    """
    _check_model(model)
    settings, machine = AccelConfig.build(config, **fusions), facts or this_machine()
    if (done := find_report(model)) is not None:
        _check_same_settings(model, done, settings)
        return done.plan
    _check_wrapping(model)
    with undisturbed(machine.device):
        return make_plan(model, settings, machine, all_patches())


def apply(
    model: Model,
    config: AccelConfig | dict[str, Any] | None = None,
    *,
    mesh: "Mesh | Ranks | None" = None,
    lora: "LoraConfig | dict[str, Any] | None" = None,
    facts: Facts | None = None,
    **fusions: Any,
) -> Model:
    """Swap fused kernels into `model`, in place, each proved on the spot; undo with `revert`.

    With a mesh the model is then spread over the processes, in this order: adapters, kernels (recompute is one of these), tensor
    parallel, torch.compile, FSDP2, HSDP or DDP. That cannot be undone by `revert`.

    Args:
        model: Any `torch.nn.Module`, on any device, meta included. Apply before wrappers (DDP, Trainer) are built.
        config: An `AccelConfig` or a dict of its fields.
        mesh: How the processes are laid out; each calls `apply` alike, and gets the values of the first one. A model that was
            applied without a mesh before keeps its settings where none are given.
        lora: A `peft.LoraConfig` or a dict of its fields: adapters to add first, as by `peft.get_peft_model`, whose PeftModel is
            then returned. Targets may hold wildcards: "*_proj".
        facts: The machine to decide for; this one by default.
        **fusions: Fields of `AccelConfig` by name: `norm="torch"`, `loss=False`, `strict=True`.

    Returns:
        The same model (with megatron-fsdp, which has no other way, its wrapper). `report(model)` says what was swapped, what was
        refused and why, and how it was spread.

    Raises:
        ValueError: an unknown setting or implementation, a target of `lora` that does not exist, the model is already applied with
            other settings, FSDP1 has wrapped it or a part of it, or it cannot be spread over the mesh.
        RefusedError: with `strict=True`, an explicit request was refused.
        In every case the model is left as it was.
    """
    _check_model(model)
    if mesh is not None:
        kept = find_report(model) if config is None and not fusions else None
        settings = AccelConfig.build(kept.plan.config if kept is not None else config, **fusions)
        return _apply_over(mesh, model, lora, settings, facts)
    settings = AccelConfig.build(config, **fusions)
    if lora is not None:
        return _apply_with_lora(model, lora, settings, facts)
    if (done := find_report(model)) is not None:
        return _already_applied(model, done, settings)
    _check_wrapping(model)
    patches = {patch.fusion: patch for patch in all_patches()}
    modules, machine = dict(model.named_modules()), facts or this_machine()
    with undisturbed(machine.device):
        found = make_plan(model, settings, machine, tuple(patches.values()))
        proofs = prove_all(found.claims, patches, modules)
    layers = checkpointed_layers(model) if settings.recompute == "full" else []
    no_proof = [(claim.fusion, no) for claim in found.claims if (no := proof_refusal(claim, proofs[claim.proof_key]))]
    claims = tuple(claim for claim in found.claims if proofs[claim.proof_key].refusal is None)
    result = Report(found, claims, found.refusals + tuple(no_proof), proofs, Counts())
    result.counts.report = result
    _speak_up(result, settings, no_proof)
    with ExitStack() as undo:
        for claim in claims:
            places = [modules[path] for path in claim.paths]
            for place in places:
                undo.callback(restore, place)
            patches[claim.fusion].swap(claim, places, proofs[claim.proof_key].proven, result.counts)
        for layer in layers:
            undo.callback(restore, layer)
            checkpoint_layer(layer, result.counts)
        undo.pop_all()
    if not claims and not layers:
        _REPORTS[model] = result
    return model


def parallelize(
    model: Model, mesh: "Mesh | Ranks", config: AccelConfig | dict[str, Any] | None = None, **settings: Any
) -> Model:
    """`apply(model, config, mesh=mesh, ...)`."""
    return apply(model, config, mesh=mesh, **settings)


def report(model: nn.Module) -> Report:
    """What `apply` did to `model` (or to the model inside a wrapper), and what was counted since.

    Raises:
        ValueError: `apply` was not called on it, or it was reverted.
    """
    _check_model(model)
    found = find_report(model)
    if found is None:
        raise ValueError(f"this {type(model).__name__} is not applied; call automodel_accel.apply(model) first.")
    return found


def revert(model: Model) -> Model:
    """Give every swapped module its original class back; bit-exact. A model that is not applied is left as it is.

    Raises:
        ValueError: it was spread over a mesh, or a wrapper (FSDP2's fully_shard) has derived its own classes from the swapped ones
            since.
    """
    _check_model(model)
    if (done := find_report(model)) is not None and done.mesh:
        raise ValueError(
            f"this {type(model).__name__} was spread over processes ({done.mesh}), which cannot be taken back; save it "
            "(model.save_pretrained) and load it."
        )
    modules = list(model.modules())
    wrapped = [type(module).__name__ for module in modules if owner_of(module) is not None and not is_retyped(module)]
    if wrapped:
        raise ValueError(
            f"{wrapped[0]} was derived from a swapped class after apply (fully_shard does that); revert before wrapping."
        )
    for module in modules:
        restore(module)
    _REPORTS.pop(model, None)
    return model


@contextmanager
def accelerated(
    model: Model, config: AccelConfig | dict[str, Any] | None = None, *, facts: Facts | None = None, **fusions: Any
) -> Iterator[Model]:
    """`apply` for the length of a with block; a model that was applied before stays applied. Takes the arguments of `apply`."""
    if find_report(model) is not None:
        yield apply(model, config, facts=facts, **fusions)
        return
    apply(model, config, facts=facts, **fusions)
    try:
        yield model
    finally:
        revert(model)


def _apply_with_lora(
    model: Model, lora: "LoraConfig | dict[str, Any]", settings: AccelConfig, facts: Facts | None
) -> Model:
    if find_report(model) is not None:
        raise ValueError(
            f"this {type(model).__name__} is already applied; call revert(model) before adding adapters by lora=."
        )
    from automodel_accel.adapters import left_as_it_was, with_lora  # PEFT takes a second to import

    with left_as_it_was(model):
        adapted: Any = with_lora(model, lora)
        apply(adapted, settings, facts=facts)
    return adapted  # type: ignore[no-any-return]


def _apply_over(
    mesh: "Mesh | Ranks",
    model: Model,
    lora: "LoraConfig | dict[str, Any] | None",
    settings: AccelConfig,
    facts: Facts | None,
) -> Model:
    from automodel_accel.parallel import order  # torch.distributed.fsdp takes time to import

    ranks = order.ranks_of(mesh)
    if (done := find_report(model)) is not None:
        order.check_not_spread(model, done.mesh)
        if lora is None:
            _check_same_settings(model, done, settings)
    order.check(model, ranks, settings, facts or this_machine())
    with _left_on_error(model, lora is not None):
        adapted = model if done is not None and lora is None else apply(model, settings, lora=lora, facts=facts)
        try:
            order.check_parameters(adapted, ranks)
            refusals = order.cut(adapted, ranks)
        except ValueError:
            if done is None:
                revert(adapted)
            raise
    before = find_report(adapted)
    assert before is not None
    spread, said = order.spread(adapted, ranks, before.counts)
    after = replace(before, mesh=said, refusals=(*before.refusals, *(("tensor", no) for no in refusals)))
    after.counts.report = after
    if adapted in _REPORTS:
        _REPORTS[adapted] = _REPORTS[spread] = after
    return spread  # type: ignore[return-value]


def _left_on_error(model: nn.Module, adapted: bool) -> AbstractContextManager[None]:
    if not adapted:
        return nullcontext()
    from automodel_accel.adapters import left_as_it_was  # PEFT takes a second to import

    return left_as_it_was(model)


def find_report(model: nn.Module) -> Report | None:
    """What `report` returns, or None where the model is not applied."""
    owners = (owner_of(module) for module in model.modules())
    counts = next((owner for owner in owners if isinstance(owner, Counts)), None)
    return counts.report if counts is not None else _REPORTS.get(model)  # type: ignore[return-value]


def _already_applied(model: Model, done: Report, settings: AccelConfig) -> Model:
    _check_same_settings(model, done, settings)
    logger.warning("this %s is already applied; nothing was changed. See report(model).", type(model).__name__)
    return model


def _check_same_settings(model: nn.Module, done: Report, settings: AccelConfig) -> None:
    if settings != done.plan.config:
        raise ValueError(
            f"this {type(model).__name__} is already applied with {done.plan.config}; call revert(model) before applying "
            f"{settings}."
        )


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, got a {type(model).__name__}.")


def _check_wrapping(model: nn.Module) -> None:
    """FSDP1 keeps the parameters of its modules elsewhere between calls. FSDP2's are in place: as DTensors, which have a mesh."""
    managed = any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())
    if managed and not any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            f"this {type(model).__name__} is wrapped by FullyShardedDataParallel already, which has moved its parameters; apply "
            "before it is wrapped: FullyShardedDataParallel(automodel_accel.apply(model), ...)."
        )


def _speak_up(result: Report, settings: AccelConfig, no_proof: list[tuple[str, Refusal]]) -> None:
    """Log failed proofs and refused requests; with `strict`, raise for requests."""
    asked_in_vain = [
        (fusion, no)
        for fusion, no in result.refusals
        if settings.is_explicit(fusion) and (no.what.startswith(f"{fusion}=") or not result.places(fusion))
    ]
    if settings.strict and asked_in_vain:
        raise RefusedError("; ".join(f"{fusion}: {no}" for fusion, no in asked_in_vain) + ". Nothing was changed.")
    for fusion, no in dict.fromkeys([*no_proof, *asked_in_vain]):
        logger.warning("%s refused: %s", fusion, no)
    if not result.applied:
        logger.warning("nothing in this %s could be swapped; print(report(model)) says why.", result.plan.model)
