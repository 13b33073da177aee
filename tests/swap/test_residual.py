"""Residual sum and norm in one kernel: the layer computes what it did, whatever it does with its sums."""

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import automodel_accel as accel
from automodel_accel.kernels.numerics import judge
from automodel_accel.patches.lazy_sum import LazySum
from automodel_accel.patches.residual import ResidualPatch
from tests.swap.compare import Step, assert_close, gradients, step
from tests.swap.layers import FUSED, WIDTH, Branch, Layer
from tests.tiny import batch, tiny

api: Any = importlib.import_module("automodel_accel.api")


@pytest.fixture(autouse=True)
def nothing_but_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model below is changed by this patch alone."""
    monkeypatch.setattr(api, "all_patches", lambda: (ResidualPatch(),))


class Stack(nn.Module):
    """Two layers; a layer is never the whole model."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = layer(), layer()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return flat(self.second(leading(self.first(x))))


def leading(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def flat(output: Any) -> torch.Tensor:
    """All that a layer returned, as one tensor; none of it may be lazy."""
    parts: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        assert not isinstance(value, LazySum)
        if isinstance(value, torch.Tensor):
            parts.append(value.reshape(-1))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ():
            collect(item)

    collect(output)
    return torch.cat(parts)


def pair(layer: type[nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    model = Stack(layer).to(dtype).train()
    return accel.apply(copy.deepcopy(model)), model


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)


def run(model: Any, x: torch.Tensor, parameters_of: nn.Module | None = None) -> Step:
    """Output and every gradient, the input's too."""
    inner = parameters_of or model
    inner.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).to(y.dtype)).sum().backward()
    assert x.grad is not None
    return Step(y.detach(), {"x": x.grad, **gradients(inner)})


def fused(model: nn.Module) -> int:
    return int(accel.report(model).counts.fused["residual"])


@pytest.mark.parametrize("layer", FUSED, ids=lambda layer: layer.__name__)
def test_every_wiring(layer: type[Layer]) -> None:
    ours, theirs = pair(layer)
    assert_close(run(ours, rows()), run(theirs, rows()))
    assert accel.report(ours).places("residual") == 2
    assert fused(ours) == 2 * FUSED[layer]


@pytest.mark.parametrize("layer", FUSED, ids=lambda layer: layer.__name__)
def test_every_wiring_compiled(layer: type[Layer]) -> None:
    ours, theirs = pair(layer)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    assert_close(run(compiled, rows(), ours), run(theirs, rows()))


def test_compiled_without_a_graph_break_and_with_the_kernel_in_the_graph() -> None:
    ours, theirs = pair(Layer)
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    assert_close(run(torch.compile(ours, backend=keep, fullgraph=True), rows(), ours), run(theirs, rows()))
    (graph,) = graphs
    assert sum("add_rms_norm" in str(node.target) for node in graph.graph.nodes) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", FUSED, ids=lambda layer: layer.__name__)
def test_low_precision(layer: type[Layer], dtype: torch.dtype) -> None:
    ours, theirs = pair(layer, dtype)
    truth = copy.deepcopy(theirs).double()
    mine, vanilla, true = run(ours, rows(dtype)), run(theirs, rows(dtype)), run(truth, rows(dtype).double())
    assert mine.loss.dtype == vanilla.loss.dtype
    if layer.__name__ != "ActiveDropout":  # other random numbers in float64
        verdict = judge(mine.loss, vanilla.loss, true.loss)
        assert verdict.passed, verdict
        vectors = [torch.cat([g.flatten().to(dtype) for g in s.gradients.values()]) for s in (mine, vanilla)]
        verdict = judge(*vectors, torch.cat([g.flatten() for g in true.gradients.values()]))
        assert verdict.passed, verdict
    if layer.__name__ != "LearnedScale":
        assert fused(ours) == 2 * FUSED[layer]


@pytest.mark.parametrize("layer", FUSED, ids=lambda layer: layer.__name__)
def test_autocast(layer: type[Layer]) -> None:
    ours, theirs = pair(layer)
    with torch.autocast("cpu", torch.bfloat16):
        mine, vanilla = run(ours, rows()), run(theirs, rows())
    assert mine.loss.dtype == vanilla.loss.dtype
    scale = vanilla.loss.abs().max().item()
    if layer.__name__ != "ActiveDropout":
        true = run(copy.deepcopy(theirs).double(), rows().double())
        # in the precision that autocast computes in, which the linears' errors are of
        verdict = judge(mine.loss.bfloat16(), vanilla.loss.bfloat16(), true.loss)
        assert verdict.passed, (verdict, scale)
    assert fused(ours) == 2 * FUSED[layer]


@pytest.mark.parametrize("layer", FUSED, ids=lambda layer: layer.__name__)
def test_evaluation_and_no_grad_are_bit_equal(layer: type[Layer]) -> None:
    ours, theirs = pair(layer)
    with torch.no_grad():
        torch.manual_seed(0)
        mine = ours(rows())
        torch.manual_seed(0)
        assert torch.equal(mine, theirs(rows()))
    ours.eval(), theirs.eval()
    assert torch.equal(run(ours, rows()).loss, run(theirs, rows()).loss)
    with torch.inference_mode():
        assert torch.equal(ours(rows()), theirs(rows()))
    assert fused(ours) == 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layer", FUSED, ids=lambda layer: layer.__name__)
