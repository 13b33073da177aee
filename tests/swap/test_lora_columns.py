"""LoRA by the Triton kernels in whole models, with B beside frozen weights: as right as PEFT, and nothing of it seen from outside."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("triton")

import automodel_accel as accel
from automodel_accel.kernels import room
from tests.budgets.layers import LINEARS
from tests.swap.compare import Step, assert_as_good, assert_close, assert_equal, gradients, step
from tests.swap.test_wrappers import shard, whole
from tests.tiny import batch, tiny

TRITON: dict[str, Any] = dict.fromkeys(("linear", "norm", "mlp", "residual"), "triton")
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.base_layer"


def adapted(architecture: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": LINEARS, "init_lora_weights": False, **config}
    return peft.get_peft_model(tiny(architecture, dtype), peft.LoraConfig(**settings)).train()


def pair(recompute: str | None = None, **config: Any) -> tuple[Any, Any]:
    """Ours and PEFT's, equal."""
    theirs = adapted(**config)
    return accel.apply(copy.deepcopy(theirs), recompute=recompute, **TRITON), theirs


def seeded(model: Any, **inputs: Any) -> Step:
    torch.manual_seed(5)
    return step(model, **inputs)


def gap(model: Any, name: str = Q_PROJ) -> int:
    """Columns beside the weight."""
    weight = model.get_submodule(name).weight
    return int(weight.stride(0) - weight.shape[1])


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {}),
        ("qwen3", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 12, "use_rslora": True}),
        ("phi3", {"target_modules": "all-linear", "rank_pattern": {"qkv_proj": 7, "gate_up_proj": 16}}),
    ],
    ids=["llama", "qwen3", "phi3"],
)
def test_steps_are_pefts(architecture: str, config: Any) -> None:
    ours, theirs = pair(architecture=architecture, **config)
    for _ in range(2):
        assert_close(step(ours, **batch()), step(theirs, **batch()))
    counts = accel.report(ours).counts
    assert not [reason for reason in counts.passed_on if reason.startswith("linear")]
    adapters = [
        name for name, module in ours.named_modules() if hasattr(module, "base_layer") and "lm_head" not in name
    ]
    assert adapters
    assert all(gap(ours, f"{name}.base_layer") > 0 for name in adapters)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    """Adapters in the dtype of the base; and in float32, as PEFT keeps them, where autocast computes with them in bfloat16."""
    ours, theirs = pair(dtype=torch.bfloat16)
    if not autocast:
        ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    steps = []
    for model, in_autocast in ((ours, autocast), (theirs, autocast), (copy.deepcopy(theirs).float(), False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=in_autocast):
            steps.append(step(model, **batch()))
    assert_as_good(*steps, torch.bfloat16)
    assert gap(ours) == 24


def test_steps_of_a_fused_optimizer() -> None:
    """B stays a parameter of its own, contiguous: fused optimizers, and those that write through pointers, take no other."""
    losses = []
    for model in pair():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        losses.append([])
        for _ in range(6):
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    assert losses[0][-1] < losses[0][0] - 0.05


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_draw_the_same_masks_again(reentrant: bool) -> None:
    ours, _ = pair(lora_dropout=0.3)
    seeded(ours, **batch())  # makes the columns
    expected = seeded(ours, **batch())
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    assert_close(seeded(ours, **batch()), expected)
    torch.manual_seed(6)
    assert step(ours, **batch()).loss != expected.loss


def test_selective_recompute() -> None:
    ours, theirs = pair(recompute="selective")
    for _ in range(2):
        assert_close(step(ours, **batch()), step(theirs, **batch()))
    assert gap(ours) == 24


def test_the_producers_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    found: list[int] = []
    extended = room.extended
    monkeypatch.setattr(room, "extended", lambda x, columns: found.append(columns) or extended(x, columns))
    step(ours, **batch())
    # in each layer q, k, v; gate, up; down: but for o_proj, whose input no kernel of ours writes
    assert sorted(found) == sorted(2 * [24, 16, 8])


def test_a_state_dict_holds_the_parameters_contiguous(tmp_path: Path) -> None:
    ours, theirs = pair()
    step(ours, **batch())
    assert gap(ours) == 24
    state = ours.state_dict()
    assert gap(ours) == 0
    expected = theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(tensor.is_contiguous() and torch.equal(tensor, expected[name]) for name, tensor in state.items())
    parameters = dict(ours.named_parameters())
    assert all(tensor.data_ptr() == parameters[name].data_ptr() for name, tensor in state.items() if name in parameters)
    del state
    own = {name: tensor for name, tensor in ours.state_dict().items() if "lm_head" not in name}
    save_file(own, tmp_path / "all.safetensors")
    assert load_file(tmp_path / "all.safetensors").keys() == own.keys()
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    assert gap(ours) == 24


def test_saved_by_peft_and_loaded(tmp_path: Path) -> None:
    ours, theirs = pair()
    for name, model in (("ours", ours), ("theirs", theirs)):
        step(model, **batch())
        model.save_pretrained(tmp_path / name)
    mine, others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert mine.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in mine.items())


