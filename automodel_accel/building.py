"""The models that a script builds: noticed as they are built, applied once, at the last moment that is early enough.

A model is noted by a weak reference when transformers constructs or copies it. It is applied when something begins that
depends on it: an optimizer over its parameters, a wrapper (DDP, FSDP, accelerate, DeepSpeed), a Trainer, or its first call.
Before that a script may add adapters, resize embeddings, cast or copy it. Of models within models only the outermost is applied.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from automodel_accel.api import apply, find_report, report
from automodel_accel.config import AccelConfig
from automodel_accel.report import Report

logger = logging.getLogger("automodel_accel")
Function = Callable[..., Any]
_CALL = "__call__"


class Building:
    """The models that were noted and not yet applied, and the reports of those that were applied.

    Attributes:
        settings: What each model is applied with.
        reports: Of all models that were taken, those that the script applied itself included.
    """

    def __init__(self, settings: AccelConfig) -> None:
        self.settings = settings
        self.reports: list[Report] = []
        self._noted: WeakSet[nn.Module] = WeakSet()
        self._base: type[nn.Module] | None = None  # PreTrainedModel, while it has our __call__
        self._applying = False

    def note(self, model: nn.Module) -> None:
        """Remember a model that was built or copied."""
        if self._applying:  # a proof's own
            return
        if find_report(model) is not None:  # a copy of a model that was applied
            self._forget(model)
            return
        self._noted.add(model)
        if self._base is None:
            self._base = sys.modules["transformers.modeling_utils"].PreTrainedModel
            setattr(self._base, _CALL, self._noticing_call())

    def take_modules(self, modules: Iterable[nn.Module]) -> None:
        """Apply the noted models that are, contain, or are contained in one of these."""
        if self._noted:
            self._take({id(part) for module in modules for part in module.modules()}, nn.Module.modules)

    def take_parameters(self, parameters: Iterable[torch.Tensor]) -> None:
        """Apply the noted models that own one of these."""
        if self._noted:
            self._take({id(parameter) for parameter in parameters}, nn.Module.parameters)

    def end(self) -> None:
        """Forget every model."""
        self._noted.clear()
        self._stop_noticing_calls()

    def _take(self, parts: set[int], parts_of: Callable[[nn.Module], Iterable[object]]) -> None:
        if self._applying:
            return
        for model in self._outermost():
            if not parts.isdisjoint(map(id, parts_of(model))):
                self._apply(model)

    def _outermost(self) -> list[nn.Module]:
        noted = list(self._noted)
        inner = {id(part) for model in noted for part in model.modules() if part is not model}
        return [model for model in noted if id(model) not in inner]

    def _apply(self, model: nn.Module) -> None:
        self._forget(model)
        done = find_report(model)
        if done is None:
            done = self._apply_now(model)
        if all(done is not other for other in self.reports):
            self.reports.append(done)

    def _apply_now(self, model: nn.Module) -> Report:
        start = time.perf_counter()
        self._applying = True
        try:
            apply(model, self.settings)
        finally:
            self._applying = False
        done = report(model)
        logger.info(_summary(done, time.perf_counter() - start))
        return done

    def _forget(self, model: nn.Module) -> None:
        for part in model.modules():
            self._noted.discard(part)
        if not self._noted:
            self._stop_noticing_calls()

    def _noticing_call(self) -> Function:
        """Stands in for `nn.Module.__call__` while a model is noted, and is gone in a training's steps."""
        original = nn.Module.__call__

        @functools.wraps(original)
        def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                if model in self._noted and not _is_on_meta(model):
                    self.take_modules([model])
                elif not self._noted:  # the last one was garbage
                    self._stop_noticing_calls()
            return original(model, *args, **kwargs)

        return call

    def _stop_noticing_calls(self) -> None:
        if self._base is not None:
            delattr(self._base, _CALL)
            self._base = None


def _is_on_meta(model: nn.Module) -> bool:
    """Whether it has no weights yet: a call within from_pretrained."""
    return any(parameter.is_meta for parameter in model.parameters())


def _summary(done: Report, seconds: float) -> str:
    why = "" if done.applied else "; --accel.report=FILE.json says why"
    return (
        f"{done.plan.model}: {len(done.applied)} places swapped and proved in {seconds:.1f} s; "
        f"{len(done.refusals)} refused{why}"
    )


