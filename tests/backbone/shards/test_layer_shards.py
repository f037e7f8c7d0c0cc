"""A base read into shards is the base, layer by layer and bit by bit."""

import hashlib

import pytest
import torch
from torch import distributed as dist

from lorafit.backbone import load_backbone, load_sharded, require_unchanged, shard_layers, shards_of
from lorafit.backbone.shards.layer_shards import _digest
from lorafit.config import RunConfig
from lorafit.errors import BackboneError, TrainingError
from lorafit.methods import METHODS
from tiny_models import save_base, some_ids

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def gradients(base, config):
    model = METHODS["lora"].prepare(base, config).train()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.1)
    model(some_ids(), labels=some_ids()).loss.backward()
    return torch.cat([weight.grad.flatten() for weight in METHODS["lora"].trainable(model)])


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "qwen2"])
def test_a_base_that_is_read_into_shards_has_the_answers_and_gradients_of_a_whole_one(tmp_path, family, quantization):
    """Five layers share two buffers. Gemma has a vision tower, computed buffers and two kinds of attention."""
    config = RunConfig(base=str(save_base(tmp_path, family, num_hidden_layers=5)), quantization=quantization, dropout=0)
    whole, shared = load_backbone(config, device="cpu", dense_budget_bytes=0), load_sharded(config, CPU)
    with torch.no_grad():
        assert torch.equal(whole(some_ids()).logits, shared(some_ids()).logits)
    assert torch.equal(gradients(whole, config), gradients(shared, config))
    require_unchanged(shared)


def test_the_packed_bytes_are_those_of_the_whole_base_and_a_changed_one_is_found(tmp_path):
    config = RunConfig(base=str(save_base(tmp_path, num_hidden_layers=3)), quantization="nf4")
    whole = load_backbone(config, device="cpu", dense_budget_bytes=0)
    known = [hashes(layer) for layer in whole.model.layers]
    shared = shard_layers(whole, CPU)
    for layer, digests in zip(shared.model.layers, known, strict=True):
        shards_of(shared).before(layer)
        assert hashes(layer) == digests and len(digests) > 15
    shards_of(shared).shards[1][300] += 1
    with pytest.raises(TrainingError, match="the frozen weights of layer 1 have changed in process 0"):
        require_unchanged(shared)


def hashes(layer):
    tensors = [*layer.parameters()]
    for weight in layer.parameters():
        state = getattr(weight, "quant_state", None)
        tensors += [] if state is None else [state.absmax, state.state2.absmax]
    return [
        hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for tensor in tensors
    ]


def test_packed_experts_and_a_missing_tensor_are_refused(tmp_path):
    config = RunConfig(base=str(save_base(tmp_path, "qwen3_moe")), quantization="nf4")
    with pytest.raises(BackboneError, match="a base with packed experts is not sharded"):
        load_sharded(config, CPU)


def test_no_change_of_a_word_or_two_escapes_the_hash_of_a_shard():
    """Sums weighted by place miss two changed top bits, and two words that change places miss a plain one."""
    words = torch.arange(4096, dtype=torch.int64) % 7
    whole = _digest(words.view(torch.uint8))
    top, swapped, single = words.clone(), words.clone(), words.clone()
    top[[5, 900]] ^= -(2**63)
    swapped[[1, 2]] = words[[2, 1]]
    single[17] ^= 1
    assert _digest(words.clone().view(torch.uint8)) == whole
    assert len({whole, *(_digest(one.view(torch.uint8)) for one in (top, swapped, single))}) == 4
