"""Copy a method with some of its globals replaced, so that one instance can call another function under an old name.

The copy runs the same code on a dictionary of its own that holds the globals which the code can name, as they are at that moment,
with the replacements among them: a global that is exchanged in the module later is not seen until the swap is done again.
"""

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

# what the import statement and the interpreter look up; not "__name__": torch.compile would then read each global out of the
# module of that name, past the replacements
_OF_THE_INTERPRETER = ("__builtins__", "__package__", "__spec__", "__file__")
_WRITES = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL"})
_GLOBALS: "WeakKeyDictionary[types.CodeType, tuple[frozenset[str], bool]]" = WeakKeyDictionary()


def loaded_globals(function: types.FunctionType) -> frozenset[str]:
    """Names that the function's code, and what is defined inside it, reads from its globals."""
    return _globals_of(function.__code__)[0]


def named_in(function: Callable[..., Any]) -> frozenset[str]:
    """Names of globals and attributes in the code of a function, under its decorators, and in what is defined inside it."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset(name for part in _codes(code) for name in part.co_names) if code is not None else frozenset()


def writes_globals(function: types.FunctionType) -> bool:
    """Whether the code assigns or deletes globals, which a copy would do to a dictionary of its own."""
    return _globals_of(function.__code__)[1]


def _globals_of(code: types.CodeType) -> tuple[frozenset[str], bool]:
    """(names of the globals that are read, whether any is written); read once for each code."""
    if code not in _GLOBALS:
        instructions = [one for part in _codes(code) for one in dis.get_instructions(part)]
        loaded = frozenset(one.argval for one in instructions if one.opname == "LOAD_GLOBAL")
        _GLOBALS[code] = loaded, any(one.opname in _WRITES for one in instructions)
    return _GLOBALS[code]


def rebind(function: types.FunctionType, replacements: Mapping[str, Any]) -> types.FunctionType:
    """The function with these globals replaced; the given one is left as it is."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    names.update(_OF_THE_INTERPRETER)
    known = {name: value for name, value in function.__globals__.items() if name in names}
    # a code object of its own: torch.compile keeps compiled code by it, and guards globals in the dictionary it saw first
    code = function.__code__.replace()
    copy = types.FunctionType(
        code, {**known, **replacements}, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.__qualname__, copy.__module__, copy.__doc__ = function.__qualname__, function.__module__, function.__doc__
    vars(copy).update(vars(function))
    return copy


def rebind_within(method: types.FunctionType, replacements: Mapping[str, Any]) -> types.FunctionType:
    """`rebind` of the function that a method's decorators were put around, under copies of the decorators."""
    innermost = inspect.unwrap(method)
    changed: types.FunctionType = _redecorated(method, innermost, rebind(innermost, replacements))
    return changed


def _redecorated(method: Any, innermost: Any, replacement: types.FunctionType) -> Any:
    """`method` with `innermost` exchanged wherever its decorators hold it."""
    if method is innermost:
        return replacement
    if not isinstance(method, types.FunctionType) or not method.__closure__:
        return method
    cells = [types.CellType(_redecorated(cell.cell_contents, innermost, replacement)) for cell in method.__closure__]
    if all(new.cell_contents is old.cell_contents for new, old in zip(cells, method.__closure__, strict=True)):
        return method
    copy = types.FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, tuple(cells))
    copy.__kwdefaults__ = method.__kwdefaults__
    functools.update_wrapper(copy, method)
    copy.__wrapped__ = _redecorated(method.__wrapped__, innermost, replacement)  # type: ignore[attr-defined]
    return copy


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