def test_checkpointing_around_the_layer(layer: type[Layer], reentrant: bool) -> None:
    ours, theirs = pair(layer)

    def checkpointed(model: Any) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            h = checkpoint(lambda x: leading(model.first(x)), x, use_reentrant=reentrant)
            return flat(model.second(h))

        return forward

    if layer.__name__ == "Checkpointed" and reentrant:
        pytest.skip("torch cannot nest a checkpoint in a reentrant one")
    assert_close(run(checkpointed(ours), rows(), ours), run(checkpointed(theirs), rows(), theirs))


@pytest.mark.parametrize("names", [("attention", "mlp", "norm2"), ("dropout",)], ids=str)
@pytest.mark.parametrize("layer", FUSED, ids=lambda layer: layer.__name__)
def test_hooks_see_tensors_and_what_they_return_counts(layer: type[Layer], names: tuple[str, ...]) -> None:
    seen: list[list[Any]] = [[], []]
    steps = []
    for model, mine in zip(pair(layer), seen, strict=True):
        for name in names:
            part = getattr(model.first, name)
            part.register_forward_pre_hook(lambda module, inputs, mine=mine: mine.append(inputs[0].detach().clone()))
            part.register_forward_hook(
                lambda module, inputs, output, mine=mine: mine.append(type(inputs[0])) or scaled(output)
            )
        model.first.register_forward_hook(lambda module, inputs, output, mine=mine: mine.append(flat(output).detach()))
        steps.append(run(model, rows()))
    assert_close(*steps)
    assert len(seen[0]) == len(seen[1]) > 0
    for mine, vanilla in zip(*seen, strict=True):
        if isinstance(vanilla, torch.Tensor):
            assert type(mine) is torch.Tensor
            torch.testing.assert_close(mine, vanilla)
        else:
            assert mine is vanilla


def scaled(output: Any) -> Any:
    return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


def test_full_backward_hooks_on_a_branch_and_a_norm() -> None:
    seen: list[list[torch.Tensor]] = [[], []]
    for model, mine in zip(pair(Layer), seen, strict=True):
        for part in (model.first.mlp, model.second.norm2, model.first):
            part.register_full_backward_hook(lambda module, inputs, outputs, mine=mine: mine.append(outputs[0]))
        run(model, rows())
    assert len(seen[0]) == len(seen[1]) == 3
    for mine, vanilla in zip(*seen, strict=True):
        torch.testing.assert_close(mine, vanilla)


def test_a_hook_on_a_norm_is_said_in_the_report() -> None:
    ours, _ = pair(Layer)
    ours.first.norm2.register_forward_hook(lambda *ignored: None)
    run(ours, rows())
    assert accel.report(ours).counts.passed_on == {"residual: the norm has hooks, or a forward of its own": 1}
    assert fused(ours) == 1


def test_a_forward_set_on_the_norm_after_apply_runs() -> None:
    """As accelerate does it to bring weights to the device first."""
    ours, theirs = pair(Layer)
    for model in (ours, theirs):
        original = model.first.norm2.forward
        model.first.norm2.forward = lambda x, original=original: original(x) * 3
    assert_close(run(ours, rows()), run(theirs, rows()))
    assert fused(ours) == 1


class Cached(Layer):
    """Keeps what it saw on itself and on its branch."""

    def forward(self, x: torch.Tensor) -> Any:
        branch = self.attention(self.norm1(x))[0]
        self.mlp.last = branch
        h = x + branch
        self.seen = h
        return h + self.mlp(self.norm2(h))


def test_what_is_kept_elsewhere_has_the_value_and_the_graph() -> None:
    ours, theirs = pair(Cached)
    steps = []
    for model in (ours, theirs):
        run(model, rows())
        model.zero_grad()
        kept = model.first.seen * 2 + model.first.mlp.last
        kept.sum()
        model(rows())
        (model.first.seen.sin() + model.first.mlp.last.cos()).sum().backward()
        steps.append(Step(torch.zeros(()), gradients(model)))
    assert_close(*steps)


class Square(torch.autograd.Function):
    """A function of somebody's own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x * 1)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class OwnFunction(Layer):
    """Hands a branch's output to a custom autograd function, which cannot know what a lazy sum is."""

    def forward(self, x: torch.Tensor) -> Any:
        return x + Square.apply(self.attention(self.norm1(x))[0])


class Stale(Layer):
    """Writes into the residual between the sum and the norm."""

    def forward(self, x: torch.Tensor) -> Any:
        residual = x * 1
        h = residual + self.attention(self.norm1(x))[0]
        residual.mul_(2)
        return self.norm2(h) + residual


