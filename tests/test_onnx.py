"""An ONNX graph computes what the model does that it was made of, with any cache and any sizes."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="checks what is written with the package onnx")

from onnx.reference import ReferenceEvaluator

from chapters import export
from chapters.onnx_files import ACTIVATIONS, export_onnx, to_onnx
from chapters.token_files import from_huggingface
from chapters.weights import write_run
from conftest import tiny
from model import ACTIVATIONS as OUR_ACTIVATIONS
from model import KVCache
from sample import generate
from test_export import trained  # noqa: F401  a fixture
from test_weights import KINDS, random_model

# What no family of transformers has: each option that changes what a model computes.
OWN = {"softcap": dict(softcap=5.0), "sinusoids": dict(position="sinusoidal"),
       "nowhere": dict(position="none"), "norm last": dict(norm_first=False),
       "relu": dict(activation="relu"), "relu2": dict(activation="relu2", bias=True),
       "layernorm": dict(norm="layernorm"), "window": dict(window=3, tied=True)}


def every_kind(kind):
    return random_model(kind) if kind in KINDS else random_model("qwen3", **OWN[kind])


def open_session(source):
    """-> a function ids (B, T), past, a list of arrays or None -> (logits, the next past)."""
    runtime = pytest.importorskip("onnxruntime", reason="runs what is written")
    session = runtime.InferenceSession(source)
    names = [given.name for given in session.get_inputs()][1:]
    _, K, _, D = session.get_inputs()[1].shape

    def step(ids, past=None):
        past = past or [np.zeros((len(ids), K, 0, D), np.float32)] * len(names)
        logits, *present = session.run(None, dict(zip(names, past), input_ids=ids.numpy()))
        return torch.tensor(logits), present
    return step


@pytest.mark.parametrize("kind", [*KINDS, *OWN])
def test_onnxruntime_has_the_logits_of_the_model_at_once_and_in_steps(kind):
    ours = every_kind(kind)
    graph = to_onnx(ours)
    onnx.checker.check_model(graph, full_check=True)
    step, past = open_session(graph.SerializeToString()), None
    ids = torch.randint(64, (3, 16))
    expected = ours(ids)[0]
    torch.testing.assert_close(step(ids)[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step(ids[:1, :5])[0], expected[:1, :5], rtol=1e-4, atol=1e-4)
    for piece in ids.split([4, 1, 1, 7, 1, 2], dim=1):
        logits, past = step(piece, past)
        n = past[0].shape[2]
        torch.testing.assert_close(logits, expected[:, n - piece.size(1):n], rtol=1e-4, atol=1e-4)


def test_each_activation_has_its_operators():
    assert ACTIVATIONS.keys() == OUR_ACTIVATIONS.keys()


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_the_cache_is_ours(kind):
    ours, ids = random_model(kind), torch.randint(64, (2, 9))
    cache = [KVCache(ours.config, 2, 9) for _ in ours.transformer.blocks]
    ours(ids, cache=cache)
    _, present = open_session(to_onnx(ours).SerializeToString())(ids)
    for layer, k, v in zip(cache, present[::2], present[1::2]):
        torch.testing.assert_close((layer.k, layer.v), (torch.tensor(k), torch.tensor(v)))


def test_the_reference_of_the_standard_computes_the_same():
    ours, ids = random_model("qwen3"), torch.randint(64, (1, 3))
    session = ReferenceEvaluator(to_onnx(ours))
    given = {name: np.zeros((1, 2, 0, 16), np.float32) for name in session.input_names}
    logits, *_ = session.run(None, given | dict(input_ids=ids.numpy()))
    torch.testing.assert_close(torch.tensor(logits), ours(ids)[0], rtol=1e-4, atol=1e-4)


def test_the_command_writes_a_folder_that_onnxruntime_opens(call, trained, tmp_path):
    ours = random_model("llama", vocab_size=trained.n_vocab)
    run = write_run(ours, trained, tmp_path / "run")
    said, error = call(export, "onnx", run, f"--out={tmp_path}/out")
    path = tmp_path / "out/model.onnx"
    assert (said, error) == (f"next: onnxruntime.InferenceSession('{path}')\n", "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"}
    onnx.checker.check_model(path, full_check=True)
    assert from_huggingface(tmp_path / "out").definition() == trained.definition()
    step, ids = open_session(path), torch.randint(trained.n_vocab, (2, 4))
    logits, past = step(ids)
    said = []
    for _ in range(12):
        said.append(logits[:, -1].argmax(dim=-1))
        logits, past = step(said[-1][:, None], past)
    assert torch.equal(torch.stack(said), torch.stack([*generate(ours, ids, 12, temperature=0.0)]))
    size = sum(part.stat().st_size for part in path.parent.glob("model.onnx*"))
    assert 0 <= size - 4 * ours.n_parameters() < 30_000  # the matrix of a tied head is there once
    with pytest.raises(ValueError, match="out is there already"):
        export_onnx(run, tmp_path / "out")


def test_a_model_that_reads_a_source_is_refused(call, trained, tmp_path):
    reader = tiny("transformer", vocab_size=trained.n_vocab)
    run = write_run(reader, trained, tmp_path / "run")
    _, error = call(export, "onnx", run)
    assert error.startswith(f"error: {run} has architecture=transformer") and error.count("\n") == 1
