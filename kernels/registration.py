"""Make an operation differentiable, eagerly and under torch.compile, from one set of plain functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import library


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """The host code of an operation, as plain functions.

    Attributes:
        forward: (*inputs) -> tensors; the leading ones are differentiable, the others are kept for backward. Its
            annotations are the schema of the registered operation.
        backward: (...) -> one tensor per gradient, empty where a gradient is not needed. Annotated likewise.
        fake_forward: Shapes and dtypes of `forward`'s outputs.
        fake_backward: Shapes and dtypes of `backward`'s outputs.
        setup_context: (ctx, inputs, output): saves what the gradients need.
        gradients: (ctx, grad_output, backward) -> one gradient or None per input; calls the `backward` it is given. With several
            differentiable outputs, `grad_output` is a tuple of as many gradients, each a tensor or None.
        differentiable: How many leading outputs of `forward` are differentiable.
        setup_context_eager, gradients_eager: The same two for the eager path, where they differ. There the other outputs of
            `forward` are this one call's own: they may be kept on ctx, overwritten and handed out as gradients.
    """

    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., tuple[torch.Tensor, ...]]
    fake_forward: Callable[..., tuple[torch.Tensor, ...]]
    fake_backward: Callable[..., tuple[torch.Tensor, ...]]
    setup_context: Callable[[Any, tuple[Any, ...], tuple[torch.Tensor, ...]], None]
    gradients: Callable[[Any, Any, Callable[..., tuple[torch.Tensor, ...]]], tuple[Any, ...]]
    differentiable: int = 1
    setup_context_eager: Callable[[Any, tuple[Any, ...], tuple[torch.Tensor, ...]], None] | None = None
    gradients_eager: Callable[[Any, Any, Callable[..., tuple[torch.Tensor, ...]]], tuple[Any, ...]] | None = None

    def incoming(self, grad_outputs: tuple[torch.Tensor | None, ...]) -> Any:
        """What `gradients` takes as its `grad_output`."""
        return grad_outputs[0] if self.differentiable == 1 else grad_outputs[: self.differentiable]


def register(name: str, definition: Definition) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Register `automodel_accel::<name>` and `<name>_backward` with torch, and return the function that calls them.

    The returned function takes `forward`'s inputs by position. Eagerly it runs a `torch.autograd.Function`, which spares the
    host time of the dispatcher; under torch.compile it is the registered operation, which the graph holds as one node.
    A second differentiation raises in both, and so do the transforms of torch.func.
    """
    op = library.custom_op(f"automodel_accel::{name}", definition.forward, mutates_args=())
    op.register_fake(definition.fake_forward)
    backward_op = library.custom_op(f"automodel_accel::{name}_backward", definition.backward, mutates_args=())
    backward_op.register_fake(definition.fake_backward)

    def op_gradients(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        return definition.gradients(ctx, definition.incoming(grad_outputs), backward_op)

    op.register_autograd(op_gradients, setup_context=definition.setup_context)
    eager = _autograd_function(name, definition)

    def call(*inputs: Any) -> tuple[torch.Tensor, ...]:
        if torch.compiler.is_compiling():
            return op(*inputs)  # type: ignore[no-any-return]
        return eager.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]

    return call


def _autograd_function(name: str, definition: Definition) -> type[torch.autograd.Function]:
    save = definition.setup_context_eager or definition.setup_context
    gradients = definition.gradients_eager or definition.gradients

    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:  # a setup_context apart would cost 20 us a call
        output = definition.forward(*inputs)
        save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[definition.differentiable :])
        ctx.set_materialize_grads(False)
        ctx.inputs = len(inputs)
        return output

    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        if all(grad_output is None for grad_output in grad_outputs[: definition.differentiable]):
            return tuple([None] * ctx.inputs)
        if torch.is_grad_enabled():  # once_differentiable would cut the graph here, and autograd.grad never notices
            raise RuntimeError(
                f"{name} cannot be differentiated twice: its gradient was asked for with create_graph=True."
            )
        return gradients(ctx, definition.incoming(grad_outputs), definition.backward)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)
