"""What a rotary function computes, found by calling it with synthetic float64 tensors: its `RopeForm`, or none."""

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from automodel_accel.kernels.rope import LAYOUTS, reference
from automodel_accel.patches.probe import PROBE_ERRORS, all_close, gradients

# angles: cos and sin in one complex tensor
ROLES = (("q", "k", "cos", "sin"), ("q", "k", "angles"), ("q", "cos", "sin"), ("q", "sin", "cos"))
AXIS = "unsqueeze_dim"  # the one keyword that is understood: where cos and sin get the axis of the heads
TABLES = (
    "element",
    "pair",
    "first half",
)  # cos and sin: one value an element, one a pair, or a pair's in their first half
CLOSE = 1e-6  # of the largest element: many rotate in float32 whatever they are given
BATCH, TOKENS, Q_HEADS, K_HEADS, HEAD_DIM = 2, 3, 5, 1, 12  # all different, so that no axis is taken for another
MAGNITUDES = (1.0, 1e4, 1e-4)  # where a clamp or an eps shows

Place = tuple[int, int, int | None]  # dimensions of q, dimensions of cos, unsqueeze_dim (None where it is left out)
DIMENSIONS = ((4, 3), (3, 2), (4, 2))
AXES = (None, 0, 1, 2, -2, -3)


