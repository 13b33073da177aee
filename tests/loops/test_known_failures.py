"""The loss: failures that other fused losses are known for. Each is first shown not to be ours, then to be real.

What was reported where is in known.py, together with the failures that a CPU cannot show.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import automodel_accel as accel
from automodel_accel.callback import AccelCallback
from automodel_accel.kernels.linear_cross_entropy import chunks, linear_cross_entropy
from tests.budgets.loss_memory import Peak
from tests.loops import rivals, runs
from tests.loops.runs import Feature
from tests.swap.compare import Step, applied, assert_close, assert_equal, gradients, step
from tests.swap.test_heads import BEFORE, HEAD, pair
from tests.tiny import VOCABULARY, batch, tiny

UNEVEN = (batch(), batch(rows=3, tokens=9, ignored=2), batch(rows=1, tokens=20, ignored=19))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["torch", "triton"])


def untied() -> Any:
    """A tiny llama whose head is a weight of its own."""
    return tiny(tie_word_embeddings=False)


def labels_of(inputs: dict[str, torch.Tensor]) -> int:
    """How many tokens count."""
    return int((inputs["labels"][:, 1:] != -100).sum())


def doubled(loss: torch.Tensor, leaf: torch.Tensor) -> list[torch.Tensor]:
    """The gradient of twice the loss, by two backward passes through one graph."""
    found = []
    for _ in range(2):
        leaf.grad = None
        (2 * loss).backward(retain_graph=True)
        assert leaf.grad is not None
        found.append(leaf.grad.clone())
    return found


@BEFORE
def test_lora_on_the_head_is_not_ignored(before: bool) -> None:
    """huggingface/trl#4612, #5977, #6159, #6277: losses that read `lm_head.weight` train as if there were no adapter."""
    ours, vanilla = pair(before, **HEAD)
    expected = step(vanilla, **batch())
    assert_close(step(ours, **batch()), expected)
    assert accel.report(ours).counts.fused["loss"] == 1
    rivals.liger_head(vanilla.get_base_model())
    theirs = step(vanilla, **batch())
    assert (theirs.loss - expected.loss).abs() > 1e-3
    assert {
        name for name in expected.gradients if "lm_head" in name
    } == expected.gradients.keys() - theirs.gradients.keys()


def test_head_only_training_has_a_gradient() -> None:
    """linkedin/Liger-Kernel, ops/fused_linear_cross_entropy.py: with a frozen body, the head's gradient is None."""
    vanilla = untied().requires_grad_(False)
    vanilla.lm_head.requires_grad_(True)
    expected = step(vanilla, **batch())
    assert expected.gradients.keys() == {"lm_head.weight"}
    ours = applied(vanilla)
    assert_close(step(ours, **batch()), expected)
    assert accel.report(ours).counts.fused["loss"] == 1
    assert step(rivals.liger_head(vanilla), **batch()).gradients == {}


def test_second_backward_with_retain_graph() -> None:
    """linkedin/Liger-Kernel: gradients kept since the forward are scaled in place, once more at each backward."""
    model = untied()
    ours = applied(model)
    expected = doubled(model(**batch()).loss, model.lm_head.weight)
    for got in doubled(ours(**batch()).loss, ours.lm_head.weight):
        torch.testing.assert_close(got, expected[0], rtol=1e-5, atol=1e-6)
    rivals.liger_head(model)
    theirs = doubled(model(**batch()).loss, model.lm_head.weight)
    torch.testing.assert_close(theirs[1], 2 * theirs[0])


def test_a_loss_that_is_not_reduced_has_the_right_gradient() -> None:
    """linkedin/Liger-Kernel#968: weights on single tokens' losses did not reach the gradient."""
    steps = []
    model = untied()
    for m in (applied(model), model):
        outputs = m(**batch())
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten()
        weights = torch.linspace(0, 2, labels.numel())
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
        loss.backward()
        steps.append(Step(loss.detach(), gradients(m)))
    assert_close(*steps)
    model.zero_grad()
    unweighted = step(model, **batch(), num_items_in_batch=1).gradients["lm_head.weight"]
    assert torch.cosine_similarity(unweighted.flatten(), steps[1].gradients["lm_head.weight"].flatten(), 0) < 0.99


