"""layer_norm_fn and rms_norm_fn with residual and branches against the references."""

import math

import pytest
import torch
from bad_calls import ERRORS, NO_FLOATS, assert_refused, spoil, thousand_examples
from compare import DTYPES, judge
from hypothesis import given
from hypothesis import strategies as st
from mamba_ssm.native import ops
from mamba_ssm.ops.triton import layer_norm as current
from mamba_ssm.ops.triton import layernorm as before_2
from mamba_ssm.ops.triton.layer_norm import (
    LayerNormLinearFn,
    RMSNorm,
    _layer_norm_bwd,
    _layer_norm_fwd,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)


def problem(
    device="cpu",
    dtype=torch.float32,
    shape=(2, 5, 96),
    bias=True,
    residual=True,
    residual_dtype=None,
    weight_dtype=None,
    strided=False,
):
    """Inputs of a norm as keyword arguments; x and residual are multiples of 1/8.

    Their sum is then exact in every dtype: backward reads the stored sum, and the references know no rounding of it.
    """
    weight_dtype = weight_dtype or torch.promote_types(dtype, torch.float32)

    def randn(*sizes, dtype=dtype):
        return torch.randn(sizes, device=device).to(dtype)

    def rows(dtype):
        width = 2 * shape[-1] if strided else shape[-1]
        return ((randn(*shape[:-1], width) * 8).round() / 8).to(dtype)[..., : shape[-1]]

    return {
        "x": rows(dtype),
        "weight": randn(shape[-1], dtype=weight_dtype),
        "bias": randn(shape[-1], dtype=weight_dtype) if bias else None,
        "residual": rows(residual_dtype or dtype) if residual else None,
    }


ROWS = {
    "base": {},
    "one row": {"shape": (96,)},
    "one feature fewer than a vector": {"shape": (3, 15)},
    "wide rows": {"shape": (4, 4100)},
    "many rows": {"shape": (700, 24)},
    "no bias": {"bias": False},
    "no residual": {"residual": False},
    "float32 residual": {"residual_dtype": torch.float32},
    "strided rows": {"strided": True},
}
CASES = [(row, dtype) for row in ROWS for dtype in ("f32", "bf16")] + [
    ("base", "f16"),
    ("base", "f64"),
]
CASES = [case for case in CASES if case != ("float32 residual", "f32")]


@pytest.mark.parametrize("row, dtype", CASES, ids=[f"{row}-{dtype}" for row, dtype in CASES])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_outputs_and_gradients(device, row, dtype, rms):
    if device == "cuda" and dtype == "f64":
        pytest.skip("CUDA has no float64 kernels")
    function, reference = (rms_norm_fn, rms_norm_ref) if rms else (layer_norm_fn, layer_norm_ref)
    judge(
        "layer_norm",
        dtype,
        lambda **t: function(**t, prenorm=True),
        lambda **t: reference(**t, prenorm=True),
        problem(device, DTYPES[dtype], **ROWS[row]),
    )


