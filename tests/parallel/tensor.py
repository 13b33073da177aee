"""What each of two processes runs: `torchrun --nproc_per_node 2 -m tests.parallel.tensor FOLDER`.

Models of several structures, cut over two tensor ranks, against transformers in one process: the losses of two steps and every
gradient of each. The first process leaves FOLDER/found.json; scale.py holds the plain cases over all meshes.
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import copy
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import torch.distributed as dist
from torch import nn

import automodel_accel as accel
from automodel_accel.parallel import Mesh, tensor_local, tensor_proof, tensor_units
from tests.day0.zoo import Type, tiny_model
from tests.parallel.scale import CLOSE, whole
from tests.tiny import batch, tiny

PLAIN, SEQUENCE = Mesh(shard=1, tensor=2), Mesh(shard=1, tensor=2, sequence_parallel=True)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
COMPRESSED = {
    **{"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
}


@dataclass(frozen=True)
class Case:
    """One model over one mesh."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    mesh: Mesh = PLAIN
    lora: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    planned: bool = True


CASES = {
    "norms of heads, MLPs computed again": Case("qwen3", settings={"recompute": "mlp"}),
    "layers computed again": Case("qwen3", settings={"recompute": "full"}),
    "experts": Case("qwen3_moe", EXPERTS),
    "packed gate and up": Case("phi3"),
    "soft-caps, four norms a layer": Case("gemma2"),
    "q, k and v in one, biases": Case("gpt_neox"),
    "biases on a sum": Case("phi"),
    "a number a head, experts with biases": Case("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "heads that are compressed": Case("deepseek_v3", COMPRESSED),
    "no plan": Case("qwen3", planned=False),
    "without our kernels": Case("qwen3", settings={"norm": False, "mlp": False, "linear": False, "loss": False}),
    "LoRA everywhere": Case("qwen3", {"tie_word_embeddings": False}, lora={"target_modules": "all-linear"}),
    "LoRA by PEFT": Case("llama", lora={"target_modules": "all-linear"}, settings={"linear": False}),
    "sequence": Case("qwen3", mesh=SEQUENCE, settings={"recompute": "selective"}),
    "sequence, experts": Case("qwen3_moe", EXPERTS, mesh=SEQUENCE),
    "sequence, LoRA, layers computed again": Case(
        "llama", mesh=SEQUENCE, lora={"target_modules": "all-linear"}, settings={"recompute": "full"}
    ),
}


def build(case: Case) -> nn.Module:
    """Alike in every process."""
    model: nn.Module = tiny(case.name, **case.config)
    if case.lora is not None:
        torch.manual_seed(3)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **case.lora)).train()  # type: ignore[arg-type]
    return model


