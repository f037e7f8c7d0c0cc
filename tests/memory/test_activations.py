"""The count of saved activations against what autograd saves in transformers' own layers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafit.memory.footprint import LOSS_CHUNK_BYTES, SCORES, Execution, Trained, activations
from lorafit.memory.inputs import MicroBatchSize
from lorafit.shapes import ModelShape
from planning_shapes import LLAMA_8B, shape
from tiny_models import tiny_config

TOKENS = 64
EAGER, FUSED = Execution(), Execution(fused=True)


def saved_bytes_per_layer(family, layers=(1, 4)):
    """Bytes that autograd keeps for each further layer of `family`, parameters aside, under bf16 autocast."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 32}
    totals = []
    for count in layers:
        config = tiny_config(family, num_hidden_layers=count, **sizes)
        config._attn_implementation = "sdpa"
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).requires_grad_(False).train()
        totals.append(_saved_bytes(model))
    return (totals[1] - totals[0]) / (layers[1] - layers[0]), ModelShape.from_config(config.to_dict(), family)


def _saved_bytes(model):
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    model.enable_input_require_grads()
    ids = torch.randint(0, 200, (1, TOKENS))
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saving, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.sum()
    return sum(size for size, _ in kept.values())


GATED = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "mixtral"]


@pytest.mark.parametrize(("family", "tolerance"), [*((name, 0.1) for name in GATED), ("gpt_neox", 0.3)])
def test_a_layer_keeps_what_autograd_keeps(family, tolerance):
    measured, model = saved_bytes_per_layer(family)
    counted = activations(model, Trained(), MicroBatchSize(TOKENS, 1, TOKENS), width=2, execution=EAGER).layer_bytes
    assert counted == pytest.approx(measured, rel=tolerance)


def test_the_fused_layer_is_what_the_design_counts():
    """8B, bf16, per token and layer: input 8 KB, q 8, k 2, v 2, attention output 8, residual 8, gate 28, up 28."""
    live = activations(shape(LLAMA_8B), Trained(), MicroBatchSize(1, 1, 1), width=2, execution=Execution(fused=True))
    assert live.layer_bytes == 92 * 1024
    assert live.feed_forward_bytes == 36 * 1024
    assert live.input_bytes == 8 * 1024


def test_a_fused_layer_keeps_the_inputs_of_every_norm():
    """Gemma 3 12B: norms before and after attention and MLP, and of queries and keys. 77.2 GiB measured."""
    sizes = {"hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_key_value_heads": 8}
    gemma = ModelShape.from_config({**LLAMA_8B, **sizes, "model_type": "gemma3_text", "head_dim": 256}, "gemma")
    live = activations(gemma, Trained(), MicroBatchSize(1, 1, 1), width=2, execution=FUSED)
    norms, attention, feed_forward = 4 * 3840 + 4096 + 2048, 2 * 4096 + 2 * 2048, 2 * 15360
    assert live.layer_bytes == 2 * (norms + attention + feed_forward)


def test_an_adapter_keeps_its_input_and_dropout_its_mask():
    def layer_bytes(targets, dropout):
        batch = MicroBatchSize(1, 1, 1)
        return activations(shape(), Trained(targets, int(dropout)), batch, width=2, execution=EAGER).layer_bytes

    plain = layer_bytes((), False)
    assert layer_bytes(("q_proj",), False) - plain == 2 * 4096
    assert layer_bytes(("q_proj",), True) - plain == 3 * 4096
    assert layer_bytes(("q_proj", "down_proj"), False) - plain == 2 * (4096 + 14336)


def test_capped_scores_are_kept_whole():
    def layer_bytes(longest):
        model = shape(attn_logit_softcapping=50.0)
        return activations(model, Trained(), MicroBatchSize(1024, 1, longest), width=2, execution=EAGER).layer_bytes

    assert layer_bytes(512) - layer_bytes(256) == 1024 * 32 * 256 * (2 + 2 + 4)


def test_compiled_layers_keep_no_capped_score_and_write_some_out_at_a_time():
    def live(longest, **changes):
        return activations(shape(**changes), Trained(), MicroBatchSize(8192, 1, longest), width=2, execution=FUSED)

    capped = {"attn_logit_softcapping": 50.0}
    assert live(2048, **capped).layer_bytes == live(2048).layer_bytes
    assert live(64, **capped).backward_bytes == live(64).backward_bytes  # no more than the feed-forward's gradients
    weight = live(64).weight_bytes
    assert live(2048, **capped).backward_bytes == 5 * 4 * SCORES + weight
    assert live(8192, **capped).backward_bytes == 5 * 4 * 4 * 8192**2 + weight  # one key head, four query heads


def test_compiled_layers_make_an_adapter_s_input_again_but_not_its_mask():
    def layer_bytes(targets, dropout):
        batch = MicroBatchSize(1, 1, 1)
        return activations(shape(), Trained(targets, int(dropout)), batch, width=2, execution=FUSED).layer_bytes

    none, every = (layer_bytes(targets, False) for targets in ((), ("q_proj", "o_proj", "down_proj")))
    assert none == every
    assert layer_bytes(("q_proj", "v_proj"), True) - none == 2 * 4096


@pytest.mark.parametrize("execution", [EAGER, FUSED])
@pytest.mark.parametrize("targets", [(), ("q_proj",), ("gate_proj", "up_proj", "down_proj")])
def test_the_more_is_recomputed_the_less_is_kept(execution, targets):
    live = activations(shape(), Trained(targets), MicroBatchSize(4096, 1, 512), width=2, execution=execution)
    assert live.input_bytes < live.feed_forward_bytes < live.layer_bytes / 2


@pytest.mark.parametrize(("loss", "rows"), [("all", 8192), ("supervised", 3000)])
def test_whole_logits_are_as_many_as_the_loss_holds_at_once(loss, rows):
    def loss_bytes(vocab):
        model = shape(vocab_size=vocab)
        execution = Execution(loss=loss)
        return activations(model, Trained(), MicroBatchSize(8192, 3000, 512), width=2, execution=execution).loss_bytes

    assert loss_bytes(2000) - loss_bytes(1000) == rows * 1000 * 12


@pytest.mark.parametrize(("supervised", "width", "chunk"), [
    (8192, 2, LOSS_CHUNK_BYTES), (100, 2, 100 * 128256 * 2), (8192, 4, 2 * LOSS_CHUNK_BYTES),
])  # fmt: skip
def test_logits_in_chunks_never_grow_beyond_one(supervised, width, chunk):
    live = activations(shape(), Trained(), MicroBatchSize(8192, supervised, 512), width=width, execution=FUSED)
    assert live.chunk_bytes == chunk
    assert live.loss_bytes == chunk + 8192 * 4096 * (width + 4)


def test_the_engine_s_chunks_are_the_plan_s():
    from lorafit.engine.loss.vocabulary import CHUNK_BYTES

    assert CHUNK_BYTES == LOSS_CHUNK_BYTES
