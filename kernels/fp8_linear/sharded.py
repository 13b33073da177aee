"""Weights that FSDP2 gathers in 8 bits: half of the bytes of bfloat16 on the wire, and no cast where they are whole.

    rows of a process, cast by the scale of the whole -> all-gather of bytes -> Gathered [F, H], whose cast `fp8_linears` takes

With one scale for a tensor, that is of all processes, and of all weights that are cast together: it comes from one all-reduce of
the largest absolute values of all weights, at the first gather after they have changed. With one for a row nothing is reduced: rows
are whole on a process, and their scales travel in the same all-gather. So a step has the bits of one that gathers the weights as
they are: the cast of a part with the scale of the whole is the part of the cast.

Parameters stay what they are: the DTensors of FSDP2, in their dtype, in the optimizer and in every state_dict. What torch looks up
before it gathers (`fsdp_pre_all_gather`, `fsdp_post_all_gather`) is set as attributes on the local tensor of a parameter, where no
copy of it has them; a parameter that is replaced is gathered as it is.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import distributed

from automodel_accel.kernels.fp8_linear import casts as casts_of_torch
from automodel_accel.kernels.fp8_linear.casts import Cast
from automodel_accel.kernels.fp8_linear.scaling import formats_here
from automodel_accel.kernels.fp8_linear.weights import STEPS

PRE, POST = "fsdp_pre_all_gather", "fsdp_post_all_gather"  # names that FSDP2 looks up
aten = torch.ops.aten


class Gathered(torch.Tensor):
    """A weight [F, H] that is there in 8 bits alone. To any other operation it is the values that they stand for; none may write."""

    _extension: "_Extension"

    @staticmethod
    def __new__(cls, extension: "_Extension", like: torch.Tensor, dtype: torch.dtype) -> "Gathered":
        """A tensor of the shape of `like` and of `dtype`, without memory of its own."""
        made = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=dtype, device=like.device)
        made._extension = extension
        return made

    @property
    def cast(self) -> Cast:
        """As it was gathered last: q [F, H], and its scale, [] or [F, 1]."""
        assert self._extension.cast is not None
        return self._extension.cast

    def values(self) -> torch.Tensor:
        """What the cast stands for, exactly where the dtype has its range."""
        cast = self.cast
        assert cast.q is not None
        return (cast.q.float() * cast.scale).to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func._schema.is_mutable:
            raise RuntimeError(
                f"fp8_linear: {func} would write into a weight that was gathered in 8 bits; write into the parameter outside of "
                "the forward, or gather it as it is."
            )
        this = args[0]
        if func is aten.detach.default or (func is aten.as_strided.default and _is_whole(this, *args[1:])):
            return Gathered(this._extension, this, this.dtype)
        args, kwargs = torch.utils._pytree.tree_map_only(Gathered, Gathered.values, (args, kwargs or {}))
        return func(*args, **kwargs)


def _is_whole(this: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> bool:
    return tuple(size) == this.shape and tuple(stride) == this.stride() and not offset


def is_gathered(weights: Sequence[torch.Tensor]) -> bool:
    """Whether one of these is a weight that was gathered in 8 bits."""
    return any(isinstance(weight, Gathered) for weight in weights)


def joined(weights: Sequence[torch.Tensor], rowwise: bool) -> Cast | None:
    """The cast of weights that were gathered in 8 bits for this kind of scale and together, without q_t; else None."""
    if not all(isinstance(weight, Gathered) for weight in weights):
        return None
    alike = {weight._extension.alike for weight in weights if isinstance(weight, Gathered)}
    if len(alike) > 1 or rowwise != (None in alike):
        return None
    cast, *others = (weight.cast for weight in weights if isinstance(weight, Gathered))
    if not others:
        return cast
    parts = [part.q for part in (cast, *others) if part.q is not None]
    q = torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return Cast(q, None, torch.cat([part.scale for part in (cast, *others)]) if rowwise else cast.scale)


def objection(weight: torch.Tensor) -> str | None:
    """Why this parameter cannot be gathered in 8 bits, or None."""
    placements: Any = getattr(weight, "placements", None)
    if placements is None:
        return "it is no parameter of FSDP2; fully_shard comes first"
    *others, last = placements
    if type(last).__name__ != "Shard" or not last.is_shard(0) or not all(other.is_replicate() for other in others):
        return f"it lies as {tuple(placements)}; rows over the processes are what is gathered"
    local, mesh = _local(weight), _mesh(weight)
    count = mesh.size(mesh.ndim - 1)
    if count == 1:
        return "one process has all of it: nothing is gathered"
    if weight.dim() != 2 or weight.shape[0] % count:
        return f"its shape {tuple(weight.shape)} has no equal rows for {count} processes"
    if local.is_meta:
        return "it is on the meta device; its values come first"
    if local.device.type != mesh.device_type:
        return f"it is kept on {local.device.type} and gathered on {mesh.device_type} (CPUOffloadPolicy)"
    return None


def gather_in_8_bits(
    groups: Sequence[Sequence[torch.Tensor]], rowwise: bool, casts: ModuleType = casts_of_torch
) -> Callable[[], None]:
    """From now on FSDP2 gathers these parameters in 8 bits: between `fully_shard` and the first forward, in every process alike.

    Torch itself refuses what comes too late: this after the first forward (AttributeError), and after the first gather another
    parameter in the place of one of these (RuntimeError; `load_state_dict(assign=True)`).

    Args:
        groups: Of parameters [F, H] of linears; those of one group are cast together (they share an input).
        rowwise: Whether each row has a scale of its own, as the `Recipe` has it; else one serves a group.
        casts: What casts: casts.py or casts_fused.py.

    Returns:
        What undoes it.

    Raises:
        ValueError: a parameter cannot be gathered so; see `objection`. From what is returned: FSDP2 has gathered already, and
            keeps what it allocated for that.
    """
    for weight in (weight for group in groups for weight in group):
        if (reason := objection(weight)) is not None:
            raise ValueError(f"fp8_linear: a weight cannot be gathered in 8 bits: {reason}.")
    STEPS.watch()
    extensions = []
    for of_mesh in _of_one_mesh(groups):
        largest = _Largest(of_mesh)
        for number, group in enumerate(of_mesh):
            extensions += [_Extension(weight, None if rowwise else (largest, number), casts) for weight in group]
    for extension in extensions:
        extension.set()

    def undo() -> None:
        if any(extension.cast is not None for extension in extensions):
            raise ValueError(
                "fp8_linear: FSDP2 has gathered in 8 bits already, and keeps what it allocated for that; save the model, build "
                "it again and load it, without fp8."
            )
        for extension in extensions:
            extension.remove()

    return undo


def _of_one_mesh(groups: Sequence[Sequence[torch.Tensor]]) -> list[list[Sequence[torch.Tensor]]]:
    found: dict[Any, list[Sequence[torch.Tensor]]] = {}
    for group in groups:
        if len({_mesh(weight) for weight in group}) != 1:
            raise ValueError("fp8_linear: weights that are cast together are sharded over different processes.")
        found.setdefault(_mesh(group[0]), []).append(group)
    return list(found.values())


class _Hook:
    """A method on a tensor; where that is copied or pickled, an empty dict takes its place, which needs nothing of ours."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.__wrapped__ = method  # whose signature FSDP2 reads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()


