"""What is checked of one architecture: vanilla and an applied copy take the same training step, in several ways.

Each check takes a `Case` and raises an AssertionError that says what differs, or `NotApplicable` where vanilla itself cannot do
what is asked.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

import automodel_accel as accel
from automodel_accel.patches.probe import PROBE_ERRORS
from tests.day0.zoo import Tiny, Type, tiny_model
from tests.swap.compare import Step, assert_as_good, assert_close, gradients

SEED = 3  # before each step: some models draw random numbers even without dropout
FIRST_DOCUMENT, TOKENS = 10, 24
BATCHES, REDRAWS, SIGNIFICANT = 6, 20, 0.01


class NotApplicable(Exception):
    """Vanilla cannot do what the check asks for, or computes something wrong itself; says what."""


@dataclass
class Case:
    """One architecture: the tiny model, its batch, and an applied copy.

    Attributes:
        tiny: The model and its batches; only copies of it run, for some models keep what a forward computed.
        batch: One training batch.
        settings: Passed to `apply`.
    """

    tiny: Tiny
    batch: dict[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def vanilla(self) -> nn.Module:
        """A fresh vanilla model."""
        return copy.deepcopy(self.tiny.model)

    def applied(self) -> nn.Module:
        """A fresh applied model."""
        return accel.apply(self.vanilla(), **self.settings)

    @cached_property
    def ours(self) -> nn.Module:
        """The applied model that several checks share."""
        return self.applied()

    @cached_property
    def vanilla_step(self) -> Step:
        """Vanilla's eager step, taken once."""
        return training_step(self.vanilla(), self.batch)

    @cached_property
    def is_repeatable(self) -> bool:
        """Whether vanilla gives the same loss twice, from the same random numbers."""
        return torch.equal(training_step(self.vanilla(), self.batch).loss, self.vanilla_step.loss)


def training_step(model: nn.Module, batch: Mapping[str, Any], run: Callable[..., Any] | None = None) -> Step:
    """Loss and gradients from clean gradients; `run` is called in place of the model (a compiled one)."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    loss = (model if run is None else run)(**batch).loss
    loss.backward()
    found = Step(loss.detach(), gradients(model))
    model.zero_grad(set_to_none=True)
    return found


def parity(case: Case) -> None:
    """Loss and every gradient, in float32."""
    assert_close(training_step(case.ours, case.batch), case.vanilla_step)


def served(case: Case) -> tuple[Counter[str], int]:
    """Calls of each fusion in one training step, and how often logits were built."""
    counts = accel.report(case.ours).counts
    counts.fused.clear()
    counts.materialised.clear()
    training_step(case.ours, case.batch)
    return Counter(counts.fused), counts.materialised.total()


def checkpointing(case: Case) -> None:
    """With gradient checkpointing, loss and every gradient are those of vanilla with it."""
    models = [case.vanilla(), case.applied()]
    try:
        for model in models:
            model.gradient_checkpointing_enable()
        theirs = training_step(models[0], case.batch)
    except PROBE_ERRORS as error:
        raise NotApplicable(f"vanilla does not support it: {_first_line(error)}") from error
    assert_close(training_step(models[1], case.batch), theirs)


def revert(case: Case) -> None:
    """After `revert`: the same classes, the same bits in the state, and a step of the same bits as vanilla's."""
    vanilla, ours = case.vanilla(), case.applied()
    training_step(vanilla, case.batch)
    training_step(ours, case.batch)
    accel.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in vanilla.modules()], "classes differ after revert"
    assert [sorted(vars(m)) for m in ours.modules()] == [sorted(vars(m)) for m in vanilla.modules()], "attributes stay"
    for name, before in vanilla.state_dict().items():
        assert torch.equal(ours.state_dict()[name], before), f"{name} changed"
    again, expected_step = training_step(ours, case.batch), training_step(vanilla, case.batch)
    assert torch.equal(again.loss, expected_step.loss), "the reverted model's loss differs"
    for name, expected in expected_step.gradients.items():
        assert torch.equal(again.gradients[name], expected), f"the reverted model's gradient of {name} differs"


def compiled(case: Case) -> None:
    """Under torch.compile(backend="aot_eager"), as right as vanilla under it."""
    try:
        vanilla = case.vanilla()
        theirs = training_step(vanilla, case.batch, _compile(vanilla))
        assert_close(theirs, case.vanilla_step)
    except (AssertionError, *PROBE_ERRORS) as error:
        raise NotApplicable(f"vanilla fails: {_first_line(error)}") from error
    finally:
        torch._dynamo.reset()
    try:
        ours = case.applied()
        assert_close(training_step(ours, case.batch, _compile(ours)), case.vanilla_step)
    finally:
        torch._dynamo.reset()


def bfloat16(case: Case) -> None:
    """In bfloat16, as near to the truth as vanilla in bfloat16: the losses and gradients of several batches as one vector.

    Where a rounding tips a router to another expert, or an activation over its kink, one element errs more than all others, on
    either side by chance. So a miss is tried again on other weights: ours may not miss the rule more often than vanilla does
    when the two change places.
    """
    try:
        assert_as_good(
            *_three(case, [case.batch, *(case.tiny.batch(seed=seed) for seed in range(1, BATCHES))]), torch.bfloat16
        )
    except AssertionError as missed:
        ours, theirs = _misses(case)
        at_least = sum(math.comb(ours + theirs, k) for k in range(ours, ours + theirs + 1)) / 2 ** (ours + theirs)
        if at_least < SIGNIFICANT:
            raise AssertionError(f"{missed}; of {REDRAWS} others ours misses {ours}, vanilla {theirs}") from missed