@pytest.mark.parametrize("route", ["eager", "registered"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_gradcheck(route, residual, rms):
    tensors = problem(dtype=torch.float64, shape=(3, 5), residual=residual, bias=not rms)
    names = [name for name, tensor in tensors.items() if tensor is not None]

    def function(*values):
        given = tensors | dict(zip(names, values, strict=True))
        if route == "eager":
            return layer_norm_fn(**given, prenorm=True, is_rms_norm=rms)
        y, h, *_ = ops.layer_norm_forward(*given.values(), 1e-6, rms, False)
        return (y, h) if residual else y

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


def test_reference_by_hand():
    x, weight = torch.tensor([[3.0, -3.0]]), torch.tensor([2.0, 1.0])
    expected = torch.tensor([[2.0, -1.0]])
    torch.testing.assert_close(layer_norm_ref(x + 5, weight, None, eps=0.0), expected)
    torch.testing.assert_close(rms_norm_ref(x, weight, None, eps=0.0), expected)


@pytest.mark.parametrize(
    "dtype, residual_dtype, in_fp32, expected",
    [
        (torch.bfloat16, None, False, torch.bfloat16),
        (torch.bfloat16, None, True, torch.float32),
        (torch.bfloat16, torch.float32, False, torch.float32),
        (torch.bfloat16, torch.bfloat16, True, torch.bfloat16),
        (torch.float32, None, True, torch.float32),
    ],
)
def test_dtype_of_the_carried_residual(device, dtype, residual_dtype, in_fp32, expected):
    tensors = problem(
        device, dtype, residual=residual_dtype is not None, residual_dtype=residual_dtype
    )
    y, h = layer_norm_fn(**tensors, prenorm=True, residual_in_fp32=in_fp32)
    assert (y.dtype, h.dtype) == (dtype, expected)


def test_an_unchanged_residual_is_the_input_itself(device):
    tensors = problem(device, residual=False)
    _, h = layer_norm_fn(**tensors, prenorm=True)
    assert h is tensors["x"]


def test_gradient_through_the_carried_residual_alone(device):
    tensors = problem(device)
    tensors["x"].requires_grad_()
    _, h = layer_norm_fn(**tensors, prenorm=True)
    (gradient,) = torch.autograd.grad(h.sum(), tensors["x"])
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_empty(device):
    tensors = problem(device, shape=(0, 8))
    tensors["weight"].requires_grad_()
    y, h = layer_norm_fn(**tensors, prenorm=True)
    assert y.shape == h.shape == (0, 8)
    y.sum().backward()
    assert tensors["weight"].grad.abs().sum() == 0


def linear_problem(device="cpu", dtype=torch.float32, **options):
    tensors = problem(device, dtype, **options)
    names = {"x": "x", "weight": "norm_weight", "bias": "norm_bias", "residual": "residual"}
    features = tensors["x"].shape[-1]
    return {names[k]: t for k, t in tensors.items()} | {
        "linear_weight": torch.randn(7, features, device=device).to(tensors["weight"].dtype),
        "linear_bias": torch.randn(7, device=device).to(tensors["weight"].dtype),
    }


def norm_then_linear(
    x, norm_weight, norm_bias, residual, linear_weight, linear_bias, dtype=None, **options
):
    """What `layer_norm_linear_fn` does, in two steps."""
    y, h = layer_norm_fn(x, norm_weight, norm_bias, residual, prenorm=True, **options)
    dtype = dtype or y.dtype
    return torch.nn.functional.linear(
        y.to(dtype), linear_weight.to(dtype), linear_bias.to(dtype)
    ), h


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_layer_norm_linear(device, rms, residual):
    results = []
    tensors = linear_problem(device, residual=residual)
    for function in (layer_norm_linear_fn, norm_then_linear):
        leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
        options = {"prenorm": True} if function is layer_norm_linear_fn else {}
        out, h = function(**leaves, is_rms_norm=rms, **options)
        given = [t for t in leaves.values() if t is not None]
        results.append((out, h, *torch.autograd.grad(out.square().sum() + h.sum(), given)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    out = layer_norm_linear_fn(**tensors, is_rms_norm=rms)
    assert torch.equal(out, results[0][0])


def test_layer_norm_linear_does_not_keep_the_norms_output(device):
    tensors = linear_problem(device)
    tensors["x"].requires_grad_()
    y = layer_norm_fn(*(tensors[k] for k in ("x", "norm_weight", "norm_bias", "residual")))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_norm_linear_fn(**tensors)
    assert kept and not any(t.numel() == y.numel() and torch.equal(t.view_as(y), y) for t in kept)


def test_layer_norm_linear_gradcheck():
    tensors = linear_problem(dtype=torch.float64, shape=(3, 5))

    def function(*values):
        return layer_norm_linear_fn(**dict(zip(tensors, values, strict=True)), prenorm=True)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])
    assert function(*tensors.values())[0].grad_fn.name() == "ViewBackward0"
    assert LayerNormLinearFn.__name__ in str(
        function(*tensors.values())[0].grad_fn.next_functions[0][0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_linear_under_autocast(device, dtype):
    """Weights and the norm's output take autocast's dtype; gradients take their tensors'."""
    leaves = {
        k: t.detach().requires_grad_()
        for k, t in linear_problem(device, dtype, residual_dtype=torch.float32).items()
    }
    with torch.autocast(device, dtype=torch.bfloat16):
        out, h = layer_norm_linear_fn(**leaves, prenorm=True)
    expected, expected_h = norm_then_linear(**leaves, dtype=torch.bfloat16)
    assert (out.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h, expected_h)
    torch.testing.assert_close(out, expected)
    cotangents = (torch.randn_like(out), torch.randn_like(h))
    got, wanted = (
        torch.autograd.grad(results, list(leaves.values()), cotangents)
        for results in ((out, h), (expected, expected_h))
    )
    for gradient, reference, leaf in zip(got, wanted, leaves.values(), strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient, reference, rtol=2e-2, atol=2e-2)


def test_norm_under_autocast_takes_dtypes_as_given(device):
    tensors = problem(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer_norm_fn(**tensors)
    assert torch.equal(y, layer_norm_fn(**tensors))


def test_old_path_keeps_its_argument_order(device):
    x, weight, bias, residual = problem(device).values()
    expected = current.rms_norm_fn(
        x, weight, bias, residual=residual, eps=1e-3, prenorm=True, residual_in_fp32=True
    )
    for old in (
        before_2.rms_norm_fn(x, weight, bias, residual, True, True, 1e-3),
        before_2.layer_norm_fn(x, weight, bias, residual, 1e-3, True, True, True),
    ):
        assert all(torch.equal(a, b) for a, b in zip(old, expected, strict=True))
    assert before_2.RMSNorm is RMSNorm


def test_module(device):
    norm = RMSNorm(96, device=device)
    assert list(norm.state_dict()) == ["weight"] and norm.bias is None
    tensors = problem(device)
    y, h = norm(tensors["x"], tensors["residual"], prenorm=True)
    expected = rms_norm_ref(
        tensors["x"], norm.weight, None, tensors["residual"], eps=1e-5, prenorm=True
    )
    torch.testing.assert_close((y, h), expected)


def test_compiles_to_one_graph(device):
    leaves = {name: t.detach().requires_grad_() for name, t in problem(device).items()}
    function = torch.compile(layer_norm_fn, fullgraph=True, backend="aot_eager")
    results = []
    for candidate in (layer_norm_fn, function):
        y, h = candidate(**leaves, prenorm=True)
        gradients = torch.autograd.grad(y.square().sum() + h.sum(), list(leaves.values()))
        results.append((y, h, *gradients))
    for expected, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected)


# ---- branches: dropout, row scales, x1, and a second output ----

BRANCHES = {
    "x1": ("x1",),
    "weight1 and bias1": ("weight1", "bias1"),
    "weight1 alone": ("weight1",),
    "parallel norm": ("x1", "weight1", "bias1"),
    "rowscale": ("rowscale",),
    "rowscale with x1": ("rowscale", "x1"),  # upstream refuses it
    "dropout": ("dropout",),
    "dropout with x1": ("dropout", "x1"),
    "everything": ("x1", "weight1", "bias1", "rowscale", "dropout"),
}


def branches(device="cpu", dtype=torch.float32, row="everything", shape=(2, 5, 96), **options):
    """`problem` and its branches, in which every term is exact: halves, doubles and multiples of 1/8."""
    tensors = problem(device, dtype, shape=shape, **options)
    x, weight = tensors["x"], tensors["weight"]
    more = {
        "x1": ((torch.randn_like(x) * 8).round() / 8).to(x.dtype),
        "weight1": torch.randn_like(weight),
        "bias1": torch.randn_like(weight),
        "rowscale": torch.randint(-1, 2, shape[:-1], device=device).to(dtype).exp2(),
    }
    dropout_p = 0.5 if "dropout" in BRANCHES[row] else 0.0
    return tensors | {k: t for k, t in more.items() if k in BRANCHES[row]}, dropout_p


def seeded(function, seed=3):
    """The function, drawing the same dropout every time."""

    def call(*args, **kwargs):
        torch.manual_seed(seed)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("row", BRANCHES)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("scale_learns", [False, True])
def test_branches_and_their_gradients(device, row, dtype, rms, scale_learns):
    if scale_learns and "rowscale" not in BRANCHES[row]:
        pytest.skip("no rowscale")
    if scale_learns and dtype == "bf16":
        pytest.skip("a sum that cancels, because a norm hardly sees the scale of a row: noise")
    if device == "cuda" and dtype == "f64":
        pytest.skip("CUDA has no float64 kernels")
    residual_dtype = torch.float64 if dtype == "f64" else torch.float32
    tensors, dropout_p = branches(device, DTYPES[dtype], row, residual_dtype=residual_dtype)
    function, reference = (rms_norm_fn, rms_norm_ref) if rms else (layer_norm_fn, layer_norm_ref)
    *_, mask, mask1 = seeded(function)(**tensors, dropout_p=dropout_p, return_dropout_mask=True)
    masks = [None if m is None else m.cpu() for m in (mask, mask1)]

    def scaled(t):
        return (
            t if scale_learns or "rowscale" not in t else t | {"rowscale": t["rowscale"].detach()}
        )

    judge(
        "layer_norm",
        dtype,
        lambda **t: seeded(function)(**scaled(t), dropout_p=dropout_p, prenorm=True),
        lambda **t: reference(
            **scaled(t),
            dropout_p=dropout_p,
            prenorm=True,
            dropout_mask=masks[0],
            dropout_mask1=masks[1],
        ),
        tensors,
    )


@pytest.mark.parametrize("row", BRANCHES)
@pytest.mark.parametrize("route", ["eager", "registered"])
def test_branches_gradcheck(row, route):
    tensors, dropout_p = branches(dtype=torch.float64, row=row, shape=(3, 5))
    rowscale = tensors.pop("rowscale", None)
    names = list(tensors)
    seed = torch.tensor([3]) if dropout_p else None

    def function(*values):
        given = dict(zip(names, values, strict=True))
        if route == "eager":
            return seeded(layer_norm_fn)(
                **given, rowscale=rowscale, dropout_p=dropout_p, prenorm=True
            )
        first = [
            given.get(k) for k in ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
        ]
        y, y1, h, *_ = ops.layer_norm_branches_forward(
            *first, rowscale, seed, dropout_p, 1e-6, False, False, False
        )
        return (y, y1, h) if "weight1" in given else (y, h)

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


def test_gradient_through_one_output_alone(device):
    tensors, _ = branches(device, row="parallel norm")
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    outputs = layer_norm_fn(**leaves, prenorm=True)
    references = layer_norm_ref(**leaves, prenorm=True)
    for output, reference in zip(outputs, references, strict=True):
        got = torch.autograd.grad(
            output.sum(), list(leaves.values()), retain_graph=True, allow_unused=True
        )
        wanted = torch.autograd.grad(
            reference.sum(), list(leaves.values()), retain_graph=True, allow_unused=True
        )
        for name, a, b in zip(leaves, got, wanted, strict=True):
            torch.testing.assert_close(
                torch.zeros_like(leaves[name]) if a is None else a,
                torch.zeros_like(leaves[name]) if b is None else b,
                rtol=1e-4,
                atol=1e-4,
            )


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_what_is_returned(device, prenorm, second, masks):
    row = "parallel norm" if second else "x1"
    tensors, _ = branches(device, row=row)
    x = tensors["x"]
    results = seeded(layer_norm_fn)(
        **tensors, dropout_p=0.5, prenorm=prenorm, return_dropout_mask=masks
    )
    if not (prenorm or second or masks):
        results = (results,)
    expected = [x.dtype] * (1 + second + prenorm) + [torch.bool] * 2 * masks
    assert [r.dtype for r in results] == expected
    assert all(r.shape == x.shape for r in results)


def test_masks_are_none_without_dropout_or_second_branch(device):
    tensors = problem(device)
    y, mask, mask1 = layer_norm_fn(**tensors, return_dropout_mask=True)
    assert mask is None and mask1 is None and torch.equal(y, layer_norm_fn(**tensors))
    _, mask, mask1 = layer_norm_fn(**tensors, dropout_p=0.1, return_dropout_mask=True)
    assert mask.shape == tensors["x"].shape and mask1 is None


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share(device, dropout_p):
    x = torch.ones(1000, 100, device=device)
    weight = torch.ones(100, device=device)
    y, h, mask, mask1 = layer_norm_fn(
        x,
        weight,
        None,
        x1=x,
        dropout_p=dropout_p,
        prenorm=True,
        return_dropout_mask=True,
    )
    deviation = (dropout_p * (1 - dropout_p) / x.numel()) ** 0.5
    for share in (mask.float().mean().item(), mask1.float().mean().item()):
        assert abs(share - (1 - dropout_p)) < 5 * deviation
    both = (mask & mask1).float().mean().item()
    assert abs(both - (1 - dropout_p) ** 2) < 5 * deviation  # they know nothing of each other
    torch.testing.assert_close(h, (mask.float() + mask1.float()) / (1 - dropout_p))


def test_seeds_reproduce_and_differ(device):
    tensors, dropout_p = branches(device)
    runs = [
        seeded(layer_norm_fn, seed)(**tensors, dropout_p=dropout_p, return_dropout_mask=True)
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][2], runs[2][2])


def test_no_dropout_draws_nothing(device):
    tensors = problem(device)
    state_of = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    before = state_of()
    layer_norm_fn(**tensors)
    assert torch.equal(state_of(), before)
    layer_norm_fn(**tensors, dropout_p=0.1)
    assert not torch.equal(state_of(), before)


@pytest.mark.gpu
def test_one_seed_gives_one_mask_on_both_devices():
    def masks(device):
        tensors, _ = branches(device, shape=(7, 33))
        seed = torch.tensor([12345], device=device)
        arguments = (tensors["x"], tensors["weight"], None, None, tensors["x1"], None, None, None)
        return ops.layer_norm_branches_forward(
            *arguments, seed, 0.3, 1e-6, True, False, True
        )[-2:]  # fmt: skip

    for cpu, cuda in zip(masks("cpu"), masks("cuda"), strict=True):
        assert torch.equal(cpu, cuda.cpu())


def test_checkpointing_draws_the_same_dropout_again(device):
    tensors, dropout_p = branches(device)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    results = []
    for wrap in (False, True):

        def block(x):
            y, _ = layer_norm_fn(**leaves | {"x": x}, dropout_p=dropout_p)
            return y

        torch.manual_seed(5)
        y = (
            torch.utils.checkpoint.checkpoint(block, leaves["x"], use_reentrant=False)
            if wrap
            else block(leaves["x"])
        )
        torch.manual_seed(99)
        results.append((y, *torch.autograd.grad(y.sum(), [leaves["x"], leaves["x1"]])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "dtype, residual_dtype, in_fp32, expected",
    [
        (torch.bfloat16, None, False, torch.bfloat16),
        (torch.bfloat16, None, True, torch.float32),
        (torch.bfloat16, torch.float32, False, torch.float32),
        (torch.float32, torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_dtype_of_the_carried_residual_with_branches(
    device, dtype, residual_dtype, in_fp32, expected
):
    tensors, dropout_p = branches(
        device, dtype, residual=residual_dtype is not None, residual_dtype=residual_dtype
    )
    y, y1, h = layer_norm_fn(**tensors, dropout_p=dropout_p, prenorm=True, residual_in_fp32=in_fp32)
    assert (y.dtype, y1.dtype, h.dtype) == (dtype, dtype, expected)


@pytest.mark.parametrize("width", [16384, 40000])
def test_rows_of_64_kilobytes_and_more(device, width):
    """Upstream refuses them."""
    tensors, dropout_p = branches(device, torch.float32, "everything", shape=(3, width))
    y, y1, h, mask, mask1 = layer_norm_fn(
        **tensors, dropout_p=dropout_p, prenorm=True, return_dropout_mask=True
    )
    expected = layer_norm_ref(
        **tensors, dropout_p=dropout_p, prenorm=True, dropout_mask=mask, dropout_mask1=mask1
    )
    for got, wanted in zip((y, y1, h), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_branches_of_no_rows(device):
    tensors, dropout_p = branches(device, shape=(0, 8))
    leaves = {k: t.requires_grad_() for k, t in tensors.items() if k != "rowscale"}
    y, y1, h, mask, mask1 = layer_norm_fn(
        **leaves,
        rowscale=tensors["rowscale"],
        dropout_p=dropout_p,
        prenorm=True,
        return_dropout_mask=True,
    )
    assert y.shape == y1.shape == h.shape == mask.shape == mask1.shape == (0, 8)
    for gradient in torch.autograd.grad(y.sum() + y1.sum() + h.sum(), list(leaves.values())):
        assert not gradient.any()


def test_branches_with_expanded_and_sliced_inputs(device):
    tensors, _ = branches(device, row="everything")
    for name, tensor in tensors.items():
        wide = torch.cat([tensor, tensor], dim=-1)
        views = [tensor[..., :1].expand(tensor.shape), wide[..., 1 : 1 + tensor.shape[-1]]]
        if tensor.dim() > 1:
            views.append(tensor[:1].expand(tensor.shape))
        for view in views:
            results = [
                seeded(layer_norm_fn)(**tensors | {name: value}, dropout_p=0.5)
                for value in (view, view.contiguous())
            ]
            for got, wanted in zip(*results, strict=True):
                torch.testing.assert_close(got, wanted, msg=name)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_no_graph(device, context):
    tensors, dropout_p = branches(device)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    with context():
        outputs = layer_norm_fn(**leaves, dropout_p=dropout_p, prenorm=True)
    assert not any(o.requires_grad for o in outputs)


def test_branches_compile_to_one_graph(device):
    tensors, dropout_p = branches(device)
    rowscale = tensors.pop("rowscale")
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    compiled = torch.compile(layer_norm_fn, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer_norm_fn, compiled):
        y, y1, h, mask, mask1 = seeded(function)(
            **leaves,
            rowscale=rowscale,
            dropout_p=dropout_p,
            prenorm=True,
            return_dropout_mask=True,
        )
        loss = y.square().sum() + y1.square().sum() + h.sum()
        results.append((y, y1, h, mask, mask1, *torch.autograd.grad(loss, list(leaves.values()))))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_linear_compiles_to_one_graph(device):
    leaves = {k: t.requires_grad_() for k, t in linear_problem(device).items()}
    compiled = torch.compile(layer_norm_linear_fn, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer_norm_linear_fn, compiled):
        out, h = function(**leaves, prenorm=True)
        loss = out.square().sum() + h.sum()
        results.append((out, h, *torch.autograd.grad(loss, list(leaves.values()))))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", [None, *BRANCHES])
def test_private_forward_and_backward_are_the_functions(device, row):
    tensors, dropout_p = (problem(device, shape=(6, 32)), 0.0)
    if row is not None:
        tensors, dropout_p = branches(device, row=row, shape=(6, 32))
    rowscale = tensors.pop("rowscale", None)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    second = "weight1" in leaves
    outputs = seeded(layer_norm_fn)(**leaves, rowscale=rowscale, dropout_p=dropout_p, prenorm=True)
    y, y1, mean, rstd, h, seeds, mask, mask1 = seeded(_layer_norm_fwd)(
        **leaves,
        eps=1e-6,
        rowscale=rowscale,
        dropout_p=dropout_p,
        residual_dtype=leaves["residual"].dtype,
        return_dropout_mask=True,
    )
    private = (y, y1, h) if second else (y, h)
    assert all(torch.equal(a, b) for a, b in zip(private, outputs, strict=True))
    assert mean.shape == rstd.shape == (6,) and mean.dtype == rstd.dtype == torch.float32
    assert (mask is not None) == (dropout_p > 0) == (seeds is not None)
    assert (mask1 is not None) == (dropout_p > 0 and "x1" in leaves)
    cotangents = [torch.randn_like(o) for o in outputs]
    dx, dw, db, dresidual, dx1, dw1, db1, again = _layer_norm_bwd(
        cotangents[0],
        h,
        leaves["weight"],
        leaves["bias"],
        1e-6,
        mean,
        rstd,
        dresidual=cotangents[-1],
        dy1=cotangents[1] if second else None,
        weight1=leaves.get("weight1"),
        bias1=leaves.get("bias1"),
        seeds=seeds,
        dropout_p=dropout_p,
        rowscale=rowscale,
        has_residual=True,
        has_x1="x1" in leaves,
        recompute_output=True,
    )
    got = {
        "x": dx,
        "weight": dw,
        "bias": db,
        "residual": dresidual,
        "x1": dx1,
        "weight1": dw1,
        "bias1": db1,
    }
    wanted = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    for name, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(got.pop(name), gradient, msg=name)
    assert all(gradient is None for gradient in got.values())
    torch.testing.assert_close(again, y)


def test_private_forward_in_other_dtypes(device):
    x = torch.randn(6, 32, device=device)
    weight = torch.randn(32, device=device)
    y, y1, mean, _, h, seeds, *masks = _layer_norm_fwd(
        x, weight, None, 1e-6, out_dtype=torch.bfloat16, is_rms_norm=True
    )
    assert y.dtype == torch.bfloat16 and h is x
    assert [y1, mean, seeds, *masks] == [None] * 5
    *_, h, _, _, _ = _layer_norm_fwd(x.bfloat16(), weight, None, 1e-6, residual_dtype=torch.float32)
    assert h.dtype == torch.float32


def test_module_drops_in_training_only(device):
    norm = RMSNorm(96, dropout_p=0.5, device=device)
    assert list(norm.state_dict()) == ["weight"]
    x, _, _, residual = problem(device).values()
    _, h = norm(x, residual, prenorm=True)
    torch.manual_seed(1)
    _, again = norm(x, residual, prenorm=True)
    assert not torch.equal(h, again) and not torch.equal(h, x + residual)
    y = norm.eval()(x, residual)
    torch.testing.assert_close(y, rms_norm_ref(x, norm.weight, None, residual, eps=1e-5))


# ---- generated bad calls ----

NAMES = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1", "rowscale")


@st.composite
def bad_calls(draw):
    rows, features = draw(st.integers(2, 4)), draw(st.integers(2, 9))
    arguments, _ = branches(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        row=draw(st.sampled_from([*BRANCHES])),
        shape=(rows, features),
    )
    arguments["dropout_p"] = draw(st.sampled_from([0.0, 0.5]))
    fault = draw(
        st.sampled_from(["longer", "shorter", "deeper", "dtype", "meta", "absent", "dropout_p"])
    )
    if fault == "dropout_p":
        p = draw(
            st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=1.001), st.just(math.nan))
        )
        return arguments | {"dropout_p": p}
    if fault == "absent":
        name = draw(st.sampled_from(["x", "weight", "bias1 alone"]))
        if name == "bias1 alone":
            return arguments | {"weight1": None, "bias1": arguments["weight"]}
        return arguments | {name: None}
    name = draw(st.sampled_from([n for n in arguments if n in NAMES]))
    if fault == "deeper" and name == "rowscale":  # which is any tensor of as many elements
        fault = "dtype"
    tensor = spoil(draw, arguments[name], fault, dtypes=(*NO_FLOATS, torch.float64))
    return arguments | {name: tensor}


@thousand_examples
@given(bad_calls())
def test_generated_bad_calls_change_nothing(arguments):
    names = (*NAMES, "dropout_p", "NoneType", "tensors")
    errors = (*ERRORS, AssertionError, AttributeError)
    assert_refused(layer_norm_fn, **arguments, names=names, errors=errors)
