"""Implementations by other packages: held to the checks of their operation, refused where they are wrong.

Liger's kernels run in Triton's interpreter. Those that need a GPU are driven here against stand-ins with the signatures of the
real packages (fake_packages.py), and tested for real on a GPU that has them.
"""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_accel.kernels import attention, contract, cross_entropy, gated_linear, layer_norm, rms_norm
from automodel_accel.kernels.attention import flash
from automodel_accel.kernels.contract import CannotServeError, Implementation, Kernel, Spec
from automodel_accel.kernels.facts import this_machine
from tests.ops import (
    checks,
    fake_packages,
    test_attention,
    test_cross_entropy,
    test_gated_linear,
    test_layer_norm,
    test_rms_norm,
)
from tests.ops.test_contract import machine

Made = tuple[checks.Operation, torch.dtype]
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

# (order, offset, dtype of the weight, dtype), every kind that each serves
RMS_NORM: Mapping[str, tuple[tuple[str, float, str, torch.dtype], ...]] = {
    "liger": (
        ("cast_then_mul", 0.0, "same", bf16),
        ("mul_then_cast", 1.0, "float32", bf16),
        ("cast_then_mul", 0.0, "same", fp32),
        ("cast_then_mul", 0.0, "none", fp16),
        ("mul_then_cast", 0.0, "none", bf16),
    ),
    "te": (("mul_then_cast", 1.0, "same", bf16), ("mul_then_cast", 0.0, "same", fp32)),
}
LAYER_NORM = {
    "liger": (("same", bf16), ("float32", bf16), ("same", fp16)),
    "te": (("same", bf16), ("same", fp32)),
}
GATED_LINEAR = {
    "liger": (
        ("silu", "two", bf16),
        ("silu", "gate_up", fp32),
        ("gelu_tanh", "up_gate", bf16),
        ("gelu_tanh", "two", fp32),
    )
}
CASES: dict[str, list[Made]] = {
    **{
        f"rms_norm by {name}": [(test_rms_norm.operation(name, *rest), dtype) for *rest, dtype in rows]
        for name, rows in RMS_NORM.items()
    },
    **{
        f"layer_norm by {name}": [(test_layer_norm.operation(name, which), dtype) for which, dtype in rows]
        for name, rows in LAYER_NORM.items()
    },
    **{
        f"gated_linear by {name}": [(test_gated_linear.operation(name, *rest), dtype) for *rest, dtype in rows]
        for name, rows in GATED_LINEAR.items()
    },
}
CASES["cross_entropy by te"] = [
    (test_cross_entropy.operation("te", **test_cross_entropy.NONE_IGNORED), bf16),
    (test_cross_entropy.operation("te", label_smoothing=0.2), fp32),
    (test_cross_entropy.operation("te", weighted=True, reduction="sum"), bf16),
]
SHAPES = ((2, 4, 64), (7, 257), (33, 50), (2, 1000), (0, 8), (9,))


def properties(case: str) -> tuple[checks.Check, ...]:
    """All that the operation is held to."""
    if case.startswith("cross_entropy"):
        return test_cross_entropy.PROPERTIES
    return test_layer_norm.PROPERTIES if case.startswith("layer_norm") else checks.PROPERTIES


@contextmanager
def running(case: str) -> Iterator[None]:
    """On a GPU the real package, or a skip; else Liger in the interpreter, and the stand-in of Transformer Engine."""
    operation, _, name = case.partition(" by ")
    package = {"liger": "liger-kernel", "te": "transformer-engine"}[name]
    if (torch.cuda.is_available() or name == "liger") and not this_machine().has(package):
        pytest.skip(f"{package} is not installed")
    with ExitStack() as stack:
        if not torch.cuda.is_available() and name == "liger":
            from tests.ops.liger_interpreted import runnable

            stack.enter_context(runnable())
        elif not torch.cuda.is_available():
            stack.enter_context(te_stood_in_for(operation))
        yield


@contextmanager
def te_stood_in_for(operation: str) -> Iterator[None]:
    driver = f"automodel_accel.kernels.{operation}.te"
    package = importlib.import_module(f"automodel_accel.kernels.{operation}")
    with fake_packages.installed(fake_packages.transformer_engine(), (driver,)), pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module(driver)
        patch.setattr(package, "implementation_module", lambda *_: module)
        yield


@pytest.mark.parametrize("case", CASES)
def test_values(case: str) -> None:
    with running(case):
        for operation, dtype in CASES[case]:
            for shape in SHAPES:
                if len(shape) > 1 or not case.startswith("cross_entropy"):
                    checks.check_shape(operation, dtype, shape)