class _Extension:
    """What FSDP2 calls for one parameter.

    Attributes:
        alike: Where the largest value comes from that gives the scale; None: each row has its own.
        cast: As it was gathered last.
    """

    def __init__(self, weight: torch.Tensor, alike: "tuple[_Largest, int] | None", casts: ModuleType) -> None:
        self._weight, self._casts = weight, casts
        self.alike = alike
        self.cast: Cast | None = None

    def set(self) -> None:
        """On the local tensor of the parameter."""
        vars(_local(self._weight)).update({PRE: _Hook(self.pre_all_gather), POST: _Hook(self.post_all_gather)})

    def remove(self) -> None:
        """From it."""
        for name in (PRE, POST):
            vars(_local(self._weight)).pop(name, None)

    @torch.no_grad()
    def pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: torch.nn.Module, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """What this process sends, and what `post_all_gather` is given: the bytes, and the scale where one serves all."""
        weight, e4m3 = self._weight, formats_here().e4m3
        x = _local(weight).detach().to(mp_policy.param_dtype or weight.dtype)
        if self.alike is None:
            cast = self._casts.cast_rows([x], e4m3, True)
            return (cast.q.view(torch.uint8), cast.scale), None
        largest, number = self.alike
        amax_R = largest.of(number, weight, mesh).to(x.dtype).float().repeat(len(x))
        cast = self._casts.cast_rows([x], e4m3, False, amax_R=amax_R)
        return (cast.q.view(torch.uint8),), cast.scale

    def post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: torch.Tensor | None,
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """The whole weight; `out` is what was returned before, and finds its new cast here."""
        q, *scale = all_gather_outputs
        self.cast = Cast(q.view(formats_here().e4m3), None, scale[0] if metadata is None else metadata)
        return None if out is not None else (Gathered(self, q, param_dtype), ())


class _Largest:
    """The largest absolute value of each group of weights, measured for all of them when one has changed."""

    def __init__(self, groups: Sequence[Sequence[torch.Tensor]]) -> None:
        self._groups = groups
        self._states: dict[int, tuple[int, ...]] = {}
        self._amax = torch.empty(0)

    def of(self, group: int, weight: torch.Tensor, mesh: Any) -> torch.Tensor:
        """Float32 []. What decides whether to measure is the same in every process."""
        if self._states.get(id(weight)) != _state(weight):
            self._measure(mesh)
        return self._amax[group]

    def _measure(self, mesh: Any) -> None:
        self._states = {id(weight): _state(weight) for group in self._groups for weight in group}
        self._amax = torch.stack([torch.stack(list(map(_amax, group))).amax() for group in self._groups])
        # as integers: in their order what is not negative keeps its own, and NaN is the largest, in every backend
        distributed.all_reduce(self._amax.view(torch.int32), distributed.ReduceOp.MAX, group=mesh.get_group())


def _amax(weight: torch.Tensor) -> torch.Tensor:
    largest: torch.Tensor = torch.linalg.vector_norm(_local(weight).detach(), float("inf"), dtype=torch.float32)
    return largest.abs()  # NaN without its sign


def _state(weight: torch.Tensor) -> tuple[int, ...]:
    """Of a parameter that is written to from outside of optimizers too; frozen ones see no steps."""
    return STEPS.count if weight.requires_grad else 0, weight._version, _local(weight)._version


def _local(weight: Any) -> torch.Tensor:
    """The tensor that FSDP2 holds; what `to_local` gives is another object."""
    found: torch.Tensor = weight._local_tensor
    return found


def _mesh(weight: Any) -> Any:
    return weight.device_mesh
