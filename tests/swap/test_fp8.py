"""FP8 linears in whole models: exactly the definition of their products, only where asked for, and undone without a trace."""

import copy
import dataclasses
import io
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import automodel_accel as accel
from automodel_accel.kernels.facts import Facts, this_machine
from automodel_accel.kernels.fp8_linear import noted, reference
from automodel_accel.kernels.numerics import judge
from automodel_accel.patches import fp8 as fp8_patch
from automodel_accel.patches.fp8 import RECIPES
from tests.ops.test_fp8_linear import E4M3, E5M2
from tests.swap.compare import Step, applied, assert_as_good, assert_close, assert_equal, gradients, only, step
from tests.tiny import batch, tiny

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
H100 = Facts(
    "3.12.0", "2.13.0+cu130", "cuda", "NVIDIA H100 80GB HBM3", "sm_90", 80 << 30, 132, False, {"triton": "3.7.1"}
)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Those inside of the layers, out of adapters too."""
    found = {name: child for name, child in model.named_modules() if isinstance(child, nn.Linear) and "layers." in name}
    return {name: child for name, child in found.items() if "lora_" not in name}


def defined(model: nn.Module, recipe: str) -> nn.Module:
    """A copy in which each of those linears computes the definition."""
    model, (rowwise, wide) = copy.deepcopy(model), (RECIPES[recipe].rowwise, RECIPES[recipe].wide_gradients)

    def forward_of(linear: Any) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            autocast = torch.is_autocast_enabled("cpu")
            with torch.autocast("cpu", enabled=False):
                weight, bias = [linear.weight], [linear.bias]
                (y,) = reference.fp8_linears(x, weight, bias, rowwise, E4M3, E5M2 if wide else E4M3)
            return y.to(torch.get_autocast_dtype("cpu")) if autocast else y

        return forward

    for linear in linears_of(model).values():
        linear.forward = forward_of(linear)  # type: ignore[method-assign]
    return model


def fp8(model: nn.Module, recipe: str = "tensorwise", **settings: Any) -> nn.Module:
    """A copy in which FP8 is the only fusion."""
    return applied(model, **{**only(), "fp8": recipe, **settings})


def served(model: nn.Module) -> int:
    return accel.report(model).counts.fused["fp8"]


def exact(model: Any) -> Step:
    """The step of the model as it was, in float64."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # grouped products take no float64
    return step(model, **batch())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "phi3", "mixtral", "gemma2", "bart"])
def test_computes_its_definition(architecture: str, recipe: str) -> None:
    """With the linears of one input together, each in its own right, and with all other fusions on."""
    model = tiny(architecture)
    theirs, truth = step(defined(model, recipe), **batch()), exact(model)
    ours = fp8(model, recipe)
    assert_close(step(ours, **batch()), theirs)
    assert served(ours) > 0
    assert not [why for why in accel.report(ours).counts.passed_on if why.startswith("fp8")]
    together = step(applied(model, fp8=recipe), **batch())
    assert not torch.equal(together.loss, step(model, **batch()).loss)
    alike = dataclasses.replace(together, loss=theirs.loss)  # whose is nearer is chance, of one number
    assert_as_good(alike, theirs, truth, torch.float32)


def test_linears_of_one_input_are_one_call() -> None:
    ours = fp8(tiny())
    step(ours, **batch())
    assert served(ours) == 2 * 4
    labels = [claim.label for claim in accel.report(ours).applied]
    assert sum("q_proj, k_proj, v_proj of one input, 32 to 64" in label for label in labels) == 2


def test_off_by_itself() -> None:
    assert accel.report(applied(tiny())).places("fp8") == 0