@dataclass(frozen=True, slots=True)
class RopeForm:
    """What one rotary function computes.

    Attributes:
        parameters: Names of the parameters that a call may give by position, q first.
        roles: What the first of them are, one of `ROLES`.
        layout: Which elements are a pair, as in `rope`.
        table: What cos and sin hold: one of `TABLES`.
        inverse: Whether it turns the other way.
        partial: Whether it copies the elements that cos does not reach.
        keep_dtype: Whether it returns q's dtype where cos is wider.
        places: Where it was proved to do so, each with the axis of the heads in q.
    """

    parameters: tuple[str, ...]
    roles: tuple[str, ...]
    layout: str
    table: str
    inverse: bool
    partial: bool
    keep_dtype: bool
    places: tuple[tuple[Place, int], ...]

    def label(self) -> str:
        """For the plan."""
        pairs = {"half": "half", "interleaved": "interleaved", "deinterleaved": "interleaved to half"}[self.layout]
        size = "a head or its front" if self.partial else "a head"
        way = ", backwards" if self.inverse else ""
        return f"rotary, {pairs}, {size}, one angle {self._angle()}{way}" + ("" if "k" in self.roles else ", singly")

    def _angle(self) -> str:
        return "an element" if self.table == "element" else "a pair"

    def table_size(self, rotary_dim: int) -> int:
        """Length of a row of cos for so many rotated elements."""
        return rotary_dim // 2 if self.table == "pair" else rotary_dim

    def used(self, table: torch.Tensor) -> torch.Tensor:
        """The part of cos or sin that is read."""
        return table[..., : table.shape[-1] // 2] if self.table == "first half" else table

    def options(self, head_axis: int) -> dict[str, Any]:
        """For `rope` and its definition."""
        return {
            "layout": self.layout,
            "head_axis": head_axis,
            "per_pair": self.table != "element",
            "inverse": self.inverse,
            "keep_dtype": self.keep_dtype,
        }

    def define(self, place: Place, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The definition's outputs."""
        options = self.options(dict(self.places)[place])
        cos, sin = self.used(tensors["cos"]), self.used(tensors["sin"])
        return [reference.rotate(tensors[name], cos, sin, **options) for name in ("q", "k") if name in self.roles]

    def call(
        self, function: Callable[..., Any], place: Place, tensors: dict[str, torch.Tensor]
    ) -> list[torch.Tensor] | None:
        """A rotary function's outputs; None where they are not one tensor for each of q and k."""
        axis = {} if place[2] is None else {AXIS: place[2]}
        if "angles" in self.roles:
            tensors = {**tensors, "angles": torch.complex(tensors["cos"], tensors["sin"])}
        output = function(*(tensors[role] for role in self.roles), **axis)
        outputs = list(output) if isinstance(output, tuple | list) else [output]
        together = "k" in self.roles
        fits = isinstance(output, tuple | list) == together and len(outputs) == 1 + together
        return outputs if fits and all(isinstance(one, torch.Tensor) for one in outputs) else None

    def draw(self, place: Place, rotary_dim: int, table_batch: int = BATCH) -> dict[str, torch.Tensor]:
        """Inputs for the probe, in float64."""
        generator = torch.Generator().manual_seed(0)
        drawn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        heads = {"q": Q_HEADS, "k": K_HEADS}
        tensors = {name: self.laid_out(drawn(BATCH, TOKENS, n, HEAD_DIM), place) for name, n in heads.items()}
        row = (table_batch, TOKENS, self.table_size(rotary_dim))[3 - place[1] :]
        return {**tensors, "cos": drawn(row), "sin": drawn(row)}

    def laid_out(self, x_BSHD: torch.Tensor, place: Place) -> torch.Tensor:
        """As the function takes q at that place."""
        x = x_BSHD[0] if place[0] == 3 else x_BSHD
        return x.transpose(-3, -2) if dict(self.places)[place] == x.dim() - 3 else x


def probe(function: types.FunctionType) -> RopeForm | None:
    """The form of a rotary function, or None where it computes something else."""
    parameters = inspect.signature(function).parameters
    by_position = tuple(p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    form = next((form for form in _simple_forms(by_position) if _matches(function, form, form.places[0][0])), None)
    if form is None:
        return None
    place = form.places[0][0]
    form = replace(form, partial=_matches(function, form, place, HEAD_DIM // 2))
    keep_dtype = _keeps_dtype(function, form, place)
    if keep_dtype is None or not _same_gradients(function, form, place):
        return None
    axes = AXES if AXIS in parameters else AXES[:1]
    candidates = ((form, dimensions, axis) for dimensions in DIMENSIONS for axis in axes)
    places = [one for candidate in candidates for one in _proved_places(function, *candidate)]
    return replace(form, keep_dtype=keep_dtype, places=tuple(places))


def _simple_forms(parameters: tuple[str, ...]) -> Iterator[RopeForm]:
    """Every form, at every place without a keyword."""
    kinds = list(itertools.product(LAYOUTS, TABLES, (False, True)))
    for roles, dimensions in itertools.product(ROLES, DIMENSIONS):
        if len(parameters) >= len(roles):
            for place, (layout, table, inverse) in itertools.product(_places(dimensions, None), kinds):
                yield RopeForm(parameters, roles, layout, table, inverse, False, False, (place,))


def _places(dimensions: tuple[int, int], axis: int | None) -> list[tuple[Place, int]]:
    q_dim, cos_dim = dimensions
    return [((q_dim, cos_dim, axis), head_axis) for head_axis in (q_dim - 3, q_dim - 2)]


def _proved_places(
    function: types.FunctionType, form: RopeForm, dimensions: tuple[int, int], axis: int | None
) -> Iterator[tuple[Place, int]]:
    for place in _places(dimensions, axis):
        if _matches(function, replace(form, places=(place,)), place[0]):
            yield place


def _matches(function: types.FunctionType, form: RopeForm, place: Place, rotary_dim: int = HEAD_DIM) -> bool:
    """Whether the function gives the definition's values for tables of one row and of each row, at every magnitude."""
    for table_batch in (BATCH, 1):
        tensors = form.draw(place, rotary_dim, table_batch)
        for magnitude in MAGNITUDES:
            given = {**tensors, **{name: tensors[name] * magnitude for name in ("q", "k")}}
            before = {name: tensor.clone() for name, tensor in given.items()}
            found = _outputs(function, form, place, given)
            if found is None or not all_close(found, form.define(place, before), CLOSE):
                return False
            if not all(torch.equal(given[name], tensor) for name, tensor in before.items()):
                return False  # it writes into its inputs
    return True


def _outputs(
    function: types.FunctionType, form: RopeForm, place: Place, tensors: dict[str, torch.Tensor]
) -> list[torch.Tensor] | None:
    try:
        return form.call(function, place, tensors)
    except PROBE_ERRORS:
        return None


def _keeps_dtype(function: types.FunctionType, form: RopeForm, place: Place) -> bool | None:
    """Whether a wider cos leaves the dtype as it is; None where the dtypes of q and cos decide in another way."""
    low, full = torch.bfloat16, torch.float32
    pairs = [(full, full), (low, full)]
    if "angles" not in form.roles:  # there is no complex bfloat16
        pairs = [(full, low), (low, low), *pairs]
    seen = []
    for x_dtype, table_dtype in pairs:
        dtypes = {"q": x_dtype, "k": x_dtype, "cos": table_dtype, "sin": table_dtype}
        tensors = {name: tensor.to(dtypes[name]) for name, tensor in form.draw(place, HEAD_DIM).items()}
        seen.append({output.dtype for output in _outputs(function, form, place, tensors) or ()})
    *plain, mixed = seen
    if plain != [{x_dtype} for x_dtype, _ in pairs[:-1]] or mixed not in ({low}, {full}):
        return None
    return mixed == {low}


def _same_gradients(function: types.FunctionType, form: RopeForm, place: Place) -> bool:
    tensors = form.draw(place, HEAD_DIM)
    names = [name for name in ("q", "k") if name in form.roles]

    def flat(outputs: list[torch.Tensor] | None) -> torch.Tensor:
        return torch.cat([output.flatten() for output in outputs or ()])

    def theirs(*leaves: torch.Tensor) -> torch.Tensor:
        return flat(form.call(function, place, {**tensors, **dict(zip(names, leaves, strict=True))}))

    def definition(*leaves: torch.Tensor) -> torch.Tensor:
        return flat(form.define(place, {**tensors, **dict(zip(names, leaves, strict=True))}))

    leaves = [tensors[name] for name in names]
    return all_close(gradients(theirs, leaves), gradients(definition, leaves), CLOSE)