def check(case: Case, steps: int = 2) -> dict[str, Any]:
    """What differs, and what was refused."""
    theirs = build(case)
    with nullcontext() if case.planned else mock.patch.object(tensor_units, "_planned", return_value={}):
        ours: Any = accel.apply(build(case), mesh=case.mesh, **case.settings)
    far: dict[str, float] = {}
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (theirs, ours)]
    for step in range(steps):
        rows = batch(tokens=12 if step else 24)
        losses = [model(**rows).loss for model in (theirs, ours)]
        for loss in losses:
            loss.backward()
        far["loss"] = max(far.get("loss", 0.0), abs(losses[1].item() / losses[0].item() - 1))
        expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
        for name, p in ours.named_parameters():
            if p.requires_grad:
                distance = float((whole(p.grad) - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
                far[name] = max(far.get(name, 0.0), distance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    report = accel.report(ours)
    cut = [name for name, p in ours.named_parameters() if not p.placements[0].is_replicate()]
    return {
        "far": {name: distance for name, distance in far.items() if not distance < CLOSE},
        "names": len(far),
        "cut": len(cut),
        "refused": [str(no) for fusion, no in report.refusals if fusion == "tensor"],
        "passed on": dict(report.counts.passed_on),
        "logits": report.materialised_logits,
    }


def whole_is_kept() -> dict[str, Any]:
    """What is saved and evaluated is the whole model; real logits are those of plain transformers."""
    theirs, ours = tiny(), accel.apply(tiny(), mesh=PLAIN)
    ids = batch()["input_ids"]
    with torch.no_grad():
        off = (ours.eval()(input_ids=ids).logits - theirs.eval()(input_ids=ids).logits).abs().max().item()
    same = all(
        torch.equal(whole(found), expected)
        for found, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    return {"off": off, "same": same}


def images() -> dict[str, Any]:
    """Models of images and text, some of whose modules read parameters of others: what differs, and what was refused."""
    found = {}
    for name in ("gemma3", "gemma4"):
        made = tiny_model(Type(name, "vlm"))
        models = [copy.deepcopy(made.model), accel.apply(copy.deepcopy(made.model), mesh=PLAIN)]
        losses = [model(**made.batch()).loss for model in models]
        for loss in losses:
            loss.backward()
        theirs, ours = ({n: whole(p.grad) for n, p in m.named_parameters() if p.grad is not None} for m in models)
        largest = max(float(gradient.norm()) for gradient in theirs.values())
        far = {n: float((ours[n] - g).norm()) / max(float(g.norm()), 1e-3 * largest) for n, g in theirs.items()}
        found[name] = {
            "loss": abs(losses[1].item() / losses[0].item() - 1),
            "far": {n: distance for n, distance in far.items() if not distance < CLOSE},
            "refused": [str(no) for fusion, no in accel.report(models[1]).refusals if fusion == "tensor"],
        }
    return found


def seeds() -> float:
    """How far gradients of whole parameters are apart on ranks that were seeded differently before."""
    torch.manual_seed(5 + dist.get_rank())
    model = accel.apply(tiny("phi", resid_pdrop=0.2), mesh=PLAIN)
    model(**batch()).loss.backward()
    apart = 0.0
    for p in model.parameters():
        if p.placements[0].is_replicate():
            first = p.grad.to_local().clone()
            dist.broadcast(first, 0)
            apart = max(apart, float((first - p.grad.to_local()).abs().max()))
    worst: list[float] = [0.0, 0.0]
    dist.all_gather_object(worst, apart)
    return max(worst)


def mutants() -> dict[str, Any]:
    """One mistake each, and what then differs."""
    right = {"copy_to": tensor_local.copy_to, "_local": tensor_local._local, "sum_from": tensor_local.sum_from}
    wrong: dict[str, tuple[str, Callable[..., Any], Case]] = {
        "inputs are not copied": ("copy_to", lambda x, group: x, CASES["experts"]),
        "a bias counts on both ranks": (
            "_local",
            lambda p, serves, group, rank: right["_local"](p, "share" if serves == "once" else serves, group, rank),
            CASES["biases on a sum"],
        ),
        "gradients of shares are not summed": (
            "_local",
            lambda p, serves, group, rank: p.to_local(),
            CASES["norms of heads, MLPs computed again"],
        ),
        "shares are averaged": (
            "sum_from",
            lambda x, group: right["sum_from"](x, group) / 2,
            CASES["packed gate and up"],
        ),
    }
    found = {}
    for name, (function, mutant, case) in wrong.items():
        with mock.patch.object(tensor_local, function, mutant):
            found[name] = sorted(check(case, steps=1)["far"])
    return found


def wrong_plans() -> dict[str, list[str]]:
    """Plans that are mistaken are found by the sum of the parts: nothing is cut, and it is said."""
    found = {}
    swapped = {"q_proj": "rowwise", "o_proj": "colwise"}
    packed = {"up_proj": "packed_colwise", "gate_proj": "packed_colwise"}
    for name, changed in (("roles", swapped), ("packing", packed)):
        right = tensor_units._planned

        def planned(base: Any, changed: dict[str, str] = changed, right: Any = right) -> Any:
            return {path: {**s, **{k: v for k, v in changed.items() if k in s}} for path, s in right(base).items()}

        with ExitStack() as stack:
            for function, value in (
                ("_planned", planned),
                ("_derived", lambda b: {}),
                ("_formed", lambda b, provable: {}),
            ):
                stack.enter_context(mock.patch.object(tensor_units, function, value))
            model = tiny()
            units, _ = tensor_units.units_of(model, 2)
            reasons = tensor_proof.disprove(model, units, 2)
        found[name] = sorted(reasons)
    return found


def main(folder: Path) -> None:
    """Run every check."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {name: check(case) for name, case in CASES.items()}
    done = {
        "cases": found,
        "kept": whole_is_kept(),
        "images": images(),
        "seeds": seeds(),
        "mutants": mutants(),
        "plans": wrong_plans(),
    }
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(done))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
