"""Embeddings on the host answer as they did, and their bytes leave the GPU."""

import os

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lorafit.backbone import load_backbone
from lorafit.config import resolve
from lorafit.engine import collate, generate, packed, summed_loss
from lorafit.engine.layers.host_embeddings import HostEmbedding, gathered, keep_embeddings_on_host
from lorafit.engine.loss.kernel import HAS_TRITON
from lorafit.methods.lora import attach, save_adapter
from tiny_models import VOCABULARY, save_base, some_ids, stir

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(family, **overrides):
        name = "-".join([family, *overrides])
        if name not in made:
            made[name] = str(save_base(tmp_path_factory.mktemp(name), family, **overrides))
        return made[name]

    return base


def config_of(base, **flags):
    return resolve(flags={"base": base, "targets": "all-linear", "dropout": 0.0, **flags}).config


def adapted(config):
    model = attach(load_backbone(config), config)
    stir(model)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "mixtral", "gemma3_text", "gemma2"])
def test_the_logits_are_the_same_bit_for_bit(bases, family):
    """Gemma's families scale what they look up, in their own forward; untied here, so that they may move."""
    model = load_backbone(config_of(bases(family, tie_word_embeddings=False)))
    ids = some_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        kind = type(model.get_input_embeddings()).__name__
        assert keep_embeddings_on_host(model)
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, HostEmbedding) and isinstance(embedding, nn.Embedding)
        assert type(embedding).__name__ == (kind if "Scaled" in kind else "HostEmbedding")
        assert torch.equal(model(input_ids=ids).logits, before)


def test_the_table_is_no_parameter_and_does_not_follow_the_model(bases):
    model = load_backbone(config_of(bases("llama")))
    assert keep_embeddings_on_host(model)
    table = model.get_input_embeddings().weight
    assert all(parameter is not table for parameter in model.parameters())
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    model.get_input_embeddings().to("meta")
    assert model.get_input_embeddings().weight.device.type == "cpu"
    assert keep_embeddings_on_host(model)  # again: already there
    assert model.get_input_embeddings().weight is table


def test_embeddings_that_must_stay_stay(bases):
    tied = load_backbone(config_of(bases("llama-tied")))
    assert not keep_embeddings_on_host(tied)
    trained = load_backbone(config_of(bases("llama")))
    trained.get_input_embeddings().requires_grad_(True)
    assert not keep_embeddings_on_host(trained)
    adapted = peft.get_peft_model(
        load_backbone(config_of(bases("llama"))), peft.LoraConfig(target_modules=["embed_tokens", "q_proj"])
    )
    assert not keep_embeddings_on_host(adapted)
    for special in (nn.Embedding(8, 4, max_norm=1.0), type("OddEmbedding", (nn.Embedding,), {})(8, 4)):
        odd = load_backbone(config_of(bases("llama")))
        odd.set_input_embeddings(special.requires_grad_(False))
        assert not keep_embeddings_on_host(odd)
        assert type(odd.get_input_embeddings()) is type(special)
        assert not isinstance(odd.get_input_embeddings(), HostEmbedding)


def rows_of(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [(random.integers(4, 250, length).astype(np.int32), np.arange(length) >= length // 2) for length in lengths]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_training_generation_saving_and_merging_go_on_as_before(bases, tmp_path, quantization):
    config = config_of(bases("llama"), quantization=quantization)
    outcomes = []
    for on_host in (False, True):
        model = adapted(config)
        assert not on_host or keep_embeddings_on_host(model)
        with packed(model):
            loss = summed_loss(model, collate(rows_of(12, 9)))
            loss.backward()
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])
        answers = generate(model, [[5, 6, 7], [8, 9]], [2], max_new_tokens=5)
        folder = tmp_path / f"{on_host}"
        save_adapter(model, folder / "adapter", config, base_name=config.base)
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / "merged")
        outcomes.append((loss.detach(), gradient, answers, merged.state_dict(), folder))
    (loss, gradient, answers, state, plain), (host_loss, host_gradient, host_answers, host_state, host) = outcomes
    assert torch.equal(loss, host_loss) and torch.equal(gradient, host_gradient)
    assert answers == host_answers
    assert state.keys() == host_state.keys()
    assert all(torch.equal(state[name], host_state[name]) for name in state)
    again = AutoModelForCausalLM.from_pretrained(host / "merged")
    assert torch.equal(again.get_input_embeddings().weight, state["model.embed_tokens.weight"])
    files = ("adapter_model.safetensors", "adapter_config.json")
    assert all((plain / "adapter" / name).read_bytes() == (host / "adapter" / name).read_bytes() for name in files)


def test_a_state_dict_goes_in_as_it_came_out(bases):
    model, other = (load_backbone(config_of(bases("llama"), quantization="none")) for _ in range(2))
    assert keep_embeddings_on_host(model)
    table = model.get_input_embeddings().weight
    state = {name: value.clone() for name, value in model.state_dict().items()}
    table.zero_()
    model.load_state_dict(state, strict=True)
    assert model.get_input_embeddings().weight is table
    assert torch.equal(table, other.get_input_embeddings().weight)
    other.load_state_dict(state, strict=True)


@pytest.mark.skipif(not HAS_TRITON or not INTERPRETED, reason="needs triton, and TRITON_INTERPRET=1")
@pytest.mark.parametrize("width", [64, 100, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_interpreted_reads_the_right_rows(width, dtype):
    table = torch.randn(50, width).to(dtype)
    ids = torch.tensor([[0, 49, 7], [7, 1, 48]])
    assert torch.equal(gathered(table, ids), table[ids])
    outside = gathered(table, torch.tensor([-1, 50, 3]))
    assert outside[:2].isnan().all() and torch.equal(outside[2], table[3])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_rows_are_the_tables_and_the_host_is_not_waited_for(dtype):
    table = torch.randn(20_000, 2048).to(dtype).pin_memory()
    embedding = nn.Embedding(20_000, 2048, _weight=table).requires_grad_(False)
    ids = torch.randint(0, 20_000, (1, 4096), device="cuda")
    model = nn.Module()
    model.get_input_embeddings, model.get_output_embeddings = lambda: embedding, lambda: None
    assert keep_embeddings_on_host(model)
    embedding(ids)  # compiled here
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = embedding(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(rows.cpu(), table[ids.cpu()])


@pytest.mark.gpu
def test_the_gpus_memory_falls_by_the_table(bases):
    model = load_backbone(config_of(bases("llama", vocab_size=200_000)), device="cuda")
    size = model.get_input_embeddings().weight.numel() * 2
    before = torch.cuda.memory_allocated()
    assert keep_embeddings_on_host(model)
    assert before - torch.cuda.memory_allocated() >= size
    model.to("cuda")
    assert before - torch.cuda.memory_allocated() >= size
    assert torch.isfinite(model(input_ids=some_ids().to("cuda")).logits).all() and VOCABULARY < 200_000
