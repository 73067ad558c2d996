"""Gradients by computing again: for functions whose backward pass shall keep nothing but their arguments."""

import torch

from mamba_ssm.ops.autocast import no_autocast


def graph(function, arguments, needed):
    """function(*arguments) with a graph of its own, and its leaves; tensors that are needed have gradients."""
    with torch.enable_grad():
        leaves = [
            argument.detach().requires_grad_(need)
            if isinstance(argument, torch.Tensor)
            else argument
            for argument, need in zip(arguments, needed, strict=True)
        ]
        return function(*leaves), leaves


def gradients(outputs, douts, leaves):
    """Gradients of a `graph`'s leaves, None for those not needed; an output whose gradient is None has none."""
    pairs = [
        (out, dout)
        for out, dout in zip(outputs, douts, strict=True)
        if out.requires_grad and dout is not None
    ]
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not pairs or not wanted:
        return [None] * len(leaves)
    outs, douts = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outs, wanted, douts, allow_unused=True))
    return [
        next(found) if isinstance(leaf, torch.Tensor) and leaf.requires_grad else None
        for leaf in leaves
    ]


def gradients_of(function, arguments, names, douts):
    """Gradients of function(**arguments), a tensor or several, with respect to the arguments in `names`.

    None for an argument that is None; zeros for one that the result does not depend on.
    """
    outputs, leaves = graph(
        lambda *values: function(**dict(zip(arguments, values, strict=True))),
        arguments.values(),
        [name in names for name in arguments],
    )
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = dict(zip(arguments, gradients(outputs, douts, leaves), strict=True))
    return tuple(
        torch.zeros_like(arguments[name])
        if found[name] is None and arguments[name] is not None
        else found[name]
        for name in names
    )


def _first_tensor(arguments):
    return next(argument for argument in arguments if isinstance(argument, torch.Tensor))


def recomputed(name, function):
    """An autograd.Function of this name that keeps the arguments of function(*arguments) and nothing else.

    function returns a tensor or a tuple of them, and casts by itself what autocast would: it runs without.
    """

    def forward(ctx, *arguments):
        is_tensor = [isinstance(argument, torch.Tensor) for argument in arguments]
        ctx.set_materialize_grads(False)
        ctx.options = [
            None if tensor else a for a, tensor in zip(arguments, is_tensor, strict=True)
        ]
        ctx.save_for_backward(
            *(a if tensor else None for a, tensor in zip(arguments, is_tensor, strict=True))
        )
        with no_autocast(_first_tensor(arguments)):
            return function(*arguments)

    @torch.autograd.function.once_differentiable
    def backward(ctx, *douts):
        arguments = [
            option if saved is None else saved
            for saved, option in zip(ctx.saved_tensors, ctx.options, strict=True)
        ]
        with no_autocast(_first_tensor(arguments)):
            outputs, leaves = graph(function, arguments, ctx.needs_input_grad)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(gradients(outputs, douts, leaves))

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members | {"__doc__": function.__doc__})
