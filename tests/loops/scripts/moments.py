"""Runs under `python -m automodel_accel.run` and prints, as JSON, when each of many models was applied."""

import atexit
import copy
import gc
import inspect
import json
import logging
import pickle
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import automodel_accel as accel
from automodel_accel import building

SIZES: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
TOKENS = torch.arange(24).reshape(2, 12) + 5
Found = dict[str, Any]
SCENARIOS: list[Callable[[], Found]] = []
LINES: list[str] = []


class Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LINES.append(record.getMessage())


def scenario(function: Callable[[], Found]) -> Callable[[], Found]:
    SCENARIOS.append(function)
    return function


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def applied(model: nn.Module) -> bool:
    try:
        accel.report(model)
    except ValueError:
        return False
    return True


def loss_and_gradient(model: nn.Module) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    parts = [part.grad.flatten() for part in model.parameters() if part.grad is not None]
    return loss.item(), torch.cat(parts)


def same(model: nn.Module, first: tuple[float, torch.Tensor]) -> bool:
    """Whether the first loss and gradient equal those of the model after revert: the vanilla ones."""
    accel.revert(model)
    loss, gradient = loss_and_gradient(model)
    return abs(loss - first[0]) < 1e-5 * abs(loss) and torch.allclose(gradient, first[1], rtol=1e-4, atol=1e-6)


@scenario
def optimizer() -> Found:
    model = llama()
    before = applied(model)
    made = torch.optim.AdamW(model.parameters(), lr=1e-3)  # a generator, which can be read once
    number = sum(len(group["params"]) for group in made.param_groups)
    return {"before": before, "after": applied(model), "all": number == len(list(model.parameters()))}


@scenario
def own_descent() -> Found:
    model = llama()
    before = applied(model)
    first = loss_and_gradient(model)
    done = accel.report(model) if applied(model) else None
    fused = done is not None and done.counts.fused["loss"] == 1 and not done.materialised_logits
    return {"before": before, "after": done is not None, "first_call_fused": fused, "same": same(model, first)}


@scenario
def evaluation() -> Found:
    model = llama().eval()
    with torch.inference_mode():
        model(input_ids=TOKENS)
    return {"after": applied(model)}


@scenario
def late_changes() -> Found:
    """Everything that a script does between building a model and its optimizer."""
    model = llama()
    model.resize_token_embeddings(101)
    model.to(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    before = applied(wrapped)
    torch.optim.AdamW([part for part in wrapped.parameters() if part.requires_grad])
    dtypes = {str(claim.dtype) for claim in accel.report(wrapped).applied}
    return {"before": before, "after": applied(wrapped), "dtypes": sorted(dtypes)}


@scenario
def adapters_without_an_optimizer() -> Found:
    """PEFT calls the forward of the model in it, and not the model: an inner one is called first."""
    wrapped = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = applied(wrapped)
    first = loss_and_gradient(wrapped)
    return {"before": before, "after": applied(wrapped), "same": same(wrapped, first)}


@scenario
def outermost() -> Found:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=3)
    )
    reports = len(LINES)
    torch.optim.SGD(model.model.language_model.parameters(), lr=0.1)
    return {"after": applied(model), "model": accel.report(model).plan.model, "applied": len(LINES) - reports}


@scenario
def copies() -> Found:
    policy = llama()
    reference = copy.deepcopy(policy)
    unpickled = pickle.loads(pickle.dumps(policy))
    torch.optim.AdamW(policy.parameters())
    before = applied(reference)
    with torch.no_grad():
        reference.eval()(input_ids=TOKENS)
        unpickled.eval()(input_ids=TOKENS)
    lines = len(LINES)
    averaged = copy.deepcopy(policy)  # of a model that is applied
    noticing = "__call__" in vars(PreTrainedModel)
    averaged(input_ids=TOKENS)
    found = {"reference_before": before, "reference": applied(reference), "unpickled": applied(unpickled)}
    return {
        **found,
        "policy": applied(policy),
        "noticing": noticing,
        "averaged": applied(averaged),
        "again": len(LINES) - lines,
    }


@scenario
def by_the_script() -> Found:
    model = accel.apply(llama(), norm=False)
    lines = len(LINES)
    torch.optim.AdamW(model.parameters())
    return {"lines": len(LINES) - lines, "norms": accel.report(model).places("norm")}