@pytest.mark.parametrize("recompute", [None, "selective", "mlp", "full"])
def test_recompute_gives_the_same_bits(recompute: Any) -> None:
    model = tiny()
    expected = step(applied(model, fp8="rowwise"), **batch())
    assert_equal(step(applied(model, fp8="rowwise", recompute=recompute), **batch()), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_give_the_same_bits(reentrant: bool) -> None:
    ours: Any = applied(tiny(), fp8="tensorwise")
    expected = step(ours, **batch())
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_equal(step(ours, **batch()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """The definition, rounded to bfloat16; float32 and bfloat16 weights."""
    model = tiny(dtype=dtype)
    ours, theirs = fp8(model), defined(model, "tensorwise")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (step(one, **batch()) for one in (ours, theirs))
    assert served(ours) == 2 * 4
    assert {g.dtype for g in found.gradients.values()} == {dtype}
    assert_as_good(found, expected, exact(model), torch.bfloat16)


def train(model: nn.Module, steps: int = 4, micro_batches: int = 2) -> list[float]:
    losses, optimizer = [], torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        for _ in range(micro_batches):
            loss = model(**batch()).loss / micro_batches
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_steps_of_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights change in place between steps, and not between micro-batches: the bits of casts that are made each time."""
    ours, theirs = fp8(tiny()), fp8(tiny())
    found = train(ours)
    monkeypatch.setattr(fp8_patch, "_held", lambda *_: None)
    assert train(theirs) == found
    assert found[-1] < 0.9 * found[0]


def test_a_scaler_skips_a_step_that_is_not_finite() -> None:
    ours = fp8(tiny())
    before = copy.deepcopy(ours.state_dict())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    scaler.scale(ours(**batch()).loss * 1e6).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert scaler.get_scale() < 2.0**127
    optimizer.zero_grad()
    assert all(gradient.isfinite().all() for gradient in step(ours, **batch()).gradients.values())


def test_evaluation_gives_the_models_own_bits() -> None:
    model = tiny()
    ours = fp8(model).eval()
    with torch.no_grad():
        assert torch.equal(ours(**batch()).logits, model.eval()(**batch()).logits)


def test_checkpoints_do_not_know(tmp_path: Any) -> None:
    """Names, dtypes and values of the state; files, pickles and copies of a model in training; the model after revert."""
    model = tiny(dtype=torch.bfloat16)
    ours: Any = applied(model, fp8="tensorwise")
    step(ours, **batch())
    for other in (ours, copy.deepcopy(ours), _pickled(ours)):
        state = other.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(value.dtype == state[name].dtype for name, value in model.state_dict().items())
    assert type(_pickled(ours).model.layers[0].mlp.up_proj) is nn.Linear
    ours.save_pretrained(tmp_path)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    accel.revert(ours)
    assert_equal(step(ours, **batch()), step(model, **batch()))
    assert not any("_accel_" in name for child in ours.modules() for name in vars(child))


def _pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def refusals(model: nn.Module, **settings: Any) -> dict[str, str]:
    plan = accel.plan(model, **{**only(), **settings})
    return {refusal.what: refusal.reason for fusion, refusal in plan.refusals if fusion == "fp8"}


def test_never_the_head_an_embedding_or_a_router() -> None:
    model = tiny("mixtral", num_local_experts=16, num_experts_per_tok=2, vocab_size=96, tie_word_embeddings=False)
    refused = refusals(model, fp8="tensorwise")
    assert "head" in refused["lm_head"]
    assert not any(name.endswith(("o_proj", "q_proj")) for name in refused)
    tied = refusals(tiny(vocab_size=96, tie_word_embeddings=True), fp8="tensorwise")
    assert set(tied) == {"lm_head"}

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(32, 16), nn.ModuleList(nn.Linear(32, 32) for _ in range(16))
            self.other = nn.Linear(32, 32)

    assert "router" in refusals(Routed(), fp8="tensorwise")["router"]
    assert set(refusals(Routed(), fp8="tensorwise")) == {"router"}


def test_sizes_that_the_hardware_does_not_take() -> None:
    refused = refusals(tiny(intermediate_size=40), fp8="tensorwise")
    assert all("multiples of 16" in reason for name, reason in refused.items() if "mlp" in name)
    assert len([name for name in refused if "mlp" in name]) == 6
    ours = fp8(tiny(intermediate_size=40))
    assert_close(step(ours, **batch()), step(defined_but(tiny(intermediate_size=40), "mlp"), **batch()))


def defined_but(model: nn.Module, left_out: str) -> nn.Module:
    made = defined(model, "tensorwise")
    for name, linear in linears_of(made).items():
        if left_out in name:
            del vars(linear)["forward"]
    return made


def test_patterns_of_names() -> None:
    model = tiny()
    ours = fp8(model, fp8_layers="*.mlp.*, *.0.self_attn.o_proj")
    assert_close(
        step(ours, **batch()),
        step(_only_named(model, lambda name: ".mlp." in name or name.endswith("0.self_attn.o_proj")), **batch()),
    )
    for wrong in (3, [""], [1], "a,,b"):
        with pytest.raises(ValueError, match=r'expected patterns of names, such as "\*\.mlp\.\*'):
            accel.apply(tiny(), fp8=True, fp8_layers=wrong)


def _only_named(model: nn.Module, chosen: Any) -> nn.Module:
    made = defined(model, "tensorwise")
    for name, linear in linears_of(made).items():
        if not chosen(name):
            del vars(linear)["forward"]
    return made


def big(hidden: int, intermediate: int, heads: int) -> nn.Module:
    """One layer on meta."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=8,
        num_hidden_layers=1,
        vocab_size=512,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).bfloat16()


def test_auto_takes_what_pays() -> None:
    """On an H100 all linears of an 8B model; of a 1B model none; never on a machine without 8-bit products. With the numbers."""
    large, small = (accel.plan(big(*sizes), fp8="auto", facts=H100) for sizes in ((4096, 14336, 32), (2048, 8192, 32)))
    claims = [claim for claim in large.claims if claim.fusion == "fp8"]
    assert sorted(name.split(".")[-1] for claim in claims for name in claim.taken) == sorted(LINEARS * 2)
    assert "products 0.74 ms less, casts 0.22 ms" in " ".join(claim.label for claim in claims)
    assert [claim for claim in small.claims if claim.fusion == "fp8"] == []
    reasons = [refusal.reason for fusion, refusal in small.refusals if fusion == "fp8"]
    assert len(reasons) == 7
    assert all("does not pay" in reason and "casts" in reason for reason in reasons)
    (refused,) = refusals(tiny(), fp8="auto").values()
    assert f"({this_machine().arch}) multiplies 8-bit values no faster" in refused
    assert accel.report(applied(tiny(), fp8="auto", strict=True)).places("fp8") == 0
    assert "slower than without fp8" in str(accel.plan(tiny(), fp8="rowwise")).replace("\n", " ")
    assert "slower" not in " ".join(claim.label for claim in claims)


def test_a_request_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="Did you mean 'tensorwise'"):
        accel.apply(tiny(), fp8="tensorwide")
    model = tiny("gpt_neox", hidden_size=24, intermediate_size=40)
    with pytest.raises(accel.RefusedError, match="multiples of 16"):
        accel.apply(model, fp8="rowwise", strict=True)
    assert accel.report(accel.apply(model, fp8="rowwise")).places("fp8") == 0


def test_float64_and_calls_outside_of_the_proof() -> None:
    model = tiny(dtype=torch.float64)
    assert_equal(step(fp8(model), **batch()), step(model, **batch()))


def test_producers_note_what_a_cast_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and gated activations in Triton: the same bits, and no pass over their outputs for the largest value."""
    pytest.importorskip("triton")
    given: list[tuple[int, str]] = []
    in_triton: Any = dict.fromkeys(("norm", "mlp", "residual"), "triton")
    for recipe, model, frozen in (
        ("tensorwise", tiny(), False),
        ("rowwise", tiny(), False),
        ("rowwise", adapted(), True),
    ):
        ours = fp8(model, recipe, **in_triton)
        counts = accel.report(ours).counts
        with monkeypatch.context() as patch:
            patch.setattr(counts, "wishes", {})
            expected = step(ours, **batch())
        for name in ("maxima_of", "cast_of"):
            _watch(monkeypatch, name, given)
        assert_equal(step(ours, **batch()), expected)
        monkeypatch.undo()
        of_maxima, of_casts = ([width for width, what in given if what == name] for name in ("maxima_of", "cast_of"))
        assert sorted(of_casts if frozen else of_maxima) == [32] * 4 + [48] * 2
        given.clear()


def _watch(monkeypatch: pytest.MonkeyPatch, name: str, given: list[tuple[int, str]]) -> None:
    real = getattr(noted, name)

    def watched(x: torch.Tensor) -> Any:
        if (found := real(x)) is not None:
            given.append((x.shape[-1], name))
        return found

    monkeypatch.setattr(noted, name, watched)


# LoRA on a frozen base


def adapted(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """LoRA on some linears, so that others are frozen on their own."""
    torch.manual_seed(0)
    settings: Any = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], **config}
    model = peft.get_peft_model(tiny(dtype=dtype), peft.LoraConfig(**settings), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model.train()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not RECIPES[name].delayed])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_adapters_beside(recipe: str, dropout: float) -> None:
    """As PEFT with the definition in its base layers, by the same random numbers."""
    model = adapted(lora_dropout=dropout)
    ours, theirs = fp8(model, recipe), defined(model, recipe)
    for _ in range(2):
        torch.manual_seed(3)
        found = step(ours, **batch())
        torch.manual_seed(3)
        assert_close(found, step(theirs, **batch()))
    assert served(ours) == 2 * 2 * 4


def bytes_on_device(model: nn.Module) -> int:
    """Of the linears' weights: what the parameters hold, and what is held in their place."""
    found = {}
    for linear in linears_of(model).values():
        tensors = [linear.weight]
        if (record := vars(linear).get("_accel_base8")) is not None and record.joined is not None:
            tensors += [record.joined.q, record.joined.scale]
        found.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors})
    return sum(found.values())


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_frozen_base_takes_one_byte_a_parameter(recipe: str) -> None:
    ours = fp8(adapted(torch.bfloat16), recipe)
    count = sum(linear.weight.numel() for linear in linears_of(ours).values())
    assert bytes_on_device(ours) == 2 * count
    first = step(ours, **batch())
    rows = sum(len(linear.weight) for linear in linears_of(ours).values())
    most = 4 * rows if recipe == "rowwise" else 4 * 8
    assert count <= bytes_on_device(ours) <= count + most + 2 * 14
    assert_equal(step(ours, **batch()), first)
    weight = ours.base_model.model.model.layers[0].self_attn.k_proj.weight
    assert (weight.shape, weight.dtype, weight.requires_grad) == ((16, 32), torch.bfloat16, False)
    assert weight.isnan().all(), "who reads it must see that it is not there"


