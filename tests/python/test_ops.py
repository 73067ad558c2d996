"""Every native operation as torch sees it: opcheck, and bad arguments refused with nothing changed."""

import json
import math

import pytest
import torch
from mamba_ssm._version import __version__
from mamba_ssm.native import loader, ops


def _randn(device, *shape):
    return torch.randn(shape, device=device)


def _scan(device):
    r = _randn
    return {
        "u": r(device, 2, 4, 9),
        "delta": r(device, 2, 4, 9),
        "A": -r(device, 4, 3).abs(),
        "B": r(device, 2, 2, 3, 9),
        "C": r(device, 2, 2, 3, 9),
        "D": r(device, 4),
        "z": r(device, 2, 4, 9),
        "delta_bias": r(device, 4),
        "initial_state": r(device, 2, 4, 3),
        "delta_softplus": True,
    }


def _scan_complex(device):
    """A state and B are pairs of real and imaginary part, and so is a static C."""
    shapes = {"A": (4, 3, 2), "B": (2, 2, 3, 9, 2), "C": (4, 3, 2), "initial_state": (2, 4, 3, 2)}
    return _scan(device) | {name: -_randn(device, *shape).abs() for name, shape in shapes.items()}


def _scan_backward_complex(device):
    inputs = _scan_complex(device)
    state = inputs["initial_state"]
    given = {"dlast_state": state, "checkpoints": state.unsqueeze(2).contiguous()}
    return _scan_backward(device) | inputs | given


def _scan_backward(device):
    inputs = _scan(device)
    softplus = inputs.pop("delta_softplus")
    return {
        "dout": _randn(device, 2, 4, 9),
        "dlast_state": _randn(device, 2, 4, 3),
        **inputs,
        "checkpoints": inputs["initial_state"].unsqueeze(2).contiguous(),
        "delta_softplus": softplus,
    }


def _conv(device):
    return {
        "x": _randn(device, 2, 5, 8),
        "weight": _randn(device, 5, 3),
        "bias": _randn(device, 5),
        "seq_idx": None,
        "initial_states": _randn(device, 2, 2, 5).transpose(1, 2),
        "return_final_states": True,
        "silu": True,
    }


def _conv_packed(device):
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1]] * 2, dtype=torch.int32, device=device)
    changes = {
        "seq_idx": seq_idx,
        "initial_states": None,
        "return_final_states": False,
        "bias": None,
    }
    channel_last = {"x": _randn(device, 2, 8, 5).transpose(1, 2)}
    return _conv(device) | changes | channel_last


def _conv_backward(device):
    inputs = _conv(device)
    del inputs["return_final_states"]
    return {"dout": _randn(device, 2, 5, 8), "dfinal_states": _randn(device, 2, 5, 2), **inputs}


def _conv_update(device):
    return {
        "x": _randn(device, 3, 5, 2),
        "conv_state": _randn(device, 4, 5, 6),
        "weight": _randn(device, 5, 3),
        "bias": _randn(device, 5),
        "silu": True,
        "cache_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32, device=device),
        "conv_state_indices": torch.tensor([2, -1, 0], dtype=torch.int32, device=device),
    }


def _varlen(device):
    cu_seqlens = torch.tensor([0, 3, 3, 11], dtype=torch.int32, device=device)
    return {"x": _randn(device, 11, 5), "cu_seqlens": cu_seqlens, "state_len": 4}


def _state_update(device):
    r = _randn
    return {
        "state": r(device, 4, 2, 6, 3),
        "x": r(device, 3, 2, 6),
        "dt": r(device, 3, 2, 6),
        "A": -r(device, 2, 6, 3).abs(),
        "B": r(device, 3, 1, 3),
        "C": r(device, 3, 1, 3),
        "D": r(device, 2, 6),
        "z": r(device, 3, 2, 6),
        "dt_bias": r(device, 2, 6),
        "dt_softplus": True,
        "A_is_log": False,
        "dt_min": 0.1,
        "dt_max": 0.9,
        "state_batch_indices": torch.tensor([2, -1, 0], dtype=torch.int32, device=device),
    }


def _norm(device):
    return {
        "x": _randn(device, 4, 7),
        "weight": _randn(device, 7),
        "bias": _randn(device, 7),
        "residual": _randn(device, 4, 7),
        "eps": 1e-5,
        "is_rms_norm": False,
        "residual_in_fp32": True,
    }


def _norm_rms(device):
    x = {"x": _randn(device, 4, 7).bfloat16()}
    return _norm(device) | x | {"bias": None, "residual": None, "is_rms_norm": True}


def _norm_backward(device):
    return {
        "dy": _randn(device, 4, 7),
        "dresidual_out": _randn(device, 4, 7),
        "h": _randn(device, 4, 7),
        "weight": _randn(device, 7),
        "bias": _randn(device, 7),
        "mean": _randn(device, 4),
        "rstd": _randn(device, 4).abs(),
        "x_dtype": torch.float32,
        "is_rms_norm": False,
    }


def _norm_backward_mixed(device):
    changes = {"x_dtype": torch.bfloat16, "dy": _randn(device, 4, 7).bfloat16(), "bias": None}
    rms = {"is_rms_norm": True, "mean": torch.empty(0, device=device)}
    return _norm_backward(device) | changes | rms


def _branches(device):
    norm = _norm(device)
    options = {name: norm.pop(name) for name in ("eps", "is_rms_norm", "residual_in_fp32")}
    return {
        **norm,
        "x1": _randn(device, 4, 7),
        "weight1": _randn(device, 7),
        "bias1": _randn(device, 7),
        "rowscale": _randn(device, 4),
        "seed": torch.tensor([11], device=device),
        "dropout_p": 0.25,
        **options,
        "return_dropout_mask": True,
    }


def _branches_backward(device):
    norm, forward = _norm_backward(device), _branches(device)
    middle = ("weight1", "bias1", "rowscale", "seed", "dropout_p")
    return {
        "dy": norm["dy"],
        "dy1": _randn(device, 4, 7),
        **{name: norm[name] for name in ("dresidual_out", "h", "weight", "bias")},
        **{name: forward[name] for name in middle},
        **{name: norm[name] for name in ("mean", "rstd", "x_dtype")},
        "x1_dtype": torch.bfloat16,
        "has_residual": True,
        "is_rms_norm": False,
    }


def _gated_norm(device):
    return {
        "x": _randn(device, 4, 6),
        "weight": _randn(device, 6),
        "bias": _randn(device, 6),
        "z": _randn(device, 4, 6),
        "eps": 1e-5,
        "group_size": 3,
        "norm_before_gate": True,
        "is_rms_norm": False,
    }


def _gated_norm_rms(device):
    rms = {"is_rms_norm": True, "norm_before_gate": False, "bias": None}
    return _gated_norm(device) | {"x": _randn(device, 4, 6).bfloat16()} | rms


def _gated_norm_backward(device):
    forward = _gated_norm(device)
    return {
        "dy": _randn(device, 4, 6),
        **{name: forward[name] for name in ("x", "weight", "bias", "z")},
        "mean": _randn(device, 2, 4),
        "rstd": _randn(device, 2, 4).abs(),
        "group_size": 3,
        "norm_before_gate": False,
        "is_rms_norm": False,
        "recompute_output": True,
    }


def _ssd(device):
    r = _randn
    return {
        "x": r(device, 2, 9, 4, 5),
        "dt": r(device, 2, 9, 4),
        "A": -r(device, 4).abs(),
        "B": r(device, 2, 9, 2, 3),
        "C": r(device, 2, 9, 2, 3),
        "D": r(device, 4),
        "z": r(device, 2, 9, 4, 5),
        "dt_bias": r(device, 4),
        "initial_states": r(device, 2, 4, 5, 3),
        "dt_softplus": True,
        "dt_min": 0.0,
        "dt_max": math.inf,
        "seq_idx": None,
        "sequences": 0,
        "reverse": False,
        "checkpoints": True,
    }


def _ssd_packed(device):
    packed = {
        "seq_idx": torch.tensor([[0, 0, 0, 2, 2, 2, 2, -1, -1]], dtype=torch.int32, device=device),
        "initial_states": _randn(device, 3, 4, 5, 3),
        "sequences": 3,
        "reverse": True,
        "D": _randn(device, 4, 5),
    }
    timed = ("x", "dt", "B", "C", "z")
    return {name: t[:1] if name in timed else t for name, t in _ssd(device).items()} | packed


def _ssd_backward(device):
    inputs = _ssd(device)
    del inputs["checkpoints"]
    names = list(inputs)
    before, after = names[: names.index("dt_softplus")], names[names.index("dt_softplus") :]
    return {
        "dout": _randn(device, 2, 9, 4, 5),
        "dlast_states": _randn(device, 2, 4, 5, 3),
        **{name: inputs[name] for name in before},
        "checkpoints": inputs["initial_states"].unsqueeze(1).contiguous(),
        **{name: inputs[name] for name in after},
        "deterministic": True,
    }


def _without(sample, *names):
    return lambda device: sample(device) | dict.fromkeys(names)


SAMPLES = {
    "selective_scan_forward": [
        _scan,
        _without(_scan, "D", "z", "delta_bias", "initial_state"),
        lambda device: _scan(device) | {"B": _randn(device, 4, 3), "C": _randn(device, 4, 3)},
        _scan_complex,
    ],
    "selective_scan_backward": [
        _scan_backward,
        _without(_scan_backward, "D", "z", "delta_bias", "initial_state", "dlast_state"),
        _scan_backward_complex,
    ],
    "causal_conv1d_forward": [_conv, _conv_packed],
    "causal_conv1d_backward": [
        _conv_backward,
        _without(_conv_backward, "bias", "initial_states", "dfinal_states"),
        lambda device: _conv_backward(device) | {"deterministic": True},
    ],
    "causal_conv1d_update": [
        _conv_update,
        lambda device: (
            _without(_conv_update, "cache_seqlens", "conv_state_indices", "bias")(device)
            | {"x": _randn(device, 4, 5, 1)}
        ),
    ],
    "causal_conv1d_varlen_states": [_varlen],
    "selective_state_update": [_state_update, _without(_state_update, "D", "z", "dt_bias")],
    "layer_norm_forward": [_norm, _norm_rms],
    "layer_norm_backward": [_norm_backward, _norm_backward_mixed],
    "layer_norm_branches_forward": [
        _branches,
        _without(_branches, "bias", "residual", "x1", "bias1", "rowscale"),
        lambda device: _without(_branches, "seed")(device) | {"dropout_p": 0.0},
    ],
    "layer_norm_branches_backward": [
        _branches_backward,
        lambda device: (
            _without(_branches_backward, "dy1", "weight1", "bias1", "x1_dtype")(device)
            | {"has_residual": False}
        ),
    ],
    "gated_norm_forward": [_gated_norm, _gated_norm_rms, _without(_gated_norm, "bias", "z")],
    "gated_norm_backward": [
        _gated_norm_backward,
        lambda device: (
            _without(_gated_norm_backward, "bias", "z")(device)
            | {"is_rms_norm": True, "mean": torch.empty(0, device=device)}
            | {"recompute_output": False}
        ),
    ],
    "ssd_forward": [
        _ssd,
        _ssd_packed,
        _without(_ssd, "D", "z", "dt_bias", "initial_states"),
    ],
    "ssd_backward": [
        _ssd_backward,
        _without(_ssd_backward, "D", "z", "dt_bias", "initial_states", "dlast_states"),
    ],
}
DIFFERENTIABLE = (
    "selective_scan_forward",
    "ssd_forward",
    "causal_conv1d_forward",
    "layer_norm_forward",
    "layer_norm_branches_forward",
    "gated_norm_forward",
)
ALL = [(name, i) for name, samples in SAMPLES.items() for i in range(len(samples))]


def test_samples_cover_every_operation():
    assert {*SAMPLES, "native_info"} == {*loader.OPERATIONS} == {*ops.__all__}


@pytest.mark.parametrize("name, index", ALL, ids=[f"{name}-{i}" for name, i in ALL])
def test_opcheck(device, name, index):
    arguments = SAMPLES[name][index](device)
    if name in DIFFERENTIABLE:
        for value in arguments.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.requires_grad_()
    torch.library.opcheck(getattr(ops, name), tuple(arguments.values()))


def test_native_info():
    info = json.loads(ops.native_info())
    assert info["version"] == __version__
    assert info["torch_abi"] == "2.10"
    assert info["cpu_isa"] in ("sse2", "avx2", "avx512")
    assert {"float32", "float64"} <= set(info["dtypes"])


# operation -> argument -> what is wrong with it. Every refusal has to name the argument.
def _wider(t):
    return torch.cat([t, t], dim=-1)


def _nine_wide(t):
    return t.new_ones(t.shape[0], 9)


def _taller(t):
    return torch.cat([t, t])


def _integer(t):
    return t.to(torch.int64)


def _complex(t):
    return t.to(torch.complex64)


def _flat(t):
    return t.flatten()


def _half(t):
    return t.to(torch.float16)


def _transposed(t):
    return t.new_empty(t.shape[::-1]).permute(*range(t.dim() - 1, -1, -1)).copy_(t)


def _overlapping(t):
    return t[:1].expand(t.shape)


BAD = {
    "selective_scan_forward": {
        "u": [_flat, _integer, _complex],
        "delta": [_wider, _half],
        "A": [_flat, _taller, _half],
        "B": [_flat, _wider, _half],
        "C": [_flat, _wider, _half],
        "D": [_wider, _half],
        "z": [_wider, _half],
        "delta_bias": [_wider, _half],
        "initial_state": [_wider, _half],
    },
    "selective_scan_backward": {
        "dout": [_wider, _half],
        "dlast_state": [_wider, _half],
        "delta": [_wider, _half],
        "checkpoints": [_wider, _half],
    },
    "ssd_forward": {
        "x": [_flat, _integer, _complex],
        "dt": [_wider, _half],
        "A": [_wider, _half],
        "B": [_flat, _taller, _half],
        "C": [_flat, _wider, _half],
        "D": [_wider, _half],
        "z": [_wider, _half],
        "dt_bias": [_wider, _half],
        "initial_states": [_wider, _half],
        "sequences": [lambda sequences: -1],
    },
    "ssd_backward": {
        "dout": [_wider, _half],
        "dlast_states": [_wider, _half],
        "dt": [_wider, _half],
        "checkpoints": [_wider, _half],
    },
    "causal_conv1d_forward": {
        "x": [_flat, _integer, _complex],
        "weight": [_flat, _nine_wide, _integer],
        "bias": [_wider, _half],
        "initial_states": [_wider, _half],
    },
    "causal_conv1d_backward": {
        "dout": [_wider, _half],
        "dfinal_states": [_wider, _half],
        "weight": [_flat, _nine_wide],
    },
    "causal_conv1d_update": {
        "x": [_flat, _integer],
        "conv_state": [_flat, _half, _overlapping],
        "weight": [_flat, _nine_wide],
        "bias": [_wider],
        "cache_seqlens": [_wider, _half],
        "conv_state_indices": [_wider, _half],
    },
    "causal_conv1d_varlen_states": {
        "x": [_flat, _complex],
        "cu_seqlens": [_half],
        "state_len": [lambda length: -1],
    },
    "selective_state_update": {
        "state": [_flat, _integer, _overlapping],
        "x": [_flat, _integer],
        "dt": [_wider],
        "A": [_wider],
        "B": [_wider],
        "C": [_wider],
        "D": [_wider],
        "z": [_wider],
        "dt_bias": [_wider],
        "state_batch_indices": [_wider, _half],
    },
    "layer_norm_forward": {
        "x": [_flat, _integer],
        "weight": [_wider, _integer],
        "bias": [_wider, _half],
        "residual": [_wider, _integer],
    },
    "layer_norm_backward": {
        "dy": [_wider],
        "dresidual_out": [_wider],
        "h": [_flat],
        "weight": [_wider],
        "mean": [_wider],
        "rstd": [_wider],
    },
    "layer_norm_branches_forward": {
        "x": [_flat, _integer],
        "x1": [_wider, _integer],
        "weight1": [_wider, _integer],
        "bias1": [_wider, _half],
        "rowscale": [_wider, _integer],
        "seed": [_wider, _half],
        "dropout_p": [lambda p: -p, lambda p: 1.5],
    },
    "gated_norm_forward": {
        "x": [_flat, _integer],
        "weight": [_wider, _integer],
        "bias": [_wider, _integer],
        "z": [_wider, _integer],
        "group_size": [lambda size: 0, lambda size: -3, lambda size: 4],
    },
    "gated_norm_backward": {
        "dy": [_wider, _half],
        "x": [_flat],
        "weight": [_wider],
        "z": [_wider],
        "mean": [_wider, _half],
        "rstd": [_wider, _half],
        "group_size": [lambda size: 0, lambda size: 4],
    },
    "layer_norm_branches_backward": {
        "dy1": [_wider, _half],
        "weight1": [_wider, _integer],
        "rowscale": [_wider, _integer],
        "seed": [_wider, _half],
        "dropout_p": [lambda p: -p, lambda p: 1.5],
    },
}
FAULTS = [
    (name, argument, fault)
    for name, arguments in BAD.items()
    for argument, faults in arguments.items()
    for fault in faults
]


def _assert_refused(name, arguments, match):
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=match):
        getattr(ops, name)(*arguments.values())
    for argument, value in before.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(arguments[argument], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, argument, fault",
    FAULTS,
    ids=[f"{name}-{argument}-{fault.__name__.strip('_')}" for name, argument, fault in FAULTS],
)
def test_bad_argument_is_refused_by_name(device, name, argument, fault):
    arguments = SAMPLES[name][0](device)
    arguments[argument] = fault(arguments[argument])
    _assert_refused(name, arguments, rf"\b{argument}\b")


@pytest.mark.parametrize("name", SAMPLES)
def test_tensors_on_two_devices_are_refused(name):
    arguments = SAMPLES[name][0]("cpu")
    last = [k for k, v in arguments.items() if isinstance(v, torch.Tensor)][-1]
    arguments[last] = arguments[last].to("meta")
    with pytest.raises(RuntimeError, match=f"{name}.*one device"):
        getattr(ops, name)(*arguments.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLES)
def test_cuda_and_cpu_tensors_together_are_refused(name):
    arguments = SAMPLES[name][0]("cuda")
    last = [k for k, v in arguments.items() if isinstance(v, torch.Tensor)][-1]
    arguments[last] = arguments[last].cpu()
    _assert_refused(name, arguments, rf"\b{last}\b.*cuda")


@pytest.mark.parametrize("name", SAMPLES)
def test_strides_do_not_matter(device, name):
    """Operations take any strides; transposed copies give the same results as contiguous ones."""

    def results(change):
        torch.manual_seed(1)
        arguments = {
            k: change(v) if isinstance(v, torch.Tensor) and k != "checkpoints" else v
            for k, v in SAMPLES[name][0](device).items()
        }
        returned = getattr(ops, name)(*arguments.values())
        changed = [arguments[k] for k in ("conv_state", "state") if k in arguments]
        return [*(returned if isinstance(returned, tuple) else [returned]), *changed]

    for plain, strided in zip(results(torch.Tensor.contiguous), results(_transposed), strict=True):
        torch.testing.assert_close(strided, plain)
