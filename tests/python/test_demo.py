"""The demo: its baseline by hand, its training, and that an interruption changes nothing."""

import json
import math
import signal
from fractions import Fraction

import pytest
import torch
from mamba_ssm import cli
from mamba_ssm.cli import demo, language_model
from mamba_ssm.cli.language_model import Settings, Training
from mamba_ssm.cli.witten_bell import WittenBell
from mamba_ssm.modules.mamba2 import Mamba2

TINY = ["--steps", "12", "--d-model", "16", "--layers", "1", "--length", "16", "--batch", "2"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from more, and a busy machine makes them wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_witten_bell_order_0_by_hand():
    # "aab": n = 3, t = 2, so P(a) = (2 + 2 / 256) / 5 and an unseen byte has (2 / 256) / 5.
    model = WittenBell(b"aab", order=0)
    assert model.probability(b"", ord("a")) == pytest.approx(float((2 + Fraction(2, 256)) / 5))
    assert model.probability(b"", ord("z")) == pytest.approx(float(Fraction(2, 256) / 5))


def test_witten_bell_backs_off_by_hand():
    # "abac": order 0: n = 4, t = 3, P(b) = (1 + 3/256) / 7.
    # After "a": n = 2 (b, c), t = 2, P(b | a) = (1 + 2 P(b)) / 4.
    # After "ba": n = 1 (c), t = 1, P(b | ba) = (0 + 1 P(b | a)) / 2.
    model = WittenBell(b"abac", order=2)
    p_b = (1 + Fraction(3, 256)) / 7
    p_b_after_a = (1 + 2 * p_b) / 4
    assert model.probability(b"", ord("b")) == pytest.approx(float(p_b))
    assert model.probability(b"xa", ord("b")) == pytest.approx(float(p_b_after_a))  # "xa" is new
    assert model.probability(b"ba", ord("b")) == pytest.approx(float(p_b_after_a / 2))
    assert model.probability(b"ba", ord("c")) > 0.5


@pytest.mark.parametrize("context", [b"", b"t", b"th", b"zz", b"qth"])
def test_witten_bell_is_a_distribution(context):
    model = WittenBell(b"the theory of the other thing")
    assert sum(model.probability(context, byte) for byte in range(256)) == pytest.approx(1.0)


def test_bits_per_byte_by_hand():
    model = WittenBell(b"", order=2)  # knows nothing: 8 bits for any byte
    assert model.bits_per_byte(b"anything", 3) == 8.0
    model = WittenBell(b"aab", order=0)
    p_a, p_b = (2 + 2 / 256) / 5, (1 + 2 / 256) / 5
    expected = -(math.log2(p_a) + math.log2(p_b)) / 2
    assert model.bits_per_byte(b"xxab", 2) == pytest.approx(expected)


def test_text_is_large_and_ends_in_held_out_text():
    text = demo.read_text(None)
    assert len(text) > 300_000


def tiny_training(text=b"0123456789" * 20, length=8, steps=1):
    settings = Settings(16, 1, length, 2, steps, 1e-3, 0)
    return Training(settings, text, len(text) * 9 // 10, "cpu")


@pytest.mark.parametrize("length", [8, 9, 50])
def test_evaluation_counts_every_held_out_byte_once(length, monkeypatch):
    training = tiny_training(length=length)
    text, split = training.text, training.split
    seen = torch.zeros(len(text))

    def position_as_bits(rows):
        return rows[:, 1:].float()  # each byte costs its own value

    training.text = torch.arange(len(text), dtype=torch.int32)
    monkeypatch.setattr(training, "_bits", position_as_bits)
    seen[split:] = 1
    expected = torch.arange(len(text))[split:].double().mean().item()
    assert training.evaluate() == pytest.approx(expected)


def test_learning_rate_warms_up_and_decays():
    training = tiny_training(steps=1000)
    rates = []
    for training.step_count in (0, 49, 50, 999):
        rates.append(training._learning_rate() / training.settings.learning_rate)
    assert rates[0] == pytest.approx(1 / language_model.WARMUP_STEPS)
    assert rates[1] == rates[2] == pytest.approx(1.0)
    assert rates[3] == pytest.approx(0.1, abs=1e-3)


@pytest.fixture
def run(tmp_path):
    """Runs the tiny demo on part of its text; returns the exit status and result.json."""
    text = tmp_path / "text"
    text.write_bytes(demo.read_text(None)[:20_000])

    def demo_in(out, *arguments):
        arguments = ["demo", "--text", str(text), "--out", str(out), *TINY, *arguments]
        status = cli.main(arguments)
        path = out / "result.json"
        return status, json.loads(path.read_text()) if path.is_file() else None

    return demo_in


def test_losing_to_order_2_is_an_error(run, tmp_path, capsys):
    status, result = run(tmp_path / "out")
    assert status == 1
    assert result["bits_per_byte"] > result["order_2_bits_per_byte"]
    assert "did not beat" in capsys.readouterr().err


def test_winning_leaves_everything(run, tmp_path, capsys):
    """Two bytes do not tell the next one of this text, a longer memory does."""
    generator = torch.Generator().manual_seed(1)
    period = bytes(97 + torch.randint(2, (64,), generator=generator))
    text = tmp_path / "periodic"
    text.write_bytes(period * 64)
    arguments = ["--text", str(text), "--steps", "150", "--length", "64", "--batch", "8"]
    status, result = run(tmp_path / "out", *arguments, "--d-model", "32", "--learning-rate", "0.01")
    assert status == 0
    assert result["bits_per_byte"] < result["order_2_bits_per_byte"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"result.json", "sample.txt", "checkpoint.pt"}
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "no curve" in capsys.readouterr().out
    else:
        expected |= {"curve.png", "curve.svg"}
    assert names == expected
    sample = (tmp_path / "out" / "sample.txt").read_text("utf-8")
    assert 64 < len(sample) <= 64 + demo.SAMPLE_BYTES  # bytes of one character may stand together


@pytest.mark.parametrize("width", [16, 48, 192])
def test_mamba2_layers_of_any_width(width):
    settings = Settings(width, 1, 8, 2, 1, 1e-3, 0, "mamba2")
    training = Training(settings, b"0123456789" * 20, 180, "cpu")
    mixer = training.model.backbone.layers[0].mixer
    assert isinstance(mixer, Mamba2) and mixer.headdim * mixer.nheads == 2 * width
    assert training.step() > 0


def test_the_architecture_is_one_of_the_settings(run, tmp_path, refusal):
    status, result = run(tmp_path / "out", "--arch", "mamba2")
    assert status == 1 and len(result["losses"]) == 12
    text = ("--text", str(tmp_path / "text"))
    assert "keeps arch = mamba2" in refusal(tmp_path / "out", *text, "--arch", "mamba1")


def test_interruption_and_resume_give_the_same_numbers(run, tmp_path, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    _, whole = run(tmp_path / "whole")

    original = Training.step

    def step_then_ctrl_c(training):
        bits = original(training)
        if training.step_count == 5:
            signal.raise_signal(signal.SIGINT)
        return bits

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", step_then_ctrl_c)
        status, result = run(tmp_path / "parts")
    assert (status, result) == (130, None)
    assert "interrupted after step 5" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler

    _, resumed = run(tmp_path / "parts", "--resume")
    assert "resumed at step 5" in capsys.readouterr().out
    for name in ("losses", "held_out", "bits_per_byte"):
        assert resumed[name] == whole[name]
    assert (tmp_path / "parts/sample.txt").read_bytes() == (
        tmp_path / "whole/sample.txt"
    ).read_bytes()


@pytest.fixture
def refusal(capsys):
    """What --resume says when it ends with status 2."""

    def say(out, *arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["demo", "--out", str(out), "--resume", *arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err

    return say


def test_resume_refuses_other_settings_and_nothing(tmp_path, refusal):
    assert refusal(tmp_path).startswith("nothing to resume")
    tiny_training(demo.read_text(None)).save(tmp_path / "checkpoint.pt")
    assert "keeps steps = 1" in refusal(tmp_path, "--steps", "7")


def test_resume_refuses_another_text(tmp_path, refusal):
    tiny_training().save(tmp_path / "checkpoint.pt")
    assert "another text" in refusal(tmp_path)


@pytest.mark.gpu
def test_demo_on_cuda(run, tmp_path):
    for arch in ("mamba1", "mamba2"):
        status, result = run(tmp_path / arch, "--device", "cuda", "--arch", arch)
        assert status == 1  # twelve tiny steps do not win
        assert len(result["losses"]) == 12
