"""
A run as an ONNX graph with its key-value cache, which onnxruntime computes.

    export_onnx("runs/chat", "folder")    # model.onnx, its weights beside it, tokenizer.json

The graph takes input_ids (B, T) and for each block i past.i.key and past.i.value (B, K, P, D) of
the tokens before, P = 0 at first. It gives logits (B, T, V), and present.i.key and present.i.value
(B, K, P + T, D), which are the next call's past. B, T and P may differ from call to call.

python -m chapters.export onnx RUN is the command. The operators: onnx.ai/onnx/operators
"""

from pathlib import Path

import torch

try:
    import onnx
except ImportError:  # it is optional
    onnx = None

from chapters.token_files import to_huggingface
from chapters.weights import load_plain, whole_folder
from model import rotary_table, sinusoids

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding

# -----------------------------------------------------------------------------
# The graph, part by part as model.py has it. Each function adds the nodes of a layer to a Graph g;
# what it takes and gives are names of the nodes' outputs.


class Graph:
    """Nodes in the order in which they run, and the constants that they read."""

    def __init__(self):
        self.nodes, self.constants = [], {}

    def constant(self, value):
        """The name of a tensor, or of a list of whole numbers; the same for the same object."""
        name, tensor = f"constant_{len(self.constants)}", torch.as_tensor(value).detach()
        # the value is kept, too: an object that is gone leaves its id to another
        return self.constants.setdefault(id(value), (name, tensor, value))[0]

    def __call__(self, operator, *inputs, outputs=(), **attributes):
        """Add a node; inputs are names or constants -> the name of its first output."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        outputs = outputs or [f"{operator}_{len(self.nodes)}"]
        self.nodes.append(onnx.helper.make_node(operator, names, outputs, **attributes))
        return outputs[0]


def norm(g, x, layer):
    """RMSNorm or LayerNorm."""
    if not layer.center:
        return g("RMSNormalization", x, layer.weight, epsilon=layer.eps)
    bias = [] if layer.bias is None else [layer.bias]
    return g("LayerNormalization", x, layer.weight, *bias, epsilon=layer.eps)


def linear(g, x, layer):
    """x (..., C) times the layer's weights, plus its bias -> (..., F)."""
    y = g("MatMul", x, layer.weight.mT)
    return y if layer.bias is None else g("Add", y, layer.bias)


ACTIVATIONS = {
    "gelu": lambda g, x: g("Gelu", x, approximate="tanh"),
    "relu": lambda g, x: g("Relu", x),
    "relu2": lambda g, x: g("Mul", y := g("Relu", x), y),
    "swiglu": lambda g, x: g("Mul", x, g("Sigmoid", x)),
}


def mlp(g, x, layer):
    """(B, T, C) -> (B, T, C)"""
    activation, hidden = ACTIVATIONS[layer.activation], linear(g, x, layer.up_proj)
    if layer.gate_proj is None:
        return linear(g, activation(g, hidden), layer.down_proj)
    gate = activation(g, linear(g, x, layer.gate_proj))
    return linear(g, g("Mul", gate, hidden), layer.down_proj)


def split_heads(g, x, D, norm_layer=None, table=()):
    """(B, T, H * D) -> (B, H, T, D), normalised, and rotated by the inputs that embed() gives."""
    x = g("Reshape", x, [0, 0, -1, D])                                   # (B, T, H, D)
    x = x if norm_layer is None else norm(g, x, norm_layer)
    x = g("Transpose", x, perm=[0, 2, 1, 3])                             # (B, H, T, D)
    return g("RotaryEmbedding", x, *table) if table else x


def attention(g, x, layer, table, mask, i):
    """(B, T, C) -> (B, T, C); Attention puts keys and values behind those of the past, and lets
    heads share them."""
    D = layer.head_size
    q = split_heads(g, linear(g, x, layer.q_proj), D, layer.q_norm, table)
    k = split_heads(g, linear(g, x, layer.k_proj), D, layer.k_norm, table)
    v = split_heads(g, linear(g, x, layer.v_proj), D)
    outputs = [f"attention_{i}", f"present.{i}.key", f"present.{i}.value"]
    y = g("Attention", q, k, v, mask, f"past.{i}.key", f"past.{i}.value", outputs=outputs)
    y = g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), [0, 0, -1])   # (B, T, C)
    return linear(g, y, layer.o_proj)


