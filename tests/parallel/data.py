"""What each of two processes runs: `torchrun --nproc_per_node 2 -m tests.parallel.data FOLDER`.

What the table of scale.py does not hold. A process leaves FOLDER/rank.json: for each check what was wrong (empty where nothing was).
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import functools
import json
import shutil
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import automodel_accel as accel
from automodel_accel.kernels.numerics import judge
from automodel_accel.parallel import Mesh, accumulate, clip_grad_norm_, draw_sharded, gradients, load_sharded
from tests.parallel import scale
from tests.parallel.scale import LINEARS, whole
from tests.tiny import batch, tiny

UNITS = 5  # of an untied model: two layers, the embedding, the head, the root
SHARD = Mesh(shard=2)


class Calls(TorchDispatchMode):
    """Counts collectives that sum gradients up."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def ways() -> None:
    """What a mesh says of memory and speed changes no number."""
    for mesh, settings in (
        (Mesh(prefetch=2, reshard=False), {"recompute": "full"}),
        (Mesh(offload=True, prefetch=0), {"recompute": "mlp"}),
        (Mesh(replicate=2), {"recompute": "full"}),
    ):
        spread = accel.apply(scale.build()[0], mesh=mesh, **settings)
        wrong = scale.problem(scale.train(spread, mesh.ranks(), clip_grad_norm_), scale.expected("full"))
        assert not wrong, (str(mesh), wrong)


def compiled() -> None:
    """Each layer is handed to torch.compile, under the wrapper."""
    mesh = Mesh(compile=True)
    spread: Any = accel.apply(scale.build()[0], mesh=mesh)
    assert all(layer._compiled_call_impl is not None for layer in spread.model.layers)
    with torch.compiler.set_stance("force_eager"):
        wrong = scale.problem(scale.train(spread, mesh.ranks(), clip_grad_norm_), scale.expected("full"))
    assert not wrong, wrong
    assert "compiled" in accel.report(spread).mesh


def summed_once() -> None:
    """Gradients are summed up in the last micro-batch only; without `accumulate`, in each."""
    spread = accel.apply(tiny(tie_word_embeddings=False), mesh=SHARD)
    counts = []
    for last in (False, True, None):
        with Calls() as calls, accumulate(spread, last is not False):
            spread(**batch()).loss.backward()
        counts.append(calls.count)
    assert counts == [0, UNITS, UNITS], counts


def low_precision() -> None:
    """Gathered in bfloat16, errors are those of transformers gathered so."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ours: Any = accel.apply(tiny(tie_word_embeddings=False), mesh=Mesh(param_dtype="bfloat16"))
    theirs: Any = tiny(tie_word_embeddings=False)
    mesh = init_device_mesh("cpu", (2,))
    for unit in (*theirs.model.layers, theirs):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    truth = tiny(tie_word_embeddings=False).double()
    losses = [torch.stack([_loss_of(model, step) for step in range(scale.STEPS)]) for model in (ours, theirs, truth)]
    grads = [{name: whole(p.grad) for name, p in model.named_parameters()} for model in (ours, theirs, truth)]
    pairs = {"loss": losses, **{name: [grad[name] for grad in grads] for name in grads[0]}}
    bad = {name: found for name, (a, b, c) in pairs.items() if not (found := judge(a, b, c)).passed}
    assert not bad, bad


def _loss_of(model: Any, step: int) -> torch.Tensor:
    ids, labels = scale.rows(step)
    loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return loss.detach()


def _mixed() -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """Parameters that lie in every way, with gradients; and these gradients whole."""
    flat, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    generator = torch.Generator().manual_seed(0)
    parameters, wholes = [], []
    for shape, mesh, placements in (
        ((4, 6), flat, [Shard(0)]),
        ((3, 5), flat, [Shard(1)]),
        ((1, 7), flat, [Shard(0)]),  # the second rank has nothing
        ((5,), flat, [Replicate()]),
        ((6, 4), grid, [Replicate(), Shard(0)]),
        ((4, 4), grid, [Shard(1), Shard(0)]),
        ((8,), None, []),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            grad = torch.randn(shape, generator=generator).to(dtype)
            spread = grad.clone() if mesh is None else distribute_tensor(grad.clone(), mesh, placements)
            parameters.append(nn.Parameter(torch.zeros_like(spread)))
            parameters[-1].grad = spread
            wholes.append(grad)
    return parameters, wholes


def clipped() -> None:
    """Over every mesh at once as torch's function on whole gradients, for each norm; copies counted twice are seen."""
    for power in (2.0, 1.0, float("inf")):
        parameters, wholes = _mixed()
        expected = torch.linalg.vector_norm(torch.cat([grad.double().flatten() for grad in wholes]), power)
        norm = clip_grad_norm_(parameters, 0.5, power)
        torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
        for parameter, grad in zip(parameters, wholes, strict=True):
            close = {"rtol": 1e-6, "atol": 1e-7} if grad.dtype == torch.float32 else {"rtol": 8e-3, "atol": 0}
            torch.testing.assert_close(whole(parameter.grad), (grad * (0.5 / expected)).to(grad.dtype), **close)
    parameters, _ = _mixed()
    small = [whole(p.grad).clone() for p in parameters]
    clip_grad_norm_(parameters, 1e9)
    assert all(torch.equal(whole(p.grad), was) for p, was in zip(parameters, small, strict=True))
    right = clip_grad_norm_(parameters, 1e9)
    with mock.patch.object(gradients, "_copies", return_value=1):
        assert abs(clip_grad_norm_(parameters, 1e9) / right - 1) > 1e-2


