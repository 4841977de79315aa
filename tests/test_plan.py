"""What a model costs: parameters, FLOPs and bytes in model.py, and chapters/plan.py's sums."""

import pytest
import torch
from conftest import tiny
from torch.utils.flop_counter import FlopCounterMode

from model import (ARCHITECTURES, GPT, SIZES, GPTConfig, Linear, allowed, free_memory,
                   saved_by_block, training_memory)


def meta(**options):
    """A model of any size that takes no memory."""
    with torch.device("meta"):
        return GPT(GPTConfig(**options))


def loss_of(model, ids):
    memory = model.encode(ids) if model.config.cross else None
    return model(ids, ids, memory=memory)[1]


# -----------------------------------------------------------------------------
# Parameters and FLOPs.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_of_a_model_add_up_to_it(architecture):
    model = tiny(architecture)
    parts = model.parameters_by_part()
    assert sum(parts.values()) == model.n_parameters()
    assert ("head" in parts) is not model.config.tied
    assert ("cross-attention" in parts) is model.config.cross


def in_products(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))


def hidden(c, T, causal):
    """How many of T keys a query does not see, on average."""
    seen = allowed(T, T, slice(0, T), slice(0, T), "cpu", causal, c.window, None, None)
    return 0 if seen is None else T - seen.sum().item() / T


@pytest.mark.parametrize("architecture, options", [
    ("gpt2", {}), ("modern", {}), ("modern", dict(n_kv_head=1)), ("modern", dict(window=5)),
    ("bert", {}), ("bert", dict(window=3)), ("transformer", {}),
    ("transformer", dict(n_encoder_layer=1))])
def test_flops_of_a_step_are_those_that_torch_counts(architecture, options):
    model, T = tiny(architecture, **options), 16
    model.use("plain")
    with FlopCounterMode(display=False) as counter:
        loss_of(model, torch.zeros(1, T, dtype=torch.long)).backward()
    c, keys = model.config, counter.get_total_flops() / T - 6 * in_products(model)
    unseen = c.n_layer * hidden(c, T, c.causal) + c.n_encoder_layer * hidden(c, T, causal=False)
    n_looks = c.n_layer * (1 + c.cross) + c.n_encoder_layer
    keys = keys / (12 * c.n_embd) - unseen  # plain attention makes all scores
    planned = (model.flops_per_token(T) - 6 * in_products(model)) / (12 * c.n_embd)
    assert planned == pytest.approx(keys, abs=n_looks / 2)


def test_a_wide_window_changes_no_flops():
    assert tiny(window=16).flops_per_token() == tiny().flops_per_token()


# -----------------------------------------------------------------------------
# Memory.


def saved_bytes(model, ids):
    """What the blocks and the last norm save for backward, each storage once, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, alive = {}, []

    def note(x):
        alive.append(x)  # else its address could be given to another
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        memory = model.encode(ids) if model.config.cross else None
        model.transformer(ids, None, model.dtype, memory)
    return sum(n for address, n in found.items() if address not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["plain", "fused", "torch"])
@pytest.mark.parametrize("options", [
    dict(architecture="modern"), dict(architecture="modern", dropout=0.1, activation="relu2"),
    dict(architecture="gpt2"), dict(architecture="gpt2", dropout=0.1),
    dict(architecture="bert", activation="relu")], ids=lambda options: options["architecture"])
def test_what_blocks_save_is_what_autograd_keeps(options, kernels, dtype):
    B, shape = 4, dict(vocab_size=64, block_size=128, n_layer=4, n_head=4, n_embd=128)
    model = GPT(GPTConfig(**shape | options)).train()
    model.use(kernels, None if dtype == torch.float32 else dtype)
    a_token = 4 * saved_by_block(model.transformer.blocks[0], model.config, dtype, "cpu")
    total = B * 128 * (a_token + 2 * 128 * dtype.itemsize)
    if dtype != torch.float32:  # weights cast to it; the fused bend casts its own twice instead
        total += 2 * sum(w.numel() for name, w in model.transformer.blocks.named_parameters()
                         if w.dim() == 2 and (kernels == "plain" or "down" not in name))
    assert saved_bytes(model, torch.randint(64, (B, 128))) == pytest.approx(total, rel=0.12)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_an_optimizer_keeps_is_foretold(optimizer, tmp_path):
    from train import TrainConfig, new_run, take_step
    model = tiny().train()
    run = new_run(tmp_path, model, TrainConfig(optimizer=optimizer), "cpu")
    ids = torch.zeros(2, 16, dtype=torch.long)
    take_step(run, model, [ids], [ids], 1.0)
    kept = sum(4 * x.numel() for state in run.optimizer.state.values() for x in state.values()
               if x.dim())
    assert training_memory(model, 2, optimizer)["optimizer"] == kept


def test_recompute_and_half_precision_keep_less():
    model = meta(vocab_size=4096, **SIZES["base"])
    model.use("fused")
    full = sum(training_memory(model, 8, device="cuda").values())
    model.use("fused", recompute=True)
    again = sum(training_memory(model, 8, device="cuda").values())
    model.use("fused", torch.bfloat16)
    half = sum(training_memory(model, 8, device="cuda").values())
    assert again < half < full


def test_this_machine_has_some_memory_left():
    assert free_memory() is None or free_memory() > 2**20