@pytest.mark.parametrize("kind", [int, torch.tensor], ids=["int", "tensor"])
def test_gradient_accumulation_is_normalised_by_label_tokens(kind: Any) -> None:
    """linkedin/Liger-Kernel#802, #322, #767, huggingface/transformers#35438, unslothai/unsloth#1134, #3482, #3527, #4616.

    The loss was multiplied by the number of micro-batches, or each was given the same weight whatever its labels.
    """
    items = sum(labels_of(inputs) for inputs in UNEVEN)
    model, found = untied(), []
    for m in (applied(model), model):
        losses = [m(**inputs, num_items_in_batch=kind(items)).loss for inputs in UNEVEN]
        sum(losses).backward()
        found.append(Step(torch.stack(losses).detach(), gradients(m)))
    assert_close(*found)
    # what it has to be: the mean over all tokens that count; and what it became
    with torch.no_grad():
        means = torch.stack([model(**inputs).loss for inputs in UNEVEN])
    counts = torch.tensor([labels_of(inputs) for inputs in UNEVEN])
    torch.testing.assert_close(found[0].loss.sum(), (means * counts).sum() / items)
    assert (found[0].loss.sum() - means.sum()).abs() > 1, "multiplied by the number of micro-batches"
    assert (found[0].loss.sum() - means.mean()).abs() > 1e-3, "a mean of means"


def test_num_items_in_batch_is_accepted(tmp_path: Any) -> None:
    """unslothai/unsloth#1953, #3253: "does not accept num_items_in_batch", after a forward was replaced."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert Trainer(applied(untied()), arguments).model_accepts_loss_kwargs
    without = untied()
    original = without.forward
    without.forward = lambda input_ids=None, labels=None: original(input_ids=input_ids, labels=labels)
    assert not Trainer(without, arguments).model_accepts_loss_kwargs


def test_training_from_scratch_does_not_diverge() -> None:
    """linkedin/Liger-Kernel#512, #827: the same loss at first, another one after many steps."""
    model, curves = untied(), []
    for m in (applied(model), copy.deepcopy(model)):
        optimizer, curve = torch.optim.AdamW(m.parameters(), lr=3e-3, eps=1e-5), []
        for _ in range(40):
            loss = m(**batch()).loss
            curve.append(loss.detach())
            loss.backward()
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        curves.append(torch.stack(curve))
    assert curves[1][-1] < 0.5 * curves[1][0]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)


@IMPLEMENTATIONS
def test_small_gradients_are_not_dropped(implementation: str) -> None:
    """apple/ml-cross-entropy#14, #18: gradients of improbable words are skipped, which pre-training feels."""
    vocab = 256
    hidden = torch.linspace(-16, 0, vocab).repeat(3, 1).requires_grad_()
    weight, target = torch.eye(vocab), torch.tensor([0, 7, 255])  # the gradient of `hidden` is that of the logits
    linear_cross_entropy(hidden, weight, target, reduction="sum", implementation=implementation).backward()
    probabilities = hidden.detach().softmax(-1)
    small = (probabilities < rivals.FILTERED_BELOW) & (F.one_hot(target, vocab) == 0)
    assert small.sum() > vocab
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[small], probabilities[small], rtol=1e-4, atol=0)
    assert (rivals.filtered(probabilities)[small] == 0).all()


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_labels_out_of_range(bad: int) -> None:
    """A label that is no word is an error in plain words, as in torch, not a read beyond the logits."""
    inputs = batch()
    inputs["labels"][0, -1] = bad
    with pytest.raises(IndexError):
        untied()(**inputs)
    with pytest.raises(ValueError, match=f"target {bad} is no class; expected 0 to {VOCABULARY - 1}"):
        applied(untied())(**inputs)


