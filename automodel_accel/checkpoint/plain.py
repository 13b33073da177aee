"""Plain: states of schedulers, loaders and generators as JSON and back, exactly; no pickle, so that reading one runs no code."""

import base64
from typing import Any

import torch

KIND = "@"  # the key that marks what JSON has no word for


def encode(value: Any, where: str) -> Any:
    """What JSON can hold.

    Args:
        value: Of None, bool, int, float, str, bytes, list, tuple, set, dict, torch.Tensor, torch.Size, dtype, numpy array or scalar.
        where: What the value is, for the error.

    Raises:
        ValueError: another type, with the path to it.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [encode(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, dict):
        items = [[encode(key, where), encode(item, f"{where}[{key!r}]")] for key, item in value.items()]
        plain = all(type(key) is str and key != KIND for key in value)
        return dict(items) if plain else {KIND: "dict", "items": items}
    if isinstance(value, tuple | set | frozenset):
        listed = sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)
        return {KIND: "tuple" if isinstance(value, tuple) else "set", "items": encode(listed, where)}
    if isinstance(value, bytes | bytearray):
        return {KIND: "bytes", "base64": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {KIND: "dtype", "name": str(value).removeprefix("torch.")}
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        bits = base64.b64encode(flat.numpy().tobytes()).decode()
        return {
            **{KIND: "tensor", "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)},
            "base64": bits,
        }
    return _encode_numpy(value, where)


def _encode_numpy(value: Any, where: str) -> Any:
    if type(value).__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind in "biuf":
        if not value.shape:
            return value.item()
        bits = base64.b64encode(value.tobytes()).decode()
        return {KIND: "array", "dtype": value.dtype.str, "shape": list(value.shape), "base64": bits}
    raise ValueError(
        f"{where} is a {type(value).__name__}, which a checkpoint does not hold; expected numbers, text, bytes, tensors, arrays, and "
        "lists, tuples, sets and dicts of these."
    )


def decode(value: Any) -> Any:
    """What was encoded."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind is None:
        return {key: decode(item) for key, item in value.items()}
    if kind == "dict":
        return {decode(key): decode(item) for key, item in value["items"]}
    if kind in ("tuple", "set"):
        items = decode(value["items"])
        return tuple(items) if kind == "tuple" else set(items)
    if kind == "dtype":
        return getattr(torch, value["name"])
    data = bytearray(base64.b64decode(value["base64"]))
    if kind == "bytes":
        return bytes(data)
    if kind == "tensor":
        dtype = getattr(torch, value["dtype"])
        flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"])
    import numpy as np  # whoever saved an array has it

    return np.frombuffer(data, dtype=np.dtype(value["dtype"])).reshape(value["shape"])