@pytest.mark.parametrize("case", CASES)
def test_properties(case: str) -> None:
    with running(case):
        for check in properties(case):
            check(*CASES[case][0])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_everything(case: str) -> None:
    with running(case):
        for operation, dtype in CASES[case]:
            for shape in checks.SHAPES:
                if shape[-1] > 1 and (len(shape) > 1 or not case.startswith("cross_entropy")):
                    checks.check_shape(operation, dtype, shape)
            for check in properties(case):
                check(operation, dtype)


# operation, implementation, what is asked, the reason
REFUSED: tuple[tuple[Kernel, str, torch.dtype, int, frozenset[str], str], ...] = (
    (
        rms_norm.KERNEL,
        "liger",
        bf16,
        64,
        rms_norm.features(bf16, fp32, 0.0, "cast_then_mul"),
        "returns x's dtype, where torch gives the weight's",
    ),
    (
        rms_norm.KERNEL,
        "liger",
        bf16,
        64,
        rms_norm.features(bf16, bf16, 1.0, "cast_then_mul"),
        "adds the offset in float32, where this model rounds the sum",
    ),
    (rms_norm.KERNEL, "liger", bf16, 65537, frozenset(), "rows of at most 65536"),
    (rms_norm.KERNEL, "liger", torch.float64, 64, frozenset(), "the tensors are torch.float64"),
    (
        rms_norm.KERNEL,
        "te",
        bf16,
        64,
        rms_norm.features(bf16, bf16, 0.0, "cast_then_mul"),
        "multiplies with the weight in float32, where this model rounds first",
    ),
    (rms_norm.KERNEL, "te", bf16, 64, rms_norm.features(bf16, None, 0.0, "mul_then_cast"), "asks for a weight"),
    (rms_norm.KERNEL, "te", bf16, 64, rms_norm.features(bf16, fp32, 0.0, "mul_then_cast"), "of x's dtype"),
    (rms_norm.KERNEL, "te", bf16, 64, rms_norm.features(bf16, bf16, 0.5, "mul_then_cast"), "adds 1 to the weight"),
    (layer_norm.KERNEL, "liger", fp32, 64, frozenset(), "the tensors are torch.float32"),
    (layer_norm.KERNEL, "liger", bf16, 64, layer_norm.features(bf16, bf16, None), "asks for a bias"),
    (layer_norm.KERNEL, "liger", bf16, 64, layer_norm.features(bf16, bf16, bf16, 1.0), "adds no offset"),
    (layer_norm.KERNEL, "te", bf16, 64, layer_norm.features(bf16, bf16, bf16, summed=True), "not a sum"),
    (layer_norm.KERNEL, "te", bf16, 64, layer_norm.features(bf16, fp32, fp32), "of x's dtype"),
    (gated_linear.KERNEL, "liger", bf16, 64, gated_linear.FEATURES["gelu"], "where this model has erf"),
    (cross_entropy.KERNEL, "te", bf16, 64, cross_entropy.features(1.0, 30.0, 0.0), "does not do soft-caps"),
    (cross_entropy.KERNEL, "te", bf16, 64, cross_entropy.features(0.5, None, 1e-4), "scaled logits and z-losses"),
    (cross_entropy.KERNEL, "te", fp16, 64, frozenset(), "the tensors are torch.float16"),
    (
        cross_entropy.KERNEL,
        "te",
        bf16,
        64,
        cross_entropy.features(1.0, None, 0.0, True, False),
        "does not do uneven shards",
    ),
    (attention.KERNEL, "flash3", fp32, 64, frozenset(), "the tensors are torch.float32"),
    (attention.KERNEL, "flash3", bf16, 64, frozenset({"sinks"}), "does not do sinks"),
    (attention.KERNEL, "flash4", bf16, 256, frozenset(), "at most 128 elements"),
    (attention.KERNEL, "flash2", bf16, 64, frozenset({"bool masks"}), "does not do bool masks"),
    (attention.KERNEL, "varlen", bf16, 64, frozenset({"soft-caps"}), "does not do soft-caps"),
    (attention.KERNEL, "varlen", bf16, 64, frozenset({"dropout"}), "does not do dropout"),
)
ALL_PACKAGES = dict.fromkeys(
    ("triton", "liger-kernel", "transformer-engine", "flash-attn", "flash-attn-3", "flash-attn-4"), "1"
)
HOPPER = machine("cuda", ALL_PACKAGES)


def spoken(value: object) -> str:
    """The same in every process, which the order of a set is not."""
    if isinstance(value, frozenset):
        return ", ".join(sorted(value)) or "plain"
    return str(getattr(value, "name", value))


def named(kernel: Kernel, name: str) -> Implementation:
    (found,) = (one for one in kernel.implementations if one.name == name)
    return found