def on_meta(folder: Path) -> None:
    """Built on meta, read and drawn in shards: rotary frequencies, ties and adapters are there, and it trains as the whole one."""
    for name in ("full, tied", "LoRA"):
        at = folder / name
        model, config = scale.build(**scale.MODELS[name])
        if dist.get_rank() == 0:
            model.save_pretrained(at)
        dist.barrier()
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(at)).train()
        spread = accel.apply(empty, mesh=SHARD, lora=config)
        load_sharded(spread, at)
        for path, parameter in spread.named_parameters():
            if "lora_" not in path:
                short = path.replace("base_model.model.", "").replace(".base_layer", "")
                assert torch.equal(whole(parameter.data), model.get_parameter(short)), path
        for path, buffer in spread.named_buffers():
            assert torch.equal(buffer, model.get_buffer(path.replace("base_model.model.", ""))), path
        if config is None:
            wrong = scale.problem(scale.train(spread, SHARD.ranks(), clip_grad_norm_), scale.expected(name))
            assert not wrong, (name, wrong)
        else:
            drawn = {n: whole(p.data) for n, p in spread.named_parameters() if "lora_" in n}
            assert all(value.isfinite().all() and value.std() > 0 for value in drawn.values())
            assert same_everywhere(drawn.values())


def cut_on_meta(folder: Path) -> None:
    """With tensor parallel, packed weights too: read, and saved again."""
    at, again = folder / "cut", folder / "cut, saved"
    model: Any = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2)
    if dist.get_rank() == 0:
        model.save_pretrained(at, save_original_format=False)
    dist.barrier()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(at)).train()
    spread: Any = accel.apply(empty, mesh=Mesh(tensor=2))
    load_sharded(spread, at)
    assert all(torch.equal(whole(p.data), model.get_parameter(name)) for name, p in spread.named_parameters())
    packed = spread.model.layers[0].mlp.experts.gate_up_proj
    assert 2 * packed.to_local().numel() == packed.numel()
    spread.save_pretrained(again)
    saved = AutoModelForCausalLM.from_pretrained(again)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in saved.named_parameters())


def from_a_folder(folder: Path) -> None:
    """One call: built on meta and read in parts, or read whole where each rank keeps all."""
    at = folder / "LoRA"
    alone = AutoModelForCausalLM.from_pretrained(at)
    for mesh in (SHARD, Mesh(replicate=2)):
        spread = accel.AutoModelForCausalLM.from_pretrained(at, mesh=mesh)
        assert isinstance(spread.lm_head.weight, DTensor) == (mesh is SHARD)
        assert spread.generation_config.to_dict() == alone.generation_config.to_dict()
        assert not spread.training
        assert all(torch.equal(whole(p.data), alone.get_parameter(name)) for name, p in spread.named_parameters())
    load = functools.partial(accel.AutoModelForCausalLM.from_pretrained, mesh=SHARD)
    assert "device_map: with mesh=" in said(lambda: load(at, device_map="auto"))
    assert "hf download some/model" in said(lambda: load("some/model"))
    assert "accel=False leaves" in said(lambda: load(at, accel=False))


def drawn() -> None:
    """Without a checkpoint: as transformers draws, alike on both ranks, which start from other seeds."""
    config = tiny(tie_word_embeddings=True).config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).train()
    torch.manual_seed(dist.get_rank())
    spread: Any = accel.apply(empty, mesh=Mesh(replicate=2, strategy="fsdp2"))
    draw_sharded(spread)
    assert spread.lm_head.weight is spread.model.embed_tokens.weight
    assert same_everywhere(whole(p.data) for p in spread.parameters())
    q, norm = (whole(p.data) for p in (spread.model.layers[0].self_attn.q_proj.weight, spread.model.norm.weight))
    assert abs(float(q.std()) / config.initializer_range - 1) < 0.2
    assert torch.equal(norm, torch.ones_like(norm))
    assert spread(**batch()).loss.isfinite()