def _note_after(building: Building, original: Function) -> Function:
    @functools.wraps(original)
    def init(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original(model, *args, **kwargs)
        building.note(model)

    return init


def _take_after_optimizer(building: Building, original: Function) -> Function:
    @functools.wraps(original)
    def init(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)  # first: it may consume a generator of parameters
        building.take_parameters(parameter for group in optimizer.param_groups for parameter in group["params"])

    return init


def _take_before_method(building: Building, original: Function) -> Function:
    @functools.wraps(original)
    def method(self: object, *args: Any, **kwargs: Any) -> Any:
        building.take_modules(_modules_in([*args, *kwargs.values()]))
        return original(self, *args, **kwargs)

    return method


def _take_before_function(building: Building, original: Function) -> Function:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        building.take_modules(_modules_in([*args, *kwargs.values()]))
        return original(*args, **kwargs)

    return function


def _take_before_trainer(building: Building, original: Function) -> Function:
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def init(trainer: object, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(names, args)), **kwargs}
        if getattr(given.get("args"), "use_liger_kernel", False):
            raise ValueError(
                "TrainingArguments(use_liger_kernel=True): Liger would change the model in train(), after it was accelerated. "
                "Set use_liger_kernel=False, or run the script with python instead of python -m automodel_accel.run."
            )
        if not _has_own_callback(given.get("callbacks") or ()):
            building.take_modules(_modules_in([given.get("model")]))
        original(trainer, *args, **kwargs)

    return init


def _has_own_callback(callbacks: Iterable[object]) -> bool:
    """Whether the script gives the Trainer an AccelCallback, which applies the model itself."""
    module = sys.modules.get("automodel_accel.callback")
    if module is None:
        return False
    own = module.AccelCallback
    return any(callback is own or isinstance(callback, own) for callback in callbacks)


def _modules_in(values: Sequence[object]) -> list[nn.Module]:
    flat = [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]
    return [value for value in flat if isinstance(value, nn.Module)]


@dataclass(frozen=True, slots=True)
class Point:
    """One function that is wrapped while a script runs.

    Attributes:
        module: Where it is defined. Wrapped when the script imports it, so that a script pays for nothing that it does not use.
        name: "function" or "Class.method".
        wrap: (building, original) -> what stands in for it.
    """

    module: str
    name: str
    wrap: Callable[[Building, Function], Function]


# everything that is touched for a script: outside of this process and after the script's end, nothing is
POINTS = (
    Point("transformers.modeling_utils", "PreTrainedModel.__init__", _note_after),
    Point("transformers.modeling_utils", "PreTrainedModel.__setstate__", _note_after),  # a copy or an unpickled model
    Point("transformers.trainer", "Trainer.__init__", _take_before_trainer),
    Point("torch.optim.optimizer", "Optimizer.__init__", _take_after_optimizer),
    Point("torch.nn.parallel.distributed", "DistributedDataParallel.__init__", _take_before_method),
    Point(
        "torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel.__init__", _take_before_method
    ),
    Point("torch.distributed.fsdp._fully_shard._fully_shard", "fully_shard", _take_before_function),
    Point("accelerate.accelerator", "Accelerator.prepare", _take_before_method),
    Point("accelerate.accelerator", "Accelerator.prepare_model", _take_before_method),
    Point("deepspeed", "initialize", _take_before_function),
)


@contextmanager
def noticed(settings: AccelConfig) -> Iterator[Building]:
    """Inside, the models that are built are noticed and applied. Afterwards every wrapped function is the original."""
    building = Building(settings)
    with ExitStack() as undo:
        undo.callback(building.end)

        def wrap_points_of(module: ModuleType) -> None:
            for point in POINTS:
                if point.module == module.__name__:
                    undo.callback(_wrap(module, point, building))

        finder = _OnImport(frozenset(point.module for point in POINTS), wrap_points_of)
        for name in finder.names.intersection(sys.modules):
            wrap_points_of(sys.modules[name])
        sys.meta_path.insert(0, finder)
        undo.callback(sys.meta_path.remove, finder)
        yield building


def _wrap(module: ModuleType, point: Point, building: Building) -> Callable[[], None]:
    """Put the wrapper in place, and return what undoes it."""
    *classes, name = point.name.split(".")
    owner: Any = getattr(module, classes[0]) if classes else module
    inherited = name not in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, point.wrap(building, original))
    return functools.partial(delattr, owner, name) if inherited else functools.partial(setattr, owner, name, original)


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds no module itself; tells when one of `names` was imported."""

    def __init__(self, names: frozenset[str], tell: Callable[[ModuleType], None]) -> None:
        self.names = names
        self._tell = tell

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.names:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            execute, tell = spec.loader.exec_module, self._tell

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                tell(module)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