@pytest.mark.parametrize(("kernel", "name", "dtype", "size", "features", "reason"), REFUSED, ids=spoken)
def test_what_an_implementation_does_wrong_is_refused(
    kernel: Kernel, name: str, dtype: torch.dtype, size: int, features: frozenset[str], reason: str
) -> None:
    objection = named(kernel, name).objection(HOPPER, Spec("cuda", dtype, size, features))
    assert objection is not None
    assert reason in objection


@pytest.mark.parametrize("kernel", [rms_norm.KERNEL, layer_norm.KERNEL, gated_linear.KERNEL, attention.KERNEL])
def test_the_plain_call_is_served_by_all_that_are_installed(kernel: Kernel) -> None:
    features = gated_linear.FEATURES["silu"] if kernel is gated_linear.KERNEL else frozenset()
    spec = Spec("cuda", bf16, 64, features)
    refused = [one.name for one in kernel.implementations if one.objection(HOPPER, spec) is not None]
    assert refused == (["packed"] if kernel is attention.KERNEL else [])


@pytest.mark.parametrize(
    ("kernel", "name", "arch"),
    [
        (attention.KERNEL, "flash3", "sm_80"),
        (attention.KERNEL, "flash3", "sm_100"),
        (attention.KERNEL, "flash4", "sm_80"),
        (attention.KERNEL, "flash2", "sm_75"),
        (attention.KERNEL, "varlen", "gfx942"),
        (rms_norm.KERNEL, "te", "gfx942"),
    ],
    ids=spoken,
)
def test_an_architecture_without_its_kernels_is_refused(kernel: Kernel, name: str, arch: str) -> None:
    facts = dataclasses.replace(HOPPER, arch=arch)
    objection = named(kernel, name).objection(facts, Spec("cuda", bf16, 64))
    assert objection is not None
    assert f"this is {arch}" in objection


@pytest.mark.skipif(not this_machine().has("liger-kernel"), reason="liger-kernel is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the interpreter")
def test_a_wrong_case_raises_before_anything_is_computed() -> None:
    x, weight = torch.ones(2, 8, dtype=bf16), torch.ones(8)
    with pytest.raises(CannotServeError, match="returns x's dtype"):
        rms_norm.rms_norm(x, weight, 1e-6, implementation="liger")
    with pytest.raises(CannotServeError, match="where this model has erf"):
        gated_linear.gated_linear(x, x, activation="gelu", implementation="liger")


@pytest.mark.skipif(not this_machine().has("liger-kernel"), reason="liger-kernel is not installed")
def test_liger_would_be_wrong_where_it_is_refused() -> None:
    """The refusals are no caution: without them, results would be of another dtype or rounded elsewhere."""
    with running("rms_norm by liger"), pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("automodel_accel.kernels.rms_norm.liger")
        patch.setattr(rms_norm, "implementation_module", lambda *_: module)
        widening = test_rms_norm.operation("liger", "cast_then_mul", 0.0, "float32")
        with pytest.raises(AssertionError, match=r"torch\.bfloat16"):
            checks.check_shape(widening, bf16, (5, 100))
        rounded = test_rms_norm.operation("liger", "cast_then_mul", 1.0, "same")
        with pytest.raises(AssertionError, match="rounded elsewhere"):
            checks.check_rounding(rounded, bf16)
    with running("layer_norm by liger"), pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("automodel_accel.kernels.layer_norm.liger")
        patch.setattr(layer_norm, "implementation_module", lambda *_: module)
        with pytest.raises(AssertionError, match="of what is allowed"):
            checks.check_magnitudes(test_layer_norm.operation("liger"), fp32)


def test_a_package_that_cannot_be_imported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Implementation(
        name="te", module="broken_on_import", devices=frozenset({"cpu"}), dtypes=frozenset({fp32}), needs="triton"
    )
    kernel = Kernel(name="norm", reference=torch.relu, implementations=(broken,))
    monkeypatch.setattr(contract, "this_machine", lambda: machine("cpu", {"triton": "1"}))
    with pytest.raises(CannotServeError, match="norm: te: triton is installed but cannot be imported"):
        contract.implementation_module(kernel, "cpu", fp32, 8, "auto")


FLASH: Mapping[str, tuple[dict[str, Any], ...]] = {
    "varlen": (),
    "flash2": ({"softcap": 2.0}, {"softcap": 1.5, "window": 6, "documents": "of each row"}),
    "flash3": ({"softcap": 2.0}, {"softcap": 1.5, "window": 6, "documents": "of each row"}),
    "flash4": (
        {"softcap": 2.0},
        {"sinks": True},
        {"softcap": 1.5, "sinks": True, "window": 6, "documents": "of each row"},
    ),
}
PATTERNS = [(name, pattern) for name, more in FLASH.items() for pattern in (*test_attention.PATTERNS, *more)]