def _misses(case: Case) -> tuple[int, int]:
    """How often ours is not as good as vanilla, and vanilla not as good as ours, on other weights and batches."""
    ours = theirs = 0
    for seed in range(1, REDRAWS + 1):
        other = case_of(case.tiny.type, seed=seed)
        mine, vanillas, truth = _three(other, [other.batch])
        ours += not _is_as_good(mine, vanillas, truth)
        theirs += not _is_as_good(vanillas, mine, truth)
    return ours, theirs


def _is_as_good(one: Step, other: Step, truth: Step) -> bool:
    try:
        assert_as_good(one, other, truth, torch.bfloat16)
    except AssertionError:
        return False
    return True


def _three(case: Case, batches: list[dict[str, Any]]) -> tuple[Step, Step, Step]:
    """(ours, vanilla, truth): the steps of all batches in bfloat16, and of the same rounded numbers in float32."""
    vanilla = case.vanilla().bfloat16()
    models = (accel.apply(copy.deepcopy(vanilla), **case.settings), vanilla, copy.deepcopy(vanilla).float())
    steps: tuple[list[Step], ...] = ([], [], [])
    for batch in batches:
        low = {name: _to_bfloat16(value) for name, value in batch.items()}
        try:
            steps[1].append(training_step(vanilla, low))
            steps[2].append(training_step(models[2], {name: _to_float32(value) for name, value in low.items()}))
        except PROBE_ERRORS as error:
            raise NotApplicable(f"vanilla does not run: {_first_line(error)}") from error
        steps[0].append(training_step(models[0], low))
    return tuple(map(_together, steps))  # type: ignore[return-value]


def _together(steps: list[Step]) -> Step:
    losses = torch.stack([one.loss for one in steps])
    names = steps[0].gradients
    return Step(losses, {name: torch.stack([one.gradients[name] for one in steps]) for name in names})


def packed_rows(case: Case) -> None:
    """Two documents in one row: changing the first leaves the second's logits the same, bit by bit, and as if it were alone.

    Not bit by bit where they are not in vanilla either, but nearly: an expert's product rounds by how many rows it has.
    Where vanilla keeps documents apart, loss and every gradient of the packed row are its own. Where vanilla leaks although its
    attention is served by ours, ours must not.
    """
    vanilla, ours = case.vanilla().eval(), case.applied().eval()
    if getattr(getattr(vanilla, "config", None), "is_encoder_decoder", False):
        raise NotApplicable("a model with an encoder of its own has no packed rows")
    # with a cache, transformers lets even a fresh one stand in the way of keeping documents apart
    batch = {"input_ids": _row(5), "labels": _row(5), "position_ids": _positions(), "use_cache": False}
    try:
        expected = training_step(case.vanilla(), batch)
        alone = _logits(vanilla, _row(5)[:, FIRST_DOCUMENT:], _positions()[:, FIRST_DOCUMENT:])
        theirs = [_logits(vanilla, _row(filler), _positions())[:, FIRST_DOCUMENT:] for filler in (5, 6)]
    except PROBE_ERRORS as error:
        raise NotApplicable(f"vanilla takes no packed row of text: {_first_line(error)}") from error
    leaks = not _nearly_equal(*theirs)
    accel.report(ours).counts.fused.clear()
    mine = [_logits(ours, _row(filler), _positions())[:, FIRST_DOCUMENT:] for filler in (5, 6)]
    if leaks and not _nearly_equal(*mine):
        served = accel.report(ours).counts.fused["attention"]
        raise NotApplicable("leaks in vanilla too" + (", beside the attention that ours serves" if served else ""))
    same = _nearly_equal if leaks or not torch.equal(*theirs) else torch.equal
    assert same(*mine), "changing one document changes another one's logits; not so in vanilla"
    if not leaks:
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-5)
        assert_close(training_step(ours.train(), batch), expected)
    elif not torch.allclose(mine[0], alone, rtol=1e-5, atol=1e-5):
        # positions of its own, which do not start again: alone they differ, behind a mask of documents they do not
        masked = [
            _logits(vanilla, _row(filler), _positions(), _document_mask())[:, FIRST_DOCUMENT:] for filler in (5, 6)
        ]
        if torch.equal(*masked):  # else vanilla takes no such mask, and says nothing of what is right
            torch.testing.assert_close(mine[0], masked[0], rtol=1e-5, atol=1e-5)


CHECKS: Mapping[str, Callable[[Case], None]] = MappingProxyType(
    {
        "parity": parity,
        "checkpointing": checkpointing,
        "revert": revert,
        "packed rows": packed_rows,
        "bfloat16": bfloat16,
        "compiled": compiled,
    }
)


def case_of(type: Type, dtype: torch.dtype = torch.float32, seed: int = 0, **batch: Any) -> Case:
    """A fresh case; raises `Unbuildable`."""
    tiny = tiny_model(type, dtype=dtype, seed=seed)
    return Case(tiny, tiny.batch(**batch))


def _nearly_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-6 * other.abs().max())


def _row(filler: int) -> torch.Tensor:
    """Two documents in one row; the first consists of one token."""
    tokens = torch.arange(TOKENS)[None] % 7 + 20
    tokens[:, :FIRST_DOCUMENT] = filler
    return tokens


def _positions() -> torch.Tensor:
    return torch.cat([torch.arange(FIRST_DOCUMENT), torch.arange(TOKENS - FIRST_DOCUMENT)])[None]


def _document_mask() -> torch.Tensor:
    documents = (torch.arange(TOKENS) >= FIRST_DOCUMENT).long()
    return ((documents[:, None] == documents).tril())[None, None]


@torch.no_grad()
def _logits(
    model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    torch.manual_seed(SEED)
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
    return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]


def _compile(model: nn.Module) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")  # type: ignore[no-any-return]


def _to_bfloat16(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _first_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text.splitlines()[0][:160]
