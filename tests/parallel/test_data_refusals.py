"""Meshes and models that do not fit: said before anything is changed. One process, which is a whole run of torch.distributed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import automodel_accel as accel
from automodel_accel import Mesh
from automodel_accel.kernels.facts import this_machine
from automodel_accel.parallel.files import check_names, shapes_in
from automodel_accel.parallel.gradients import accumulate, clip_grad_norm_
from automodel_accel.parallel.wrap import layers_of, units_of
from automodel_accel.patches.retype import is_retyped
from tests.tiny import batch, tiny


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor": 0}, "tensor is 0"),
        ({"shard": -2}, "shard is -2"),
        ({"strategy": "fsdp"}, "Did you mean 'fsdp2'"),
        ({"param_dtype": "bf16"}, "bfloat16"),
        ({"sequence_parallel": True}, "tensor is 1"),
        ({"strategy": "ddp", "offload": True}, "offload are FSDP2's"),
        ({"strategy": "ddp", "param_dtype": "bfloat16"}, "param_dtype and offload are FSDP2's"),
        ({"prefetch": -1}, "prefetch is -1"),
    ],
)
def test_no_such_mesh(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mesh(**settings)


@pytest.mark.parametrize(
    ("mesh", "world", "words"),
    [
        (Mesh(shard=4), 6, "shard 4 needs 4 processes, but there are 6"),
        (Mesh(replicate=4), 6, "needs a multiple of 4 processes, but there are 6"),
        (Mesh(tensor=8), 4, "needs a multiple of 8 processes, but there are 4"),
        (
            Mesh(strategy="ddp"),
            2,
            "keeps all parameters on each rank, but shard 2 cuts them; set replicate=2 and shard=1",
        ),
        (Mesh(strategy="ddp", shard=1, tensor=2), 2, "tensor 2 cuts them"),
        (Mesh(strategy="megatron_fsdp", tensor=2), 4, "replicate and shard alone, not with shard 2 x tensor 2"),
    ],
)
def test_mesh_that_is_not_the_run(mesh: Mesh, world: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mesh.sized(world)


@pytest.mark.parametrize(
    ("mesh", "world", "wrapping"),
    [
        (Mesh(), 1, "none"),
        (Mesh(), 8, "fsdp2"),
        (Mesh(replicate=8), 8, "ddp"),
        (Mesh(replicate=2), 8, "fsdp2"),
        (Mesh(replicate=2, tensor=2), 4, "fsdp2"),
        (Mesh(tensor=2), 2, "none"),
        (Mesh(replicate=2, offload=True), 2, "fsdp2"),
        (Mesh(param_dtype="bfloat16"), 1, "fsdp2"),
    ],
)
def test_what_a_mesh_means(mesh: Mesh, world: int, wrapping: str) -> None:
    assert mesh.sized(world).wrapping == wrapping


def test_alone_without_a_launcher() -> None:
    spread = accel.apply(tiny(), mesh=Mesh())
    assert accel.report(spread).mesh == "shard 1: one process"
    assert spread(**batch()).loss.isfinite()
    with pytest.raises(ValueError, match="needs 2 processes, but there are 1"):
        accel.apply(tiny(), mesh=Mesh(shard=2))
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 1"):
        accel.apply(tiny(), mesh=Mesh(param_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"mesh is a int; expected a Mesh, such as Mesh\(shard=8\)"):
        accel.apply(tiny(), mesh=8)  # type: ignore[arg-type]


def quantised(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.uint8), requires_grad=False)


def two_dtypes(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.to(torch.bfloat16)


def a_number(model: Any) -> None:
    model.model.norm.scale = nn.Parameter(torch.tensor(1.0))


def sharded(model: Any) -> None:
    fully_shard(model)


def elsewhere(model: Any) -> None:
    model.hf_device_map = {"model": 0, "lm_head": 1}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            quantised,
            r"layers.1.mlp.up_proj.weight is quantised \(Parameter of torch.uint8\), and FSDP2 cannot cut it; load",
        ),
        (two_dtypes, "model.layers.1 has trainable parameters of torch.bfloat16 and torch.float32"),
        (a_number, "model.norm.scale is a single number"),
        (sharded, "is wrapped already; give the model before DDP or fully_shard"),
        (elsewhere, "without device_map"),
    ],
)
def test_model_that_cannot_be_sharded(change: Callable[[Any], None], words: str) -> None:
    model = tiny(tie_word_embeddings=False)
    change(model)
    was_sharded = isinstance(model, FSDPModule)
    for lora in (None, {"r": 2, "target_modules": ["q_proj"]}):
        if lora is not None and change is two_dtypes:
            continue  # then it does not train
        with pytest.raises(ValueError, match=words):
            accel.apply(model, mesh=Mesh(strategy="fsdp2"), lora=lora)
        assert not any(is_retyped(module) for module in model.modules())
        assert isinstance(model, FSDPModule) == was_sharded
        assert all("lora" not in name for name, _ in model.named_modules())


@pytest.mark.usefixtures("one_process")
def test_adapters_are_taken_out_where_dtypes_do_not_fit() -> None:
    model = tiny(tie_word_embeddings=False)
    names = dict(model.named_parameters()).keys()
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model.lm_head.to(torch.bfloat16)
    model.lm_head.bias = nn.Parameter(torch.zeros(97))
    with pytest.raises(ValueError, match=r"trainable parameters of torch.bfloat16 and torch.float32"):
        accel.apply(model, mesh=Mesh(strategy="fsdp2"), lora=lora)
    assert names | {"lm_head.bias"} == dict(model.named_parameters()).keys()
    assert not any(is_retyped(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.usefixtures("one_process")
def test_meta_without_shards() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="on meta"):
        accel.apply(model, mesh=Mesh(strategy="ddp", shard=1))


@pytest.mark.usefixtures("one_process")
def test_megatron_fsdp_elsewhere() -> None:
    mesh = Mesh(strategy="megatron_fsdp").ranks("cpu")
    with pytest.raises(ValueError, match='runs on CUDA devices, and this machine trains on cpu; use strategy="fsdp2"'):
        accel.apply(tiny(), mesh=mesh, facts=replace(this_machine(), device="cpu"))
    with pytest.raises(
        ValueError, match="the package megatron-fsdp, which is not installed: pip install megatron-fsdp"
    ):
        accel.apply(tiny(), mesh=mesh, facts=replace(this_machine(), device="cuda", packages={}))


@pytest.mark.parametrize(
    ("name", "layers", "others"),
    [
        ("llama", 2, ["model.embed_tokens", "lm_head"]),
        ("gemma2", 2, []),  # tied
        ("gpt_neox", 2, ["gpt_neox.embed_in", "lm_head"]),
        ("bert", 2, []),
        ("t5", 4, []),
        ("bart", 2, []),
    ],
)
def test_units(name: str, layers: int, others: list[str]) -> None:
    model = tiny(name)
    units = units_of(model)
    assert [unit.kind for unit in units][:layers] == ["layer"] * layers
    assert [unit.path for unit in units][layers:] == others


def test_layers_of_a_model_of_ones_own() -> None:
    model = nn.Sequential(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.ModuleList([nn.Linear(2, 2)] * 2))
    assert layers_of(model) == list(model[0])
    shared = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
    shared["layers"][2].weight = shared["layers"][0].weight  # type: ignore[index]
    assert [unit.path for unit in units_of(shared)] == ["layers.1"]


def test_names_that_transformers_converts(tmp_path: Path) -> None:
    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "original")
    with pytest.raises(ValueError, match=r"missing: model.layers.0.*do that once: .*save_original_format=False"):
        check_names(model, wanted, shapes_in(tmp_path / "original"))
    model.save_pretrained(tmp_path / "converted", save_original_format=False)
    check_names(model, wanted, shapes_in(tmp_path / "converted"))


def test_gradients_of_a_model_that_is_not_spread() -> None:
    ours, theirs = tiny(), tiny()
    for model in (ours, theirs):
        for number in range(2):
            with accumulate(model, last=number == 1):
                model(**batch()).loss.backward()
    norms = clip_grad_norm_(ours, 0.1), nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    torch.testing.assert_close(*norms)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert clip_grad_norm_([], 1.0) == 0