@contextmanager
def flash_running(name: str) -> Iterator[None]:
    """On a GPU the real package, or a skip; else its stand-in."""
    implementation = attention.BY_NAME[name]
    if torch.cuda.is_available():
        objection = implementation.objection(this_machine(), Spec("cuda", bf16, 64))
        if objection is not None:
            pytest.skip(objection)
        yield
        return
    modules = {} if name == "varlen" else getattr(fake_packages, name)()
    with fake_packages.installed(modules, (implementation.module,)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_winner", lambda *_: name)
        if name == "varlen":
            patch.setattr(importlib.import_module(implementation.module), "aten", fake_packages.aten_flash())
        yield


@pytest.mark.parametrize(("name", "pattern"), PATTERNS, ids=str)
def test_flash_patterns(name: str, pattern: dict[str, Any]) -> None:
    # by the reference that "torch" is held to: a dense mask knows neither soft-caps nor sinks
    operation = test_attention.operation("torch", **pattern)
    ours = test_attention.operation(name, **pattern).ours
    with flash_running(name):
        for shape in (*test_attention.SHAPES[:1], *test_attention.SHAPES[2:6]):
            checks.check_shape(checks.Operation(ours, operation.theirs, operation.inputs, 3), bf16, shape, draws=4)


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize(
    "check",
    [
        checks.check_nothing_overwritten,
        checks.check_backward_twice,
        checks.check_repeatable,
        checks.check_frozen_inputs,
        checks.check_double_backward,
    ],
    ids=lambda check: check.__name__,
)
def test_flash_properties(name: str, check: checks.Check) -> None:
    with flash_running(name):
        check(test_attention.operation(name, window=9, documents="of each row"), bf16)


@pytest.mark.parametrize("name", FLASH)
def test_flash_without_tokens(name: str) -> None:
    with flash_running(name):
        query, key, value = (
            torch.zeros(2, 2, 0, 8, dtype=bf16, device=checks.DEVICE, requires_grad=True) for _ in range(3)
        )
        output = attention.attention(query, key, value, implementation=name)
        assert output.shape == (2, 2, 0, 8)
        assert all(grad.shape == (2, 2, 0, 8) for grad in torch.autograd.grad(output.sum(), (query, key, value)))


def test_heads_of_deepseek_are_not_widened_for_flash3() -> None:
    with flash_running("flash3"):
        checks.check_shape(test_attention.operation("flash3"), bf16, (1, 2, 2, 33, 192, 128), draws=1)


def test_documents_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = flash._read
    monkeypatch.setattr(flash, "_read", lambda *given: reads.append(1) or read(*given))
    documents = torch.tensor([[0, 0, 1, 1, 1], [3, 4, 4, 4, 4]])
    for _ in range(3):
        found = flash.sequences_of(documents, 2)
    assert found.bounds.tolist() == [0, 2, 5, 6, 10]
    assert (found.bounds.dtype, found.longest, len(reads)) == (torch.int32, 4, 1)
    documents[0, 1] = 9
    assert flash.sequences_of(documents, 2).bounds.tolist() == [0, 1, 2, 5, 6, 10]
    assert flash.sequences_of(documents[:1].clone(), 2).bounds.tolist() == [0, 1, 2, 5, 6, 7, 10]
    with torch.inference_mode():
        assert flash.sequences_of(torch.zeros(1, 4), 1).bounds.tolist() == [0, 4]


def test_the_backward_finds_the_documents_of_its_forward() -> None:
    with flash_running("flash2"), pytest.MonkeyPatch.context() as patch:
        reads, read = [], flash._read
        patch.setattr(flash, "_read", lambda *given: reads.append(1) or read(*given))
        operation = test_attention.operation("flash2")
        query, key, value = (x.requires_grad_() for x in operation.draw(test_attention.USUAL, bf16) if x is not None)
        documents = test_attention.numbered("one for all", 2, query.shape[2]).to(query.device)
        for _ in range(2):
            output = attention.attention(query, key, value, documents=documents, implementation="flash2")
            torch.autograd.grad(output.sum(), (query, key, value))
        assert len(reads) == 1


def test_distributions_that_share_a_module_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> set[str]:
        importlib.invalidate_caches()
        return {name for name in this_machine.__wrapped__().packages if name.startswith("flash")}

    before = found()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    assert found() == before | {"flash-attn-4"}
    (tmp_path / "flash_attn" / "flash_attn_interface.py").touch()
    assert found() == before | {"flash-attn-4", "flash-attn"}
    (tmp_path / "flash_attn_interface.py").touch()
    assert found() == before | {"flash-attn-4", "flash-attn", "flash-attn-3"}