def bad_checkpoints(folder: Path) -> None:
    """What is missing, left over, of another shape or cut short is named."""
    from safetensors.torch import load_file, save_file

    source = folder / "LoRA" / "model.safetensors"
    tensors = load_file(source)
    with torch.device("meta"):
        empty: nn.Module = AutoModelForCausalLM.from_config(tiny(tie_word_embeddings=False).config)
    accel.apply(empty, mesh=SHARD)
    at, file = folder / f"bad{dist.get_rank()}", "model.safetensors"
    at.mkdir()
    shape = {"model.norm.weight": torch.zeros(7)}
    left = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    for changed, words in (
        (left, "missing: model.norm.weight"),
        ({**tensors, "model.new.weight": torch.zeros(2)}, "left over: model.new.weight"),
        ({**tensors, **shape}, r"model.norm.weight is (7,) in the checkpoint, and (32,)"),
    ):
        save_file(changed, at / file)
        assert words in said(lambda: load_sharded(empty, at)), words
    (at / file).write_bytes(source.read_bytes()[:1000])
    assert "not a whole file" in said(lambda: load_sharded(empty, at))
    assert "found none" in said(lambda: load_sharded(empty, folder / "nowhere"))
    assert "has values already" in said(lambda: load_sharded(tiny(), at))
    shutil.rmtree(at)


def saved(folder: Path) -> None:
    """`save_pretrained` writes what plain transformers and PEFT load."""
    for name, mesh in (("sharded", SHARD), ("replicated", Mesh(replicate=2))):
        model = tiny(tie_word_embeddings=False)
        expected = {key: value.clone() for key, value in model.state_dict().items()}
        spread: Any = accel.apply(model, mesh=mesh)
        spread.save_pretrained(folder / name)
        loaded = AutoModelForCausalLM.from_pretrained(folder / name)
        assert type(loaded).__name__ == "LlamaForCausalLM"
        assert loaded.config.architectures == ["LlamaForCausalLM"]
        assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    model, config = scale.build(lora=LINEARS)
    spread = accel.apply(model, mesh=SHARD, lora=config)
    spread.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(scale.build()[0], folder / "adapter")
    expected = {n.replace(".default", ""): whole(p.data) for n, p in spread.named_parameters() if "lora_" in n}
    found = {n.replace(".default", ""): p for n, p in again.named_parameters() if "lora_" in n}
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def evaluated() -> None:
    """Forward without labels and `generate` give what the model gives that is not spread; with adapters too."""
    for mesh, name in ((SHARD, "LoRA, tied"), (Mesh(replicate=2), "full")):
        ids = {"input_ids": batch()["input_ids"]}
        model, config = scale.build(**scale.MODELS[name])
        spread: Any = accel.apply(model, mesh=mesh, lora=config).eval()
        alone: Any = scale.plain(**scale.MODELS[name]).eval()
        with torch.no_grad():
            torch.testing.assert_close(spread(**ids).logits, alone(**ids).logits, rtol=1e-5, atol=1e-5)
            tokens = [model.generate(**ids, max_new_tokens=3, do_sample=False) for model in (spread, alone)]
        assert torch.equal(*tokens)


def same_values() -> None:
    """Ranks that built other weights train the first one's."""
    for mesh in (SHARD, Mesh(replicate=2)):
        model = tiny()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(dist.get_rank())
        accel.apply(model, mesh=mesh)
        for parameter, first in zip(model.parameters(), tiny().parameters(), strict=True):
            assert torch.equal(whole(parameter.data), first)


def same_everywhere(tensors: Any) -> bool:
    """Whether both ranks have the same."""
    flat = torch.cat([tensor.flatten().float() for tensor in tensors])
    others = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(others, flat)
    return torch.equal(*others)


def said(call: Callable[[], Any]) -> str:
    """The words of an error."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


def after_apply() -> None:
    """A model that was applied before keeps its settings; one that is spread is not spread again, nor reverted."""
    model = accel.apply(tiny(tie_word_embeddings=True), norm=False)
    spread = accel.parallelize(model, SHARD)
    assert accel.report(spread).plan.config.norm is False
    assert isinstance(spread.lm_head.weight, DTensor)
    assert "is spread over processes already: shard 2: FSDP2" in said(lambda: accel.apply(spread, mesh=SHARD))
    assert "which cannot be taken back" in said(lambda: accel.revert(spread))
    assert "FSDP2" in str(accel.report(spread))
    assert "is not needed" in said(lambda: nn.parallel.DistributedDataParallel(spread))
    assert accel.report(spread).to_dict()["mesh"] == "shard 2: FSDP2 in units of 2 layers, root"
    assert "needs 4 processes, but there are 2" in said(lambda: accel.apply(tiny(), mesh=Mesh(replicate=2, shard=2)))


def main(folder: Path) -> None:
    """Run every check."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    shared = folder / "shared"
    found = {}
    for check in CHECKS:
        try:
            check(shared) if check in WITH_FOLDER else check()
            found[check.__name__] = ""
        except AssertionError:
            found[check.__name__] = traceback.format_exc()
        dist.barrier()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


CHECKS: tuple[Any, ...] = (
    *(ways, compiled, summed_once, low_precision, clipped, on_meta, cut_on_meta, from_a_folder, drawn, bad_checkpoints),
    *(saved, evaluated, same_values, after_apply),
)
WITH_FOLDER = (on_meta, cut_on_meta, from_a_folder, bad_checkpoints, saved)

if __name__ == "__main__":
    main(Path(sys.argv[1]))
