"""An applied model is still the model: same object, names, bits, hooks, copies, files; and revert leaves no trace."""

import copy
import inspect
import io
import json
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import automodel_accel as accel
from tests.swap.compare import applied, assert_close, assert_equal, step
from tests.tiny import CAUSAL, batch, tiny

# what loads a pickled model where automodel_accel cannot be imported, and takes a training step
STRANGER = """
import sys
sys.modules["automodel_accel"] = None
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
model = torch.load(sys.argv[1], weights_only=False)
assert type(model) is LlamaForCausalLM and type(model.lm_head) is torch.nn.Linear
assert type(model.model.norm) is LlamaRMSNorm and type(model.model.layers[0].mlp) is LlamaMLP
assert not [name for module in model.modules() for name in vars(module) if "accel" in name]
inputs = torch.load(sys.argv[2])
model(**inputs).loss.backward()
torch.save({name: p.grad for name, p in model.named_parameters()}, sys.argv[3])
"""


@pytest.mark.parametrize("name", CAUSAL)
def test_names_and_bits(name: str) -> None:
    model = tiny(name)
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    modules = dict(model.named_modules())
    assert accel.apply(model) is model
    step(model, **batch())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert list(model.named_modules()) == list(modules.items())
    assert all(parameters[key] is parameter for key, parameter in model.named_parameters())
    model.load_state_dict(before)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_classes_and_signatures(name: str) -> None:
    model = tiny(name)
    classes = {path: type(module) for path, module in model.named_modules()}
    signatures = {path: inspect.signature(module.forward) for path, module in model.named_modules()}
    texts = repr(model)
    accel.apply(model)
    for path, module in model.named_modules():
        was = classes[path]
        assert isinstance(module, was)
        assert (type(module).__name__, type(module).__module__, type(module).__qualname__, type(module).__doc__) == (
            was.__name__,
            was.__module__,
            was.__qualname__,
            was.__doc__,
        )
        assert inspect.signature(module.forward) == signatures[path]
    assert repr(model) == texts


def test_saved_model_is_the_stock_model(tmp_path: Path) -> None:
    model = tiny()
    expected = step(model, **batch())
    accel.apply(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert "accel" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert type(again) is LlamaForCausalLM
    assert_equal(step(again, **batch()), expected)


def _record(log: list[Any], values: bool) -> Callable[..., None]:
    def real(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [real(item) for item in value]
        if hasattr(value, "materialise"):
            return value.detach().clone()
        return value.detach().clone() if isinstance(value, torch.Tensor) else None

    def hook(module: nn.Module, *seen: Any) -> None:
        log.append((type(module).__name__, real(seen) if values else None))

    return hook


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
INSIDE_MLPS = ("SiLUActivation", "NewGELUActivation", "GELUActivation", "Dropout")


@pytest.mark.parametrize("inside_mlps", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "t5"])
@pytest.mark.parametrize("register", HOOKS)
def test_hooks_fire_as_in_vanilla_with_the_same_values(name: str, register: str, inside_mlps: bool) -> None:
    """Also those on modules that the fused path does not call: the original is called then."""
    model = tiny(name)
    ours = applied(model)
    logs: list[list[Any]] = []
    steps = []
    for m in (ours, model):
        log: list[Any] = []
        for module in m.modules():
            if inside_mlps or type(module).__name__ not in INSIDE_MLPS:
                getattr(module, register)(_record(log, values=True))
        steps.append(step(m, **batch()))
        logs.append(log)
    assert_close(*steps)
    assert [kind for kind, _ in logs[0]] == [kind for kind, _ in logs[1]]
    assert len(logs[0]) >= 7
    for (kind, mine), (_, theirs) in zip(*logs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, kind=kind: f"{kind}: {text}")
    fused = accel.report(ours).counts.fused
    assert fused["norm"] == accel.report(ours).places("norm")
    assert fused["mlp"] == (0 if inside_mlps else accel.report(ours).places("mlp"))
    assert fused["loss"] == (0 if "backward" in register else 1) or register == "register_forward_hook"


def test_old_backward_hooks_on_the_head() -> None:
    model = tiny(tie_word_embeddings=False)
    logs: list[list[Any]] = []
    for m in (applied(model), model):
        logs.append([])
        m.lm_head.register_backward_hook(_record(logs[-1], values=False))
        step(m, **batch())
    assert logs[0] == logs[1]
    assert len(logs[0]) == 1


def test_a_forward_hook_may_change_logits() -> None:
    model = tiny()
    steps = []
    for m in (applied(model), model):
        m.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
        m.model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2.0,))
        steps.append(step(m, **batch()))
    assert_close(*steps)


