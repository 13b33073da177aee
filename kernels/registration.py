"""Make an operation differentiable, eagerly and under torch.compile, from one set of plain functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """The host code of an operation, as plain functions.

    Attributes:
        forward: (*inputs) -> tensors; the first output is the differentiable one, the others are kept for backward. Its
            annotations are the schema of the registered operation.
        backward: (...) -> one tensor per gradient, empty where a gradient is not needed. Annotated likewise.
        fake_forward: Shapes and dtypes of `forward`'s outputs.
        fake_backward: Shapes and dtypes of `backward`'s outputs.
        setup_context: (ctx, inputs, output): saves what the gradients need.
        gradients: (ctx, grad_output, backward) -> one gradient or None per input; calls the `backward` it is given.
        setup_context_eager, gradients_eager: The same two for the eager path, where they differ. There the outputs of `forward`
            but the first are this one call's own: they may be kept on ctx, overwritten and handed out as gradients.
    """

    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., tuple[torch.Tensor, ...]]
    fake_forward: Callable[..., tuple[torch.Tensor, ...]]
    fake_backward: Callable[..., tuple[torch.Tensor, ...]]
    setup_context: Callable[[Any, tuple[Any, ...], tuple[torch.Tensor, ...]], None]
    gradients: Callable[[Any, torch.Tensor, Callable[..., tuple[torch.Tensor, ...]]], tuple[Any, ...]]
    setup_context_eager: Callable[[Any, tuple[Any, ...], tuple[torch.Tensor, ...]], None] | None = None
    gradients_eager: Callable[[Any, torch.Tensor, Callable[..., tuple[torch.Tensor, ...]]], tuple[Any, ...]] | None = (
        None
    )


def register(name: str, definition: Definition) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Register `automodel_accel::<name>` and `<name>_backward` with torch, and return the function that calls them.

    The returned function takes `forward`'s inputs by position. Eagerly it runs a `torch.autograd.Function`, which spares the
    host time of the dispatcher; under torch.compile it is the registered operation, which the graph holds as one node.
    A second differentiation raises in both.
    """
    op = torch.library.custom_op(f"automodel_accel::{name}", definition.forward, mutates_args=())
    op.register_fake(definition.fake_forward)
    backward_op = torch.library.custom_op(f"automodel_accel::{name}_backward", definition.backward, mutates_args=())
    backward_op.register_fake(definition.fake_backward)

    def op_gradients(ctx: Any, grad_output: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        return definition.gradients(ctx, grad_output, backward_op)

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

    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return definition.forward(*inputs)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.inputs = len(inputs)

    def backward(ctx: Any, grad_output: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_output is None:
            return tuple([None] * ctx.inputs)
        if torch.is_grad_enabled():  # once_differentiable would cut the graph here, and autograd.grad never notices
            raise RuntimeError(
                f"{name} cannot be differentiated twice: its gradient was asked for with create_graph=True."
            )
        return gradients(ctx, grad_output, definition.backward)

    members = {"forward": staticmethod(forward), "setup_context": staticmethod(setup_context)}
    return type(name, (torch.autograd.Function,), {**members, "backward": staticmethod(backward)})