class Plain(PreTrainedModel):
    """Nothing in it can be swapped."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(3))
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@scenario
def nothing_to_swap() -> Found:
    model, lines = Plain(PreTrainedConfig()), len(LINES)
    torch.optim.AdamW(model.parameters())
    return {"lines": LINES[lines:], "output": model(torch.ones(3)).tolist()}


@scenario
def dropped() -> Found:
    reference = weakref.ref(llama())
    gc.collect()
    noticed = "__call__" in vars(PreTrainedModel)
    other = llama()
    torch.optim.AdamW(other.parameters())
    return {"alive": reference() is not None, "noticed": noticed, "after": "__call__" in vars(PreTrainedModel)}


@scenario
def two_models() -> Found:
    first, second = llama(), llama()
    torch.optim.AdamW([*first.parameters(), *second.lm_head.parameters()])
    return {"first": applied(first), "second": applied(second)}


@scenario
def wrappers() -> Found:
    from accelerate import Accelerator
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    found = {}
    for name, wrap in {
        "ddp": lambda model: DistributedDataParallel(model),
        "ddp_of_peft": lambda model: DistributedDataParallel(get_peft_model(model, LoraConfig())),
        "fsdp1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        "fsdp2_layer": lambda model: fully_shard(model.model.layers[0], mesh=mesh),
        "prepare": lambda model: Accelerator(cpu=True).prepare(model),
        "prepare_model": lambda model: Accelerator(cpu=True).prepare_model(model, evaluation_mode=True),
    }.items():
        model = llama()
        wrap(model)
        found[name] = applied(model)
    torch.distributed.destroy_process_group()
    return found


@scenario
def trainer() -> Found:
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"output_dir": folder, "report_to": "none", "use_cpu": True}
        plain, own, liger = llama(), llama(), llama()
        Trainer(model=plain, args=TrainingArguments(**settings))
        Trainer(own, TrainingArguments(**settings), callbacks=[accel.AccelCallback(norm=False)])
        try:
            Trainer(liger, TrainingArguments(**settings, use_liger_kernel=True))
        except ValueError as error:
            refused = str(error)
    norms = accel.report(own).places("norm")
    return {"plain": applied(plain), "norms_by_callback": norms, "liger": refused, "liger_applied": applied(liger)}


@scenario
def deepspeed() -> Found:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "deepspeed.py").write_text("def initialize(args=None, model=None): return model\n")
        sys.path.append(folder)
        import deepspeed

        model = llama()
        deepspeed.initialize(model=model)
        sys.path.remove(folder)
    return {"after": applied(model)}


@scenario
def signatures() -> Found:
    wrapped = [wrapped_function(point) for point in building.POINTS]
    kept = [inspect.signature(function) == inspect.signature(inspect.unwrap(function)) for function in wrapped]
    classes = [PreTrainedModel, LlamaForCausalLM, Trainer, torch.optim.AdamW]
    pickled = [pickle.loads(pickle.dumps(cls)) is cls for cls in classes]
    constructor = list(inspect.signature(PreTrainedModel).parameters)
    return {"kept": all(kept), "wrapped": len(wrapped), "pickled": all(pickled), "constructor": constructor}


@scenario
def a_step() -> Found:
    """Which functions of the runner are called in a step of training."""
    gc.collect()  # models of other scenarios, which nobody trained
    model = llama()
    made = torch.optim.AdamW(model.parameters())
    loss_and_gradient(model)
    made.step()
    called: list[str] = []

    def record(frame: Any, event: str, argument: object) -> None:
        if event == "call" and Path(frame.f_code.co_filename).name in ("building.py", "run.py"):
            called.append(frame.f_code.co_name)

    sys.setprofile(record)
    try:
        loss_and_gradient(model)
        made.step()
    finally:
        sys.setprofile(None)
    return {"called": called, "noticing": "__call__" in vars(PreTrainedModel)}


@scenario
def an_error_in_forward() -> Found:
    """An index that the embedding does not have: the same error with and without us."""
    model, said = llama(), []
    torch.optim.AdamW(model.parameters())
    for undo in (lambda: None, lambda: accel.revert(model)):
        undo()
        try:
            model(input_ids=TOKENS + 97, labels=TOKENS)
        except IndexError as error:
            said.append(str(error))
    return {"said": said}


def wrapped_function(point: building.Point) -> Any:
    owner: Any = sys.modules[point.module]
    for name in point.name.split("."):
        owner = getattr(owner, name)
    return owner


def print_what_is_left() -> None:
    left = [
        point.name
        for point in building.POINTS
        if point.module in sys.modules and building.__file__ == wrapped_function(point).__code__.co_filename
    ]
    sys.stdout.write(json.dumps({"left": left, "finders": [type(finder).__name__ for finder in sys.meta_path]}))


if __name__ == "__main__":
    logging.getLogger("automodel_accel").addHandler(Lines())
    atexit.register(print_what_is_left)
    sys.stdout.write(json.dumps({function.__name__: function() for function in SCENARIOS}) + "\n")