def test_a_base_that_is_not_there_comes_back(tmp_path: Any) -> None:
    """For a state_dict, a file, a copy, a pickle, a move, a merge, an adapter that reads it, and revert."""
    model = adapted(torch.bfloat16)
    expected = model.state_dict()

    def right(state: dict[str, torch.Tensor]) -> bool:
        assert state.keys() == expected.keys()
        return all(torch.equal(value, expected[name]) for name, value in state.items())

    def trained() -> Any:
        ours = fp8(model)
        step(ours, **batch())
        assert linears_of(ours)["base_model.model.model.layers.0.self_attn.k_proj"].weight.isnan().all()
        return ours

    ours = trained()
    assert right(ours.state_dict())
    step(ours, **batch())
    assert right(copy.deepcopy(ours).state_dict())
    step(ours, **batch())
    assert right(_pickled(ours).state_dict())
    step(ours, **batch())
    assert right(ours.to(torch.float32).to(torch.bfloat16).state_dict())
    step(ours, **batch())
    ours.load_state_dict(expected)
    assert right(ours.state_dict())
    step(ours, **batch())
    assert right(accel.revert(ours).state_dict())
    assert_equal(step(ours, **batch()), step(model, **batch()))

    ours = trained()
    merged, theirs = ours.merge_and_unload(), copy.deepcopy(model).merge_and_unload()
    assert all(torch.equal(value, merged.state_dict()[name]) for name, value in theirs.state_dict().items())
    trained().save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 2 * 4