def block(g, x, layer, table, mask, i):
    """Attention, then MLP, each added to the stream (B, T, C); the norms come before, or after."""
    if layer.norm_first:
        x = g("Add", x, attention(g, norm(g, x, layer.attn_norm), layer.attn, table, mask, i))
        return g("Add", x, mlp(g, norm(g, x, layer.mlp_norm), layer.mlp))
    x = norm(g, g("Add", x, attention(g, x, layer.attn, table, mask, i)), layer.attn_norm)
    return norm(g, g("Add", x, mlp(g, x, layer.mlp)), layer.mlp_norm)


def size(g, x, dimension):
    """The size of x in a dimension, as a tensor (1,)."""
    return g("Shape", x, start=dimension, end=dimension + 1)


def positions_and_mask(g, config):
    """-> (the positions of the new tokens (T,), where they may attend to, (T, P + T))"""
    past, zero, one = size(g, "past.0.key", 2), torch.tensor(0), torch.tensor(1)
    total = g("Add", past, size(g, "input_ids", 1))
    keys = g("Range", zero, g("Squeeze", total), one)                    # (P + T,)
    positions = g("Slice", keys, past, total)                            # (T,)
    queries = g("Unsqueeze", positions, [1])
    mask = g("LessOrEqual", keys, queries)
    if config.window:
        first = g("Sub", queries, torch.tensor(config.window - 1))
        mask = g("And", mask, g("GreaterOrEqual", keys, first))
    return positions, mask


def embed(g, transformer, positions):
    """-> (the stream (B, T, C) as it begins, what RotaryEmbedding reads: cosines and sines of all
    positions (block_size, D/2) and those of the tokens (B, T); nothing where nothing rotates)"""
    c, x = transformer.config, g("Gather", transformer.wte.weight, "input_ids")
    every = torch.arange(c.block_size)
    if c.position == "rope":
        ids = g("Expand", positions, g("Shape", "input_ids"))            # (B, T)
        return x, (*rotary_table(c, every), ids)
    if c.position == "none":
        return x, ()
    if c.position == "sinusoidal":
        x = g("Mul", x, torch.tensor(c.n_embd ** 0.5))
    table = transformer.wpe.weight if c.position == "learned" else sinusoids(every, c.n_embd)
    return g("Add", x, g("Gather", table, positions)), ()


def build(model):
    """The Graph of a model that writes text."""
    g, c, transformer = Graph(), model.config, model.transformer
    positions, mask = positions_and_mask(g, c)
    x, table = embed(g, transformer, positions)
    for i, layer in enumerate(transformer.blocks):
        x = block(g, x, layer, table, mask, i)
    x = x if transformer.final_norm is None else norm(g, x, transformer.final_norm)
    # not .mT: a tied head has the embedding's matrix, which is written once
    x = g("MatMul", x, g("Transpose", model.lm_head.weight, perm=[1, 0]))
    if c.softcap:
        cap = torch.tensor(c.softcap)
        x = g("Mul", g("Tanh", g("Div", x, cap)), cap)
    g("Identity", x, outputs=["logits"])
    return g


# -----------------------------------------------------------------------------
# The file.


def to_onnx(model):
    """The onnx.ModelProto of a model that writes text."""
    c, g, h = model.config, build(model), onnx.helper
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

    def caches(name, length):
        shape = ("batch", c.n_kv_head, length, c.head_size)
        return [h.make_tensor_value_info(f"{name}.{i}.{part}", float32, shape)
                for i in range(c.n_layer) for part in ("key", "value")]

    ids = h.make_tensor_value_info("input_ids", int64, ("batch", "tokens"))
    logits = h.make_tensor_value_info("logits", float32, ("batch", "tokens", c.vocab_size))
    constants = [onnx.numpy_helper.from_array(w.contiguous().numpy(), name)
                 for name, w, _ in g.constants.values()]
    graph = h.make_graph(g.nodes, "GPT", [ids, *caches("past", "past")],
                         [logits, *caches("present", "total")], constants)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", OPSET)])


def export_onnx(run, out=""):
    """Write model.onnx, its weights in model.onnx.data, and the tokenizer of a run -> the Path of
    their folder."""
    if onnx is None:
        raise ValueError("an onnx file is written by the package onnx: pip install onnx")
    with whole_folder(out := Path(out or f"{Path(run)}-onnx")) as part:
        model, tokenizer = load_plain(run)
        to_huggingface(tokenizer, part, model_max_length=model.config.block_size)
        onnx.save_model(to_onnx(model), part / "model.onnx", save_as_external_data=True,
                        location="model.onnx.data")
    return out