def problem(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head's weight and targets whose vocabulary is 32 times the width, as Llama 3's."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (tokens, 512))
    return hidden, weight, torch.randint(512, (tokens,), generator=generator)


def test_chunks_are_not_tiny() -> None:
    """linkedin/Liger-Kernel#227, #509, #1190, #1323, #1356, #1371, #1414, #1472: as many chunks as V/H, whatever their length.

    Each chunk reads and writes the whole gradient of the weight.
    """
    on_gpu = torch.empty(0, dtype=torch.bfloat16, device="meta")
    for tokens in (4096, 8192, 16384):  # Llama 3: V = 128256, H = 4096
        assert chunks.chunk_rows(tokens, 128256, on_gpu, None) >= 1024
    products = []
    for loss in (linear_cross_entropy, rivals.liger_loss):
        with rivals.Gemms() as gemms:
            loss(*problem(256)).backward()
        products.append(gemms.count)
    assert products[0] == 3, "logits, and the two gradients"
    assert products[1] == 3 * 32


def test_memory_of_the_loss_does_not_grow_with_the_tokens() -> None:
    """linkedin/Liger-Kernel#1439: a chunk that is a share of the batch grew with it, and ran out of memory."""
    found = []
    for tokens in (512, 1024):
        tensors = problem(tokens)
        with Peak(*tensors) as peak:
            loss = linear_cross_entropy(*tensors, workspace_bytes=64 * 512 * 4, implementation="torch")
            torch.autograd.grad(loss, tensors[:2])
        found.append(peak.bytes)
    with Peak(*tensors) as vanilla:
        torch.autograd.grad(F.cross_entropy(tensors[0] @ tensors[1].T, tensors[2]), tensors[:2])
    logits = 1024 * 512 * 4
    assert found[1] - found[0] <= 512 * (16 + 8) * 4, "the gradient of `hidden`, and a few numbers a token"
    assert vanilla.bytes >= 2 * logits > 4 * found[1]


def test_evaluation_has_logits() -> None:
    """linkedin/Liger-Kernel#328, huggingface/trl#4730: `logits` was None, and what computes metrics of them broke."""
    model = untied()
    ours = applied(model)
    for mode in (True, False):
        ours.train(mode), model.train(mode)
        outputs, expected = ours(**batch()), model(**batch())
        assert outputs.logits is not None
        accuracy = [(o.logits.argmax(-1) == batch()["labels"]).float().mean() for o in (outputs, expected)]
        assert torch.equal(*accuracy)
        torch.testing.assert_close(outputs.logits.detach(), expected.logits.detach())
    assert type(outputs.logits) is torch.Tensor
    assert rivals.liger_head(model.train())(**batch()).logits is None


def test_evaluation_needs_no_logits_when_only_the_loss_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface/trl#5069, huggingface/transformers#43039, #44981: the logits of an evaluation that drops them ran out of memory."""
    vocab, data = 2048, runs.rows(16)
    monkeypatch.setattr(chunks, "CPU_WORKSPACE_BYTES", 16 * vocab * 4)
    peaks, losses = [], []
    for callbacks in ([AccelCallback()], []):
        model = tiny(tie_word_embeddings=False, vocab_size=vocab)
        feature = Feature(
            collate=runs.of_one_shape,
            arguments={"per_device_eval_batch_size": 16},
            trainer={"callbacks": callbacks},
        )
        trainer = runs.make_trainer(model, feature, tmp_path)
        with Peak(*model.parameters()) as peak:
            losses.append(trainer.evaluate(data)["eval_loss"])
        peaks.append(peak.bytes)
        if callbacks:
            assert accel.report(model).counts.fused["loss"] == 1
        # whoever wants logits gets tensors
        trainer.compute_metrics = lambda prediction: {"rows": len(prediction.predictions)}
        assert trainer.evaluate(data)["eval_rows"] == trainer.predict(data).predictions.shape[0] == 16
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    logits = 16 * runs.LONGEST * vocab * 4
    assert 4 * peaks[0] < logits < peaks[1]


def test_shift_labels_have_a_loss_in_evaluation() -> None:
    """linkedin/Liger-Kernel#888: labels that are shifted already gave no loss outside of training."""
    shifted = F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    model = untied()
    for mode in (True, False):
        ours, vanilla = applied(model).train(mode), model.train(mode)
        # `labels` only says that a loss is wanted
        inputs = {"input_ids": batch()["input_ids"], "labels": torch.zeros_like(shifted), "shift_labels": shifted}
        torch.testing.assert_close(ours(**inputs).loss, vanilla(**inputs).loss)
        torch.testing.assert_close(ours(**inputs).loss, vanilla(**batch()).loss)


def test_return_dict_false() -> None:
    """linkedin/Liger-Kernel#925: a copy of a forward did not know `return_dict`."""
    model = untied()
    ours = applied(model)
    mine, theirs = (m(**batch(), return_dict=False, use_cache=False) for m in (ours, model))
    assert type(mine) is tuple
    assert len(mine) == len(theirs)
    torch.testing.assert_close(mine[0], theirs[0])
    assert accel.report(ours).counts.fused["loss"] == 1


def test_torch_compile_with_ignored_labels() -> None:
    """linkedin/Liger-Kernel#174, #1327, #1338: an exception, or another loss where labels are ignored."""
    torch._dynamo.reset()
    model = untied()
    ours = torch.compile(applied(model), backend="eager", fullgraph=True)
    for ignored in (9, 24):  # the second leaves no label at all
        inputs = {**batch(ignored=ignored), "num_items_in_batch": 7}
        expected = step(model, **inputs)
        ours.zero_grad()
        loss = ours(**inputs).loss
        loss.backward()
        got = {name.removeprefix("_orig_mod."): g for name, g in gradients(ours).items()}
        assert_close(Step(loss.detach(), got), expected)


def test_equal_bits_of_equal_steps() -> None:
    """apple/ml-cross-entropy#14: sums in the order of chance. Ours are the same each time."""
    model = applied(untied())
    assert_equal(step(model, **batch()), step(model, **batch()))