def test_evaluation_and_generation_on_a_base_in_8_bits() -> None:
    """By the base that the adapters were trained on; with adapters switched off as well."""
    model = adapted()
    ours, theirs = fp8(model), defined(model, "tensorwise")
    step(ours, **batch())
    for off in (False, True):
        outputs = []
        for one in (ours, theirs):
            with torch.no_grad(), one.disable_adapter() if off else torch.no_grad():
                outputs.append(one.eval()(**batch()).logits)
        verdict = judge(*outputs, _exact_logits(model, off))
        assert verdict.passed, verdict
    assert ours.generate(input_ids=batch()["input_ids"], max_new_tokens=3, do_sample=False).shape == (2, 27)


def _exact_logits(model: Any, off: bool) -> torch.Tensor:
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad(), model.disable_adapter() if off else torch.no_grad():
        logits: torch.Tensor = model(**batch()).logits
    return logits


def test_a_weight_that_is_to_train_after_all() -> None:
    ours = fp8(adapted())
    step(ours, **batch())
    linear = ours.base_model.model.model.layers[0].self_attn.k_proj
    linear.weight.requires_grad_(True)
    assert step(ours, **batch()).gradients["base_model.model.model.layers.0.self_attn.k_proj.weight"].isfinite().all()
    assert linear.weight.isfinite().all()


def test_adapters_that_read_the_weight() -> None:
    """DoRA is PEFT's, and finds the weight."""
    model = adapted(use_dora=True)
    ours = fp8(model)
    found = step(ours, **batch())
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())
    ours.add_adapter("plain", peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    ours.set_adapter("plain")
    step(ours, **batch())
    ours.set_adapter("default")
    assert step(ours, **batch()).loss.isfinite()
    assert gradients(ours).keys() >= found.gradients.keys()