def test_merged_and_unloaded() -> None:
    models = pair()
    for model in models:
        step(model, **batch())
        model.merge_adapter()
        model.unmerge_adapter()
    assert_close(step(models[0], **batch()), step(models[1], **batch()))
    mine, theirs = (model.merge_and_unload().state_dict() for model in models)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, theirs[name])


def test_copies_and_pickles() -> None:
    ours, theirs = pair()
    expected = step(theirs, **batch())
    step(ours, **batch())
    twin = copy.deepcopy(ours)
    assert gap(twin) == 0
    assert_close(step(twin, **batch()), expected)
    loaded = pickle.loads(pickle.dumps(ours))
    assert type(loaded.get_submodule(Q_PROJ)) is torch.nn.Linear
    assert_close(step(loaded, **batch()), expected)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    assert file.tell() < 1.2 * sum(p.nbytes for p in theirs.parameters()) + 100_000


def test_revert_takes_the_columns_back() -> None:
    ours, theirs = pair()
    step(ours, **batch())
    accel.revert(ours)
    assert gap(ours) == 0
    assert type(ours.get_submodule(Q_PROJ)) is torch.nn.Linear
    assert not [name for name in vars(ours.get_submodule(Q_PROJ)) if name.startswith("_accel")]
    assert_equal(step(ours, **batch()), step(theirs, **batch()))


def test_a_weight_that_trains_has_no_columns() -> None:
    ours, theirs = pair()
    step(ours, **batch())
    for model in (ours, theirs):
        model.get_submodule(Q_PROJ).weight.requires_grad_()
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    assert Q_PROJ + ".weight" in gradients(ours)


def test_a_model_that_moves_gets_its_columns_again() -> None:
    ours, theirs = pair(dtype=torch.bfloat16)
    step(ours, **batch())
    ours, theirs = ours.float(), theirs.float()
    assert gap(ours) == 0
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    assert gap(ours) == 24


def test_another_adapter_of_another_rank() -> None:
    ours, theirs = pair()
    step(ours, **batch())
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.add_adapter("other", peft.LoraConfig(r=9, target_modules=LINEARS, init_lora_weights=False))
        model.set_adapter("other")
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    for model in (ours, theirs):
        model.set_adapter("default")
    assert_close(step(ours, **batch()), step(theirs, **batch()))


def test_fsdp2_computes_with_parameters_of_its_own(mesh: Any) -> None:
    ours, theirs = (model.get_base_model() for model in pair(lora_dropout=0.0))
    expected = step(theirs, **batch())
    shard(ours, mesh, "layers")
    for _ in range(2):
        assert_close(whole(step(ours, **batch())), expected)
    assert accel.report(ours).counts.fused["linear"] == 2 * 8
