"""torch.func.vmap over the native operations: the mapped dimension joins one that an operation has already.

A mapped batch of sequences is a longer batch; where parameters are mapped too, or gradients of parameters are
wanted for each sample, it is more channels. What joins neither runs in a loop, one call for each entry.
"""

import torch

# Axes of tensor arguments and results, one letter each; alternatives are told apart by their rank.
# b: batch, d: channels or heads, g: groups of them, r: rows; others never take the mapped dimension in.
# p: the parts of complex numbers, or the channels of a head.
_SHAPES = {
    "selective_scan_forward": (
        "u:bdl delta:bdl A:dn|dnp B:dn|bgnl|dnp|bgnlp C:dn|bgnl|dnp|bgnlp D:d z:bdl delta_bias:d "
        "initial_state:bdn|bdnp seq_idx:bl",
        "bdl bdn|bdnp bdkn|bdknp",
    ),
    "selective_scan_backward": (
        "dout:bdl dlast_state:bdn|bdnp u:bdl delta:bdl A:dn|dnp B:dn|bgnl|dnp|bgnlp C:dn|bgnl|dnp|bgnlp "
        "D:d z:bdl delta_bias:d initial_state:bdn|bdnp checkpoints:bdkn|bdknp seq_idx:bl",
        "bdl bdl dn|dnp dn|bgnl|dnp|bgnlp dn|bgnl|dnp|bgnlp d bdl d bdn|bdnp",
    ),
    "causal_conv1d_forward": (
        "x:bdl weight:dw bias:d seq_idx:bl initial_states:bdw",
        "bdl bdw",
    ),
    "causal_conv1d_backward": (
        "dout:bdl dfinal_states:bdw x:bdl weight:dw bias:d seq_idx:bl initial_states:bdw",
        "bdl dw d bdw",
    ),
    "ssd_forward": (
        "x:bldp dt:bld A:d B:blgn C:blgn D:d|dp z:bldp dt_bias:d initial_states:bdpn seq_idx:bl",
        "bldp bdpn bkdpn",
    ),
    "ssd_backward": (
        "dout:bldp dlast_states:bdpn x:bldp dt:bld A:d B:blgn C:blgn D:d|dp z:bldp dt_bias:d "
        "initial_states:bdpn checkpoints:bkdpn seq_idx:bl",
        "bldp bld d blgn blgn d|dp bldp d bdpn",
    ),
    "gated_norm_forward": ("x:rn weight:n bias:n z:rn", "rn gr gr"),
    "layer_norm_forward": ("x:rn weight:n bias:n residual:rn", "rn rn r r"),
}
_JOINS = ("b", "r", "dg")


_functions = {}  # operation -> its autograd.Function for torch.func


def through_dispatcher():
    """Whether to call operations by `call`: in traced code, and inside torch.func's transforms."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def call(operation, *args):
    """operation(*args), differentiable by what surrounds it."""
    if torch.compiler.is_compiling() or operation not in _functions:
        return operation(*args)
    return _functions[operation].apply(*args)


def _axes(shapes, tensor):
    """The letters of a tensor; those that it has to have where its rank is another: an absent result."""
    return next((axes for axes in shapes.split("|") if len(axes) == tensor.dim()), "")


def _join(tensor, dim, axes, letters, size):
    """Lets the mapped dimension, None for a tensor without it, join the axis of `letters`."""
    axis = next((i for i, letter in enumerate(axes) if letter in letters), None)
    if axis is None:
        return tensor
    if dim is None:
        tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], size, *tensor.shape[axis:])
    else:
        tensor = tensor.movedim(dim, axis)
    return tensor.flatten(axis, axis + 1)


def _part(result, shapes, letters, size):
    """(result with the mapped dimension as an axis of its own, that axis); None where it is absent."""
    axes = _axes(shapes, result)
    axis = next((i for i, letter in enumerate(axes) if letter in letters), None)
    if axis is None:
        return result, None
    return result.unflatten(axis, (size, result.shape[axis] // size)), axis


def _choose(joins, arguments, results):
    """The letters, one of joins, of the axes that can take the mapped dimension in, or None.

    arguments: (axes, is mapped) of each tensor. Every mapped tensor needs such an axis, and so does every result:
    an operation sums over what a result lacks.
    """

    def has(axes, letters):
        return any(letter in axes for letter in letters)

    for letters in joins:
        mapped = all(has(axes, letters) for axes, is_mapped in arguments if is_mapped)
        if mapped and all(has(axes, letters) for shape in results for axes in shape.split("|")):
            return letters
    return None


def _loop(operation, size, in_dims, args):
    """One call for each entry; an argument that is changed in place has to be mapped."""
    calls = []
    for i in range(size):
        picked = (
            arg if dim is None else arg.select(dim, i)
            for arg, dim in zip(args, in_dims, strict=True)
        )
        calls.append(operation(*picked))
    if isinstance(calls[0], torch.Tensor):
        return torch.stack(calls), 0
    results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return results, (0,) * len(results)


def register(operation, setup_context=None, backward=None):
    """Gives an operation, a torch._ops.OpOverload, its rule for vmap, and with a gradient torch.func's transforms."""
    if backward is not None:
        _functions[operation] = type(
            f"{operation._opname}_function",
            (torch.autograd.Function,),
            {
                "forward": staticmethod(lambda *args: operation(*args)),
                "setup_context": staticmethod(setup_context),
                "backward": staticmethod(backward),
                "generate_vmap_rule": True,
            },
        )
    names = [argument.name for argument in operation._schema.arguments]
    changed = [
        a.name for a in operation._schema.arguments if a.alias_info and a.alias_info.is_write
    ]
    name = operation._schema.name.split("::")[1]
    expected, results = _SHAPES.get(name, ("", ""))
    expected = dict(shape.split(":") for shape in expected.split())
    results = results.split()

    def rule(info, in_dims, *args):
        for given, dim, argument in zip(args, in_dims, names, strict=False):
            if argument in changed and given is not None and dim is None:
                raise RuntimeError(
                    f"{name}: {argument} is changed in place, so vmap has to map it too; "
                    f"expected an in_dims entry for it, got None"
                )
        size = info.batch_size
        shapes = []
        for arg, dim, argument in zip(args, in_dims, names, strict=False):
            is_tensor = isinstance(arg, torch.Tensor)
            one = arg if dim is None else arg.select(dim, 0)
            shapes.append(_axes(expected.get(argument, ""), one) if is_tensor else "")
        # Sequences of cu_seqlens lie in a batch of one, and have rows of their own in the states.
        packed = dict(zip(names, args, strict=False)).get("sequences", 0) != 0
        joins = [letters for letters in _JOINS if letters != "b" or not packed]
        letters = results and _choose(
            joins,
            [(axes, dim is not None) for axes, dim in zip(shapes, in_dims, strict=True)],
            results,
        )
        if not letters:
            return _loop(operation, size, in_dims, args)
        joined = operation(
            *(
                _join(arg, dim, axes, letters, size) if isinstance(arg, torch.Tensor) else arg
                for arg, dim, axes in zip(args, in_dims, shapes, strict=True)
            )
        )
        parts = [_part(*pair, letters, size) for pair in zip(joined, results, strict=True)]
        return tuple(part for part, _ in parts), tuple(axis for _, axis in parts)

    torch.library.register_vmap(operation, rule)
