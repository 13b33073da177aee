"""Rotary functions are swapped in one instance, by what they compute; the function, its module and other instances stay."""

import copy
import inspect
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import automodel_accel as accel
from automodel_accel.patches.rebind import loaded_globals, rebind, writes_globals
from tests.swap import rotary_shapes as look
from tests.swap.compare import Step, assert_as_good, assert_close, gradients, others_off, step
from tests.tiny import batch, tiny

OTHERS_OFF = others_off("rope")


def applied(model: nn.Module, **settings: Any) -> nn.Module:
    """A copy in which the rotary functions alone are swapped."""
    return accel.apply(copy.deepcopy(model), **OTHERS_OFF, **settings)


_LATENT = {
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    "num_key_value_heads": 4,
}
# model -> what is said of it, its sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("rotary, half, a head, one angle an element", {}),
    "gemma3_text": (
        "rotary, half, a head, one angle an element",
        {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_neox": ("rotary, half, a head or its front, one angle an element", {}),
    "phi3": ("rotary, half, a head or its front, one angle an element", {"partial_rotary_factor": 0.5}),
    "cohere": ("rotary, interleaved, a head, one angle an element", {}),
    "glm": ("rotary, interleaved, a head or its front, one angle a pair", {}),
    "ernie4_5": ("rotary, interleaved, a head, one angle a pair", {}),
    "gpt_oss": ("rotary, half, a head, one angle a pair", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nanochat": ("rotary, half, a head, one angle an element, backwards", {}),
    "deepseek_v2": ("rotary, interleaved, a head, one angle a pair", _LATENT),
    "deepseek_v3": ("interleaved to half, a head, one angle a pair", _LATENT),
    "gptj": (
        "rotary, interleaved, a head, one angle a pair, singly",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_inner": 48, "n_positions": 64},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient(name: str) -> None:
    label, sizes = MODELS[name]
    model = tiny(name, **sizes)
    ours = applied(model)
    assert_close(step(ours, **batch()), step(model, **batch()))
    report = accel.report(ours)
    assert report.places("rope") == 2
    assert {claim.label.endswith(label) for claim in report.applied} == {True}
    assert report.counts.fused == {"rope": 4 if name == "gptj" else 2}
    assert not report.counts.passed_on


@pytest.mark.parametrize("name", MODELS)
def test_low_precision_is_as_near_to_the_truth(name: str) -> None:
    model = tiny(name, torch.bfloat16, **MODELS[name][1])
    ours = applied(model)
    truth = step(copy.deepcopy(model).float(), **batch())
    if name not in (
        "gpt_oss",
        "deepseek_v2",
        "deepseek_v3",
    ):  # in bfloat16 their routers choose other experts than in the truth
        assert_as_good(step(ours, **batch()), step(model, **batch()), truth, torch.bfloat16)
    else:
        assert step(ours, **batch()).gradients.keys() == truth.gradients.keys()
    assert accel.report(ours).counts.fused["rope"]
    assert not accel.report(ours).counts.passed_on


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "cohere", "deepseek_v3"])
def test_autocast(name: str) -> None:
    model = tiny(name, **MODELS[name][1])
    ours = applied(model)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (step(m, **batch()) for m in (ours, model))
    assert {n: g.dtype for n, g in mine.gradients.items()} == {n: g.dtype for n, g in theirs.gradients.items()}
    torch.testing.assert_close(mine.loss, theirs.loss)
    assert accel.report(ours).counts.fused == {"rope": 2}


@pytest.mark.parametrize("name", ["llama", "glm", "deepseek_v3"])
def test_triton(name: str) -> None:
    pytest.importorskip("triton")
    model = tiny(name, **MODELS[name][1])
    ours = applied(model, rope="triton")
    assert_close(*(step(m, **batch(rows=1, tokens=6, ignored=1)) for m in (ours, model)))
    report = accel.report(ours)
    assert report.counts.fused == {"rope": 2}
    assert set(report.proofs[report.applied[0].proof_key].proven.values()) == {"triton"}


@pytest.mark.parametrize(
    ("name", "backend"),
    [("llama", "eager"), ("gptj", "eager"), ("gpt_neox", "aot_eager"), ("deepseek_v2", "aot_eager")],
)
def test_under_compile_ours_is_in_the_graph(name: str, backend: str) -> None:
    """torch.compile may read a global out of the module that a function names, past the replaced one."""
    model = tiny(name, **MODELS[name][1])
    ours = applied(model)
    frames, steps = [], []
    for m in (ours, model):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(m, backend=counter)
        steps.append([step(compiled, **batch()) for _ in range(2)][-1])
        frames.append(counter.frame_count)
        nodes = [
            node for graph in counter.graphs for node in graph.graph.nodes if "automodel_accel.rope" in str(node.target)
        ]
        assert len(nodes) == ((4 if name == "gptj" else 2) if m is ours else 0)
    assert frames[0] == frames[1]
    assert_close(*steps)


def test_compiled_attentions_of_which_one_is_swapped() -> None:
    """The copy shares no compiled code with the original, although its code is the same."""
    torch._dynamo.reset()
    model = look.Attention()
    ours = applied(model)
    x = torch.randn(2, 5, look.SIZE)
    for m in (model, ours, model, ours):
        counter = CompileCounterWithBackend("eager")
        rotate = torch.compile(m.rotate, backend=counter)
        q = x.view(2, 5, look.HEADS, -1).transpose(1, 2)
        torch.testing.assert_close(rotate(q, q, *model.tables(x)), model.rotate(q, q, *model.tables(x)))
        nodes = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
        assert any("automodel_accel.rope" in node for node in nodes) == (m is ours)


SERVED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "in a method": (look.Attention, 1),
    "in a method of the base": (look.Inherited, 1),
    "by keyword": (look.ByKeyword, 1),
    "inside a generator": (look.InsideExpression, 1),
    "heads after tokens": (look.TokenMajor, 1),
    "without a batch": (look.ByRow, 2),
    "tables in float32": (lambda: look.Attention(torch.float32), 1),
}


def run(model: nn.Module, x: torch.Tensor) -> Step:
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum().backward()
    assert x.grad is not None
    return Step(y.detach(), {"x": x.grad, **gradients(model)})


def inputs(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(2, 5, look.SIZE, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize(("make", "calls"), SERVED.values(), ids=SERVED)
def test_functions_that_are_served(make: Callable[[], nn.Module], calls: int) -> None:
    model = make()
    ours = applied(model)
    for scale in (1.0, 1e3):
        assert_close(run(ours, inputs(scale)), run(model, inputs(scale)))
    report = accel.report(ours)
    assert report.counts.fused == {"rope": 2 * calls}
    assert not report.counts.passed_on
    with torch.no_grad():
        assert torch.equal(ours(inputs()), model(inputs()))


UNSERVED = {
    "scaled": (look.Scaled, "rotary_scaled computes no rotation"),
    "one sign": (look.OneSign, "rotary_of_one_sign computes no rotation"),
    "clamped": (look.Clamped, "rotary_clamped computes no rotation"),
    "no gradient through one half": (look.Detached, "rotary_detached computes no rotation"),
    "in place": (look.InPlace, "rotary_in_place computes no rotation"),
    "keys only": (look.OnlyKeys, "rotary_of_keys computes no rotation"),
    "in bfloat16": (look.LowPrecision, "rotary_in_low_precision computes no rotation"),
    "decorated": (look.Decorated, "its rotate, which calls a rotary function, is decorated"),
    "static": (look.Static, "its rotate, which calls a rotary function, is decorated"),
    "writes globals": (look.WritesGlobals, "its rotate, which calls a rotary function, assigns globals"),
}


@pytest.mark.parametrize(("make", "reason"), UNSERVED.values(), ids=UNSERVED)
def test_functions_that_only_look_like_it(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make())
    ours = applied(model)
    for scale in (1.0, 1e3):
        assert_close(run(ours, inputs(scale)), run(model, inputs(scale)))
    report = accel.report(ours)
    assert report.places("rope") == 0
    (refusal,) = [refusal for fusion, refusal in report.refusals if fusion == "rope"]
    assert refusal.what == "0"
    assert refusal.reason.startswith(reason)
    assert refusal.remedy == "the original function stays"


ARGUMENTS = "rope: called with arguments that were not proved"
SHAPES = "rope: shapes, or tables that want a gradient, that were not proved"
PASSED_ON: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an unknown keyword": (look.UnknownKeyword, ARGUMENTS),
    "an unknown argument by position": (look.UnknownByPosition, ARGUMENTS),
    "tables that are broadcast": (look.OtherTables, SHAPES),
    "keys of another dtype": (look.WideKeys, SHAPES),
    "learned angles": (lambda: look.Attention(learned=True), SHAPES),
    "tables in float64": (
        lambda: look.Attention(torch.float64),
        "rope: not proved for ('cpu', torch.float32, torch.float64, False)",
    ),
}


@pytest.mark.parametrize(("make", "reason"), PASSED_ON.values(), ids=PASSED_ON)
def test_calls_that_were_not_proved_are_the_originals(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    ours = applied(model)
    assert_close(run(ours, inputs()), run(model, inputs()))
    report = accel.report(ours)
    assert report.places("rope") == 1
    assert report.counts.passed_on == {reason: 1}
    assert not report.counts.fused


def test_wrong_arguments_raise_as_in_the_original() -> None:
    model = look.Attention()
    ours = applied(model)
    q, k, cos, sin = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8), torch.ones(1, 3, 8), torch.ones(1, 3, 8)
    replaced = type(ours).rotate.__globals__["rotary"]
    for arguments, keywords in (((q, k, cos), {}), ((q, k, cos, sin, 1, 2), {}), ((q, k, cos, sin), {"q": q})):
        with pytest.raises(TypeError) as expected:
            look.rotary(*arguments, **keywords)
        with pytest.raises(TypeError) as got:
            replaced(*arguments, **keywords)
        assert str(got.value) == str(expected.value)


def test_the_function_and_other_instances_stay() -> None:
    model, other = tiny(), tiny()
    module = inspect.getmodule(type(model.model.layers[0].self_attn))
    function, forward = module.apply_rotary_pos_emb, type(model.model.layers[0].self_attn).forward
    names = set(vars(module))
    accel.apply(model, **OTHERS_OFF)
    assert module.apply_rotary_pos_emb is function
    assert set(vars(module)) == names
    assert type(other.model.layers[0].self_attn).forward is forward
    step(other, **batch())
    assert not accel.report(model).counts.fused
    accel.revert(model)
    assert type(model.model.layers[0].self_attn).forward is forward


def test_layers_share_one_copy_that_looks_like_the_original() -> None:
    model = tiny(num_hidden_layers=3)
    original = type(model.model.layers[0].self_attn).forward
    accel.apply(model, **OTHERS_OFF)
    (forward,) = {type(layer.self_attn).forward for layer in model.model.layers}
    assert isinstance(forward, types.FunctionType)
    assert not hasattr(forward, "__wrapped__")
    assert forward.__code__ == original.__code__
    assert inspect.signature(forward) == inspect.signature(original)
    assert (forward.__module__, forward.__qualname__) == (original.__module__, original.__qualname__)


def test_deepcopy_pickle_and_revert() -> None:
    model = tiny()
    expected = step(model, **batch())
    ours = applied(model)
    clone = copy.deepcopy(ours)
    assert_close(step(clone, **batch()), expected)
    loaded = pickle.loads(pickle.dumps(ours))
    assert type(loaded.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)
    reverted = accel.revert(ours)
    for m in (loaded, reverted):
        mine = step(m, **batch())
        assert torch.equal(mine.loss, expected.loss)
        assert all(torch.equal(gradient, expected.gradients[name]) for name, gradient in mine.gradients.items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = tiny()
    expected = step(model, **batch())
    ours = applied(model)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(step(ours, **batch()), expected)
    assert accel.report(ours).counts.fused == {"rope": 4}


@pytest.mark.parametrize("name", ["llama", "gptj", "deepseek_v3"])
def test_generate_with_a_cache(name: str) -> None:
    model = tiny(name, **MODELS[name][1]).eval()
    ours = applied(model).eval()
    tokens = batch()["input_ids"][:, :7]
    mine, theirs = (m.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (ours, model))
    assert torch.equal(mine, theirs)
    assert accel.report(ours).counts.fused["rope"] >= 12
    assert not accel.report(ours).counts.passed_on


def test_a_model_on_meta_can_be_applied() -> None:
    with torch.device("meta"):
        model = look.Attention()
    assert accel.report(accel.apply(model, **OTHERS_OFF)).places("rope") == 1


def test_rebinding_replaces_one_global_in_a_copy() -> None:
    method = look.Attention.rotate
    assert loaded_globals(method) == {"rotary"}
    assert not writes_globals(method)
    assert writes_globals(look.WritesGlobals.rotate)
    copied = rebind(method, {"rotary": lambda *tensors: "ours"})
    assert copied(None, 1, 2, 3, 4) == "ours"
    assert method.__globals__["rotary"] is look.rotary
    assert copied.__code__ is not method.__code__  # torch.compile keeps what it compiled by the code object
    assert "__name__" not in copied.__globals__  # or torch.compile would read globals out of the module of that name


def test_a_nested_function_sees_the_replacement() -> None:
    assert loaded_globals(look.InsideExpression.rotate) >= {"rotary"}
    copied = rebind(look.InsideExpression.rotate, {"rotary": lambda *tensors: "ours"})
    assert copied(None, 1, 2, 3, 4) == "ours"