def test_deep_copy_stays_applied_and_is_reverted_alone() -> None:
    model = tiny()
    vanilla = step(model, **batch())
    accel.apply(model)
    expected = step(model, **batch())
    twin = copy.deepcopy(model)
    assert_equal(step(twin, **batch()), expected)
    assert all(a is not b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    accel.revert(twin)
    assert type(twin) is LlamaForCausalLM
    assert_equal(step(twin, **batch()), vanilla)
    accel.report(model)
    assert_equal(step(model, **batch()), expected)
    with pytest.raises(ValueError, match="is not applied"):
        accel.report(twin)


def test_deep_copy_of_a_layer() -> None:
    model = tiny()
    accel.apply(model)
    layer = copy.deepcopy(model.model.layers[1])
    model.model.layers[0] = layer
    step(model, **batch())
    assert type(layer.mlp) is not modeling_llama.LlamaMLP


def test_shallow_copy_works() -> None:
    model = tiny()
    expected = step(model, **batch())
    assert_close(step(copy.copy(accel.apply(model)), **batch()), expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_holds_the_original_classes(protocol: int) -> None:
    model = tiny()
    expected = step(model, **batch())
    accel.apply(model)
    step(model, **batch())
    again = pickle.loads(pickle.dumps(model, protocol))
    assert {type(module) for module in again.modules()} == {type(module) for module in tiny().modules()}
    assert_equal(step(again, **batch()), expected)
    accel.report(model)


def test_a_file_of_the_model_loads_where_this_package_is_not(tmp_path: Path) -> None:
    model = tiny()
    expected = step(model, **batch())
    torch.save(accel.apply(model), tmp_path / "model.pt")
    torch.save(batch(), tmp_path / "inputs.pt")
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    files = [str(tmp_path / name) for name in ("model.pt", "inputs.pt", "gradients.pt")]
    subprocess.run([sys.executable, str(script), *files], check=True, cwd=tmp_path)
    got = torch.load(tmp_path / "gradients.pt")
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.gradients.items())


def _leftovers(model: nn.Module) -> list[str]:
    return [name for module in model.modules() for name in (*vars(module), *vars(type(module))) if "_accel" in name]


@pytest.mark.parametrize("name", [*CAUSAL, "t5", "bert"])
def test_revert_leaves_no_trace(name: str) -> None:
    model = tiny(name)
    expected = step(model, **batch())
    model.zero_grad()
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    for _ in range(2):
        assert_close(step(accel.apply(model), **batch()), expected)
        assert accel.revert(model) is model
        assert not _leftovers(model)
        assert_equal(step(model, **batch()), expected)
    model.zero_grad()
    for module, was, attributes in before:
        assert type(module) is was
        assert vars(module).keys() == attributes.keys()
        assert all(
            vars(module)[key] is value or vars(module)[key] == value
            for key, value in attributes.items()
            if key[0] != "_"
        )
    with pytest.raises(ValueError, match="not applied"):
        accel.report(model)


def test_context_manager() -> None:
    model = tiny()
    expected = step(model, **batch())
    with accel.accelerated(model, loss="torch") as inside:
        assert inside is model
        assert accel.report(model).places("loss") == 1
        with accel.accelerated(model, loss="torch"):
            step(model, **batch())
        accel.report(model)
    assert type(model) is LlamaForCausalLM
    with pytest.raises(KeyError), accel.accelerated(model):
        raise KeyError
    assert_equal(step(model, **batch()), expected)


def _namespace(module: Any) -> dict[str, int]:
    return {name: id(value) for name, value in vars(module).items() if not isinstance(value, types.ModuleType)}


def test_nothing_global_is_touched_and_no_other_model() -> None:
    other = tiny()
    model = tiny()
    expected = step(other, **batch())
    spaces = (
        modeling_llama,
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaMLP,
        modeling_llama.LlamaModel,
        LlamaForCausalLM,
        nn.Linear,
        nn.Module,
        torch.Tensor,
        torch.nn.functional,
        torch,
        nn.CrossEntropyLoss,
    )
    before = [_namespace(space) for space in spaces]
    randomness = torch.get_rng_state()
    step(accel.apply(model), **batch())
    assert [_namespace(space) for space in spaces] == before
    assert torch.equal(torch.get_rng_state(), randomness), "random numbers were drawn"
    assert_equal(step(other, **batch()), expected)
    with pytest.raises(ValueError, match="not applied"):
        accel.report(other)
    accel.revert(model)
    assert [_namespace(space) for space in spaces] == before


def test_global_registries_of_the_architecture_know_only_the_stock_class() -> None:
    """transformers finds classes by name; ours must not take the place of the original."""
    accel.apply(tiny())
    assert type(tiny()) is LlamaForCausalLM
    assert type(AutoModelForCausalLM.from_config(tiny().config)) is LlamaForCausalLM


def test_torch_save_of_the_state_is_the_same_file() -> None:
    model = tiny()
    files = []
    for m in (model, applied(model)):
        files.append(io.BytesIO())
        torch.save(m.state_dict(), files[-1])
    assert files[0].getvalue() == files[1].getvalue()


def test_replica_of_data_parallel_returns_tensors() -> None:
    """nn.DataParallel can gather nothing else; its replicas share the classes and are marked."""
    model = tiny()
    expected = model(**batch())
    replica = accel.apply(model)._replicate_for_data_parallel()
    outputs = replica(**batch())
    assert type(outputs.logits) is torch.Tensor
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.loss, expected.loss)
