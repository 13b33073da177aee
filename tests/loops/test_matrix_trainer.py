"""What only transformers' Trainer has: evaluation and prediction with metrics, checkpoints to resume from, folders to publish."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

import automodel_accel as accel
from tests.loops import runs
from tests.loops.runs import MICRO_BATCHES, STEPS, Feature, Run, Watched
from tests.swap.test_heads import HEAD, adapted
from tests.tiny import tiny

STOP = 4


def untied() -> Any:
    """A tiny llama."""
    return tiny(tie_word_embeddings=False)


def mean_of_logits(prediction: Any, compute_result: bool = True) -> dict[str, float]:
    """A metric that every logit goes into."""
    logits = torch.as_tensor(prediction.predictions).float()
    return {"metric": float(logits.square().mean()), "rows": float(len(logits))}


def chosen(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The tokens of highest probability: what spares memory in evaluation."""
    return logits.argmax(-1)


EVERY_THREE = {"eval_strategy": "steps", "eval_steps": 3}
EVALUATIONS: dict[str, Feature] = {
    "metrics": Feature(
        arguments={**EVERY_THREE, "include_for_metrics": ["loss", "inputs"]},
        trainer={"compute_metrics": mean_of_logits},
    ),
    "metrics of chosen tokens": Feature(
        arguments={**EVERY_THREE, "eval_accumulation_steps": 1},
        trainer={"compute_metrics": mean_of_logits, "preprocess_logits_for_metrics": chosen},
    ),
    "metrics batch by batch": Feature(
        arguments={**EVERY_THREE, "batch_eval_metrics": True}, trainer={"compute_metrics": mean_of_logits}
    ),
    "losses alone": Feature(arguments={**EVERY_THREE, "prediction_loss_only": True, "eval_on_start": True}),
    "the best one loaded at the end": Feature(
        arguments={**EVERY_THREE, "save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True}
    ),
    "label smoothing": Feature(arguments=EVERY_THREE, smoothing=0.1, trainer={"compute_metrics": mean_of_logits}),
}


@pytest.mark.parametrize("feature", EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluate_and_predict(feature: Feature, tmp_path: Path) -> None:
    done: list[Run] = []
    for model in (accel.apply(untied()), untied()):
        keep: list[Watched] = []

        def loop(model: Any, feature: Feature, folder: Path, keep: list[Watched] = keep) -> Run:
            keep.append(runs.make_trainer(model, feature, folder))
            keep[0].train()
            return keep[0].done

        found = runs.run(loop, model, feature, tmp_path)
        trainer = keep[0]
        logged = ("eval_loss", "eval_metric", "eval_rows")
        found.seen += [{key: row[key] for key in logged if key in row} for row in trainer.state.log_history]
        predicted = trainer.predict(runs.rows(5, seed=2))
        found.seen += [] if predicted.predictions is None else [predicted.predictions, predicted.label_ids]
        found.seen += [predicted.metrics["test_loss"], trainer.evaluate()["eval_loss"]]
        done.append(found)
    runs.assert_same(*done)
    assert sum("eval_loss" in entry for entry in done[0].seen if isinstance(entry, dict)) >= 2
    runs.assert_fused(done[0], losses=0 if feature.smoothing else MICRO_BATCHES)


class Stop(transformers.TrainerCallback):
    """Ends the training early."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == STOP


SAVING = Feature(arguments={"save_strategy": "steps", "save_steps": STOP})


def first_half(model: Any, feature: Feature, folder: Path) -> Run:
    """The Trainer, stopped after a checkpoint."""
    trainer = runs.make_trainer(model, feature, folder)
    trainer.add_callback(Stop())
    trainer.train()
    return trainer.done


def second_half(model: Any, feature: Feature, folder: Path) -> Run:
    """The Trainer from that checkpoint on."""
    trainer = runs.make_trainer(model, feature, folder)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}"))
    return trainer.done


def accelerate_from(model: Any, folder: Path, at: int, until: int) -> Run:
    """A loop of accelerate from one optimizer step to another, with its state in the folder between the two."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=runs.ACCUMULATION)
    done = Run(model)
    loader: Any = DataLoader(runs.rows(), batch_size=runs.ROWS_A_BATCH, collate_fn=runs.padded)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, runs.adamw(model), loader)
    if at:
        accelerator.load_state(str(folder))
        loader = accelerate.skip_first_batches(loader, at * runs.ACCUMULATION)
    for number, inputs in enumerate(loader, at * runs.ACCUMULATION):
        with accelerator.accumulate(model):
            loss = model(**inputs).loss
            done.saw(loss)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if number + 1 == until * runs.ACCUMULATION:
            accelerator.save_state(str(folder))
            break
    return done


def first_half_by_accelerate(model: Any, feature: Feature, folder: Path) -> Run:
    """accelerate's loop, stopped after its state was saved."""
    return accelerate_from(model, folder, 0, STOP)


def second_half_by_accelerate(model: Any, feature: Feature, folder: Path) -> Run:
    """accelerate's loop from that state on."""
    return accelerate_from(model, folder, STOP, STEPS)


HALVES: dict[str, tuple[runs.Loop, runs.Loop, runs.Loop]] = {
    "trainer": (first_half, second_half, runs.hf_trainer),
    "accelerate": (first_half_by_accelerate, second_half_by_accelerate, runs.accelerate_loop),
}


@cache
def in_one_go(loop: runs.Loop) -> Run:
    """Vanilla's eight steps."""
    with tempfile.TemporaryDirectory() as folder:
        return runs.run(loop, untied(), Feature(items=None), Path(folder))


WHO = [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize("who", WHO, ids=["ours by ours", "ours by vanilla", "vanilla's by ours"])
@pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES)
def test_resumed(halves: tuple[runs.Loop, runs.Loop, runs.Loop], who: tuple[bool, bool], tmp_path: Path) -> None:
    """Four steps, a checkpoint, a new process's model, four more: as eight at once, and the files are anybody's."""
    straight = in_one_go(halves[2])
    folder = tmp_path / "checkpoints"
    for applied, loop, losses in zip(who, halves[:2], (straight.losses[:8], straight.losses[8:]), strict=True):
        model = accel.apply(untied()) if applied else untied()
        done = runs.run(loop, model, SAVING, folder)
        torch.testing.assert_close(torch.stack(done.losses), torch.stack(losses), rtol=1e-5, atol=1e-6)
        if applied:
            runs.assert_fused(done, len(losses))
    runs.assert_moved_alike(done, straight)


def with_adapters() -> Any:
    """A LoRA'd one, on the head too."""
    return adapted(untied(), **HEAD)


def apply_first() -> Any:
    """The same, applied before the adapters came."""
    return adapted(accel.apply(untied()), **HEAD)


FOLDERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "model": (lambda: accel.apply(untied()), untied),
    "tied": (
        lambda: accel.apply(tiny("gemma2", tie_word_embeddings=True)),
        lambda: tiny("gemma2", tie_word_embeddings=True),
    ),
    "peft, then apply": (lambda: accel.apply(with_adapters()), with_adapters),
    "apply, then peft": (apply_first, with_adapters),
}


@pytest.mark.parametrize("builds", FOLDERS.values(), ids=FOLDERS)
def test_published_folders_are_the_same_files(builds: tuple[Callable[[], Any], ...], tmp_path: Path) -> None:
    """What the Trainer would push after a training: weights, configurations and the model card, byte by byte."""
    folder = tmp_path / "published"
    files: list[dict[str, bytes]] = []
    trained: dict[str, torch.Tensor] = {}
    for build in reversed(builds):
        model = build()

        def loop(model: Any, feature: Feature, folder: Path) -> Run:
            trainer = runs.make_trainer(model, feature, folder)
            trainer.train()
            with torch.no_grad():  # vanilla's bits, from which ours differ in the last
                for name, parameter in model.named_parameters():
                    parameter.copy_(trained.setdefault(name, parameter.detach().clone()))
            trainer.state.log_history = []
            trainer.save_model()
            trainer.create_model_card(model_name="tiny", tags=["a tag"])
            return trainer.done

        runs.run(loop, model, Feature(), folder)
        files.append({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
        for name in files[-1]:
            (folder / name).unlink()
    assert files[0].keys() == files[1].keys()
    assert {"README.md", "training_args.bin"} < files[0].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []
