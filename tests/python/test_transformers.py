"""transformers' models of the Mamba families, built small and random, on our kernels and on transformers' own formulas."""

import importlib
import importlib.util
import inspect
import sys

import pytest
import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.native.loader import NAMESPACE
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 16):
    pytest.skip("transformers before 5.16 finds kernels in another way", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("exact_references")

VOCABULARY = 64
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "time_step_rank": 4,
    "initializer_range": 0.3,
    **IDS,
}
ATTENTION_TOO = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "initializer_range": 0.3,
    **IDS,
}
HEADS = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "conv_kernel": 4, "chunk_size": 8}
ATTENTION = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    **IDS,
}
HYBRID = ATTENTION | {
    "num_hidden_layers": 3,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
KINDS = ["linear_attention", "full_attention", "linear_attention"]
# After a colon: a variant of the model before it.
FAMILIES = {
    "mamba": ("Mamba", MIXER),
    "mamba:bias": ("Mamba", MIXER | {"use_bias": True, "use_conv_bias": False}),
    "falcon_mamba": ("FalconMamba", MIXER),
    "jamba": ("Jamba", ATTENTION_TOO),
    "mamba2": ("Mamba2", MIXER | HEADS),
    "mamba2:bias": ("Mamba2", MIXER | HEADS | {"use_bias": True, "time_step_limit": (0.01, 0.05)}),
    "bamba": ("Bamba", HYBRID | {"attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2",
        ATTENTION
        | {
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
            "num_key_value_heads": 4,
            "n_mamba_heads": 4,
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "chunk_size": 8,
            "adapter_rank": 4,
            "num_mem_blocks": 1,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        ATTENTION
        | {
            "layers_block_type": [*KINDS, "mlp"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        HYBRID | {"layer_types": KINDS, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "falcon_h1": ("FalconH1", HYBRID | {"mamba_d_ssm": 64, "mamba_n_groups": 2}),
    "falcon_h1:norm": (
        "FalconH1",
        HYBRID
        | {
            "mamba_d_ssm": 64,
            "mamba_n_groups": 2,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
        },
    ),
}
SECOND = FAMILIES.keys() - {"mamba", "mamba:bias", "falcon_mamba", "jamba"}
STEP = {"causal_conv1d_update", "selective_state_update"}


def scan_of(family, direction="forward"):
    """The native operations of a whole sequence."""
    return {
        f"causal_conv1d_{direction}",
        f"{'ssd' if family in SECOND else 'selective_scan'}_{direction}",
    }


def modeling(family):
    name = family.partition(":")[0]
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def copy_of(module, suffix, monkeypatch):
    """The module imported anew, which looks for kernels as things are now."""
    name = f"{module.__name__}_{suffix}"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, copy)
    spec.loader.exec_module(copy)
    return copy


@pytest.fixture
def slow(monkeypatch):
    """slow(family): transformers' module as it is where our packages are not installed."""

    def load(family):
        module = modeling(family)
        with monkeypatch.context() as hidden:
            hidden.setitem(sys.modules, "mamba_ssm", None)
            hidden.setitem(sys.modules, "causal_conv1d", None)
            return copy_of(module, "slow", monkeypatch)

    return load


def build(family, module, device, state=None):
    """A model of the module's class, with random weights or those of `state`."""
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**fields)
    torch.manual_seed(1)
    model = getattr(module, f"{name}ForCausalLM")(config).to(device)
    if state is not None:
        model.load_state_dict(state)
    return model


class NativeOperations(TorchDispatchMode):
    """The names of the native operations that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == NAMESPACE:
            self.names.add(function.name().split("::")[1])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def tokens(device):
    return torch.randint(3, VOCABULARY, (2, 11), device=device)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def train(model, tokens):
    """(logits, gradient of every parameter) of the language model's loss."""
    output = model(tokens, labels=tokens, use_cache=False)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
    return output.logits, *gradients


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        if other is None:  # an expert that no token chose
            assert one is None
            continue
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale + 1e-6)


FUNCTIONS = {
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "mamba_inner_fn": "mamba_ssm.ops.selective_scan_interface",
    "mamba_split_conv1d_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
    "selective_state_update": "mamba_ssm.ops.triton.selective_state_update",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_generation_of_transformers_finds_the_function(name):
    """By `from module import`, at the top of the package, or along the dotted path from there."""
    path = FUNCTIONS[name]
    function = getattr(importlib.import_module(path), name)
    package = importlib.import_module(path.split(".")[0])
    assert getattr(package, name) is function
    inner = ".".join([*path.split(".")[1:], name])
    resolve = importlib.import_module("transformers.utils.import_utils").resolve_internal_import
    assert resolve(package, inner) is function
    walked = package
    for part in inner.split("."):
        walked = getattr(walked, part)
    assert walked is function


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_show_their_parameters(name):
    """transformers passes what inspect.signature shows, and nothing that it does not."""
    function = getattr(importlib.import_module(FUNCTIONS[name]), name)
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert inspect.isfunction(function) and kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_falcon_mamba_finds_its_function_by_its_own_name():
    package = importlib.import_module("mamba_ssm")
    assert package.falcon_mamba_inner_fn is package.mamba_inner_fn


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_and_backward_run_on_native_operations(family, device, tokens, mode):
    model = getattr(build(family, modeling(family), device), mode)()
    with NativeOperations() as forward:
        loss = model(tokens, labels=tokens, use_cache=False).loss
    with NativeOperations() as backward:
        loss.backward()
    assert forward.names >= scan_of(family)
    assert backward.names >= scan_of(family, "backward")


@pytest.mark.parametrize("family", sorted(SECOND))
def test_training_takes_the_fused_function(family, device, tokens):
    output = build(family, modeling(family), device).train()(tokens, use_cache=False)
    names, open_nodes = set(), [output.logits.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node not in names:
            names |= {node, node.name()}
            open_nodes += [following for following, _ in node.next_functions if following]
    assert "MambaSplitConv1dScanCombinedFnBackward" in names


def test_generate_runs_on_native_operations(family, device, tokens):
    model = build(family, modeling(family), device).eval()
    with NativeOperations() as operations:
        model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert operations.names >= scan_of(family) | STEP


def test_the_slow_path_has_no_native_operation(family, device, tokens, slow):
    model = build(family, slow(family), device)
    with NativeOperations() as operations:
        train(model, tokens)
        model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert not operations.names


MODES = [(family, mode) for family in FAMILIES for mode in ("train", "eval")]
MODES.remove(("falcon_mamba", "train"))  # its two paths normalise delta at different places


@pytest.mark.parametrize("family, mode", MODES)
def test_forward_and_backward_agree_with_the_slow_path(family, mode, device, tokens, slow):
    fast_model = build(family, modeling(family), device)
    slow_model = build(family, slow(family), device, fast_model.state_dict())
    fast, expected = (train(getattr(model, mode)(), tokens) for model in (fast_model, slow_model))
    assert_equal(fast, expected)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu(family):
    tokens = torch.randint(3, VOCABULARY, (2, 11))
    model = build(family, modeling(family), "cpu").eval()
    expected = train(model, tokens)
    got = train(model.to("cuda"), tokens.to("cuda"))
    assert_equal([t if t is None else t.cpu() for t in got], expected)


def test_falcon_mamba_trains_with_delta_normalised_after_its_projection(
    device, tokens, slow, monkeypatch
):
    """As the fused function is defined, which transformers takes in training only."""
    module = slow("falcon_mamba")
    fast_model = build("falcon_mamba", modeling("falcon_mamba"), device).train()
    slow_model = build("falcon_mamba", module, device, fast_model.state_dict()).train()
    scan, eps = module.mamba_selective_scan, slow_model.config.mixer_rms_eps

    def normalise_and_scan(u, delta, *args, **kwargs):
        delta = delta * torch.rsqrt(delta.square().mean(1, keepdim=True) + eps)
        return scan(u, delta, *args, **kwargs)

    monkeypatch.setattr(module, "mamba_selective_scan", normalise_and_scan)
    for block in slow_model.backbone.layers:
        monkeypatch.setattr(block.mixer.dt_layernorm, "forward", lambda dt: dt)
    assert_equal(train(fast_model, tokens), train(slow_model, tokens))


@pytest.mark.parametrize("padding", [0, 4], ids=["whole", "left_padded"])
def test_generate_agrees_with_the_slow_path(family, device, tokens, slow, padding):
    if family == "falcon_h1:norm" and padding:
        pytest.skip("transformers 5.17 fails by itself: keys and mask differ in length")
    fast_model = build(family, modeling(family), device).eval()
    slow_model = build(family, slow(family), device, fast_model.state_dict()).eval()
    mask = torch.ones_like(tokens)
    tokens[1, :padding], mask[1, :padding] = IDS["pad_token_id"], 0
    fast, expected = (
        model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in (fast_model, slow_model)
    )
    assert torch.equal(fast.sequences, expected.sequences)
    assert_equal(fast.logits, expected.logits)


@pytest.mark.parametrize("missing", ["mamba_inner_fn", "selective_scan_fn"])
def test_a_function_that_is_absent_is_replaced_alone(device, tokens, monkeypatch, missing):
    """Each function is looked up by itself, so that the others stay native."""
    fast_model = build("mamba", modeling("mamba"), device).train()
    for name in ("mamba_ssm", "mamba_ssm.ops.selective_scan_interface"):
        package = importlib.import_module(name)
        if missing in vars(package):
            monkeypatch.delattr(package, missing)
        find = package.__getattr__

        def without(name, find=find):
            if name == missing:
                raise AttributeError(name)
            return find(name)

        monkeypatch.setattr(package, "__getattr__", without)
    module = copy_of(modeling("mamba"), "partial", monkeypatch)
    partial_model = build("mamba", module, device, fast_model.state_dict())
    partial_model.train(missing == "mamba_inner_fn")
    with NativeOperations() as operations:
        results = train(partial_model, tokens)
    assert operations.names >= {"causal_conv1d_forward", "causal_conv1d_backward"}
    assert ("selective_scan_forward" in operations.names) is (missing == "mamba_inner_fn")
    assert_equal(results, train(fast_model, tokens))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_accelerate_trains(device, kind, precision):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=device == "cpu", mixed_precision=precision)
    if kind == "ours":
        model = MambaLMHeadModel(MambaConfig(d_model=32, n_layer=2, vocab_size=VOCABULARY))
    else:
        model = build("mamba", modeling("mamba"), "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.arange(60).remainder(7).expand(2, -1)
    loader = torch.utils.data.DataLoader(text, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(30):
        for batch in loader:
            with NativeOperations() as operations:
                logits = model(batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch[:, 1:].flatten()
            )
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert batch.device.type == device and operations.names >= scan_of("mamba")
    assert losses[0] > 3.0 and losses[-1] < 0.3, losses