@pytest.mark.parametrize(
    ("layer", "said"),
    [(OwnFunction, r"custom autograd function .*residual=False"), (Stale, r"written to in place .*residual=False")],
)
def test_what_cannot_be_right_is_an_error_and_not_a_wrong_gradient(layer: type[Layer], said: str) -> None:
    ours, theirs = pair(layer)
    run(theirs, rows())
    with pytest.raises(RuntimeError, match=said):
        run(ours, rows())


def test_branches_called_outside_of_their_layer_return_tensors() -> None:
    ours, _ = pair(Layer)
    run(ours, rows())
    assert type(ours.first.mlp(rows())) is torch.Tensor
    assert type(ours.first.norm2(rows())) is torch.Tensor


class Failing(Layer):
    """Raises in the middle when told to."""

    fails = False

    def forward(self, x: torch.Tensor) -> Any:
        h = self.attention(self.norm1(x))[0]
        if self.fails:
            raise KeyError("midway")
        return self.norm2(x + h)


def test_an_exception_leaves_nothing_behind() -> None:
    ours, theirs = pair(Failing)
    ours.first.fails = True
    with pytest.raises(KeyError):
        run(ours, rows())
    assert type(ours.first.mlp(rows())) is torch.Tensor
    ours.first.fails = False
    assert_close(run(ours, rows()), run(theirs, rows()))


def test_revert_copy_and_pickle() -> None:
    ours, theirs = pair(Layer)
    expected = run(theirs, rows())
    assert_close(run(copy.deepcopy(ours), rows()), expected)
    loaded = pickle.loads(pickle.dumps(ours))
    assert [type(module) for module in loaded.modules()] == [type(module) for module in theirs.modules()]
    accel.revert(ours)
    again = run(ours, rows())
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert [sorted(vars(module)) for module in ours.modules()] == [sorted(vars(module)) for module in theirs.modules()]
    assert all(torch.equal(again.gradients[name], gradient) for name, gradient in expected.gradients.items())


class NotALayer(nn.Module):
    """A norm and linears, but no branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.q, self.table = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Embedding(3, WIDTH)
        self.inner = nn.ModuleList([Branch()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm1(x + self.q(x) + self.inner[0](x))


def test_a_norm_among_linears_is_no_layer() -> None:
    ours, theirs = pair(NotALayer)
    assert accel.report(ours).places("residual") == 0
    assert_close(run(ours, rows()), run(theirs, rows()))


class Shared(Layer):
    """The same branch and the same norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Branch(more=True)
        self.again, self.norm3 = self.mlp, self.norm2

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.mlp(self.norm1(x))
        return h + self.again(self.norm3(h))


def test_shared_parts() -> None:
    ours, theirs = pair(Shared)
    assert_close(run(ours, rows()), run(theirs, rows()))
    assert fused(ours) == 2
    one = Shared()
    stacks = []
    for layer in (one, copy.deepcopy(one)):
        stack = Stack(Layer)
        stack.first, stack.second = layer, Shared()
        stack.second.load_state_dict(one.state_dict())
        stack.second.mlp = stack.second.again = layer.mlp
        stacks.append(stack.train())
    assert_close(run(accel.apply(stacks[0]), rows()), run(stacks[1], rows()))


def test_a_meta_model_is_served_after_it_is_materialised() -> None:
    with torch.device("meta"):
        model = Stack(Layer)
    accel.apply(model)
    theirs = Stack(Layer).train()
    ours = model.to_empty(device="cpu").train()
    ours.load_state_dict(theirs.state_dict())
    assert_close(run(ours, rows()), run(theirs, rows()))
    assert fused(ours) == 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "qwen3"])
def test_models(name: str) -> None:
    model = tiny(name)
    ours = accel.apply(copy.deepcopy(model))
    assert_close(step(ours, **batch()), step(model, **batch()))
    assert fused(ours) == 2
    for m in (ours, model):
        m.gradient_checkpointing_enable()
    assert_close(step(ours, **batch()), step(model, **batch()))
    with torch.no_grad():
        tokens = batch()["input_ids"]
        generated = [m.eval().generate(tokens, max_new_tokens=4, do_sample=False) for m in (ours, model)]
    assert torch.equal(*generated)


def test_a_llama_layer_saves_no_more_bytes_than_vanilla() -> None:
    model = tiny("llama", torch.bfloat16)
    ours = accel.apply(copy.deepcopy(model))
    saved = []
    for m in (ours, model):
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = m(**batch())
        saved.append(sum(kept.values()))
        del output
    assert saved[0] < saved[1]


@pytest.mark.parametrize(("unit", "served"), [("layer", 2), ("branch", 2), ("norm", 0)])
def test_fully_shard(mesh: Any, unit: str, served: int) -> None:
    ours, theirs = pair(Layer)
    expected = run(theirs, rows())
    for layer in (ours.first, ours.second):
        fully_shard({"layer": layer, "branch": layer.mlp, "norm": layer.norm2}[unit], mesh=mesh)
    fully_shard(ours, mesh=mesh)
    found = run(ours, rows())
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.gradients.items()}
    assert_close(Step(found.loss, whole), expected)
    assert fused(ours) == served
