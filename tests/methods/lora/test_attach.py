import json

import pytest
import torch

from families_zoo import small_config
from lorafit.backbone import load_backbone
from lorafit.backbone.architecture import auto_class
from lorafit.config import RunConfig, resolve
from lorafit.methods.lora import attach, count_parameters
from tiny_models import FAMILIES, save_base, save_small, some_ids, stir


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return RunConfig(base=str(save_base(tmp_path_factory.mktemp("base") / "llama")), dropout=0.0)


def adapter_weights(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def test_only_the_adapter_trains_and_it_is_in_fp32(config):
    model = attach(load_backbone(config.model_copy(update={"compute": "bf16"})), config)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(adapter_weights(model)) and len(trainable) == 8
    assert all(parameter.dtype == torch.float32 for parameter in adapter_weights(model).values())


def test_a_fresh_adapter_changes_no_answer(config):
    ids = some_ids()
    expected = load_backbone(config)(ids).logits
    assert torch.equal(attach(load_backbone(config), config)(ids).logits, expected)


def test_the_seed_decides_the_adapter_whatever_was_drawn_before_and_whatever_the_precision(config):
    first = adapter_weights(attach(load_backbone(config), config))
    torch.rand(7)
    state = torch.random.get_rng_state()
    again = adapter_weights(attach(load_backbone(config.model_copy(update={"compute": "bf16"})), config))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = adapter_weights(attach(load_backbone(config), config.model_copy(update={"seed": 1})))
    assert not torch.equal(*(weights[min(first)] for weights in (first, other)))


def test_a_is_drawn_as_peft_draws_it(config):
    a = torch.cat(
        [w.flatten() for name, w in adapter_weights(attach(load_backbone(config), config)).items() if "_A" in name]
    )
    bound = (1 / 64) ** 0.5  # kaiming uniform with a = sqrt(5) over 64 inputs
    assert a.abs().max() <= bound and abs(a.std() - bound / 3**0.5) < 0.05 * bound


def test_gradients_reach_every_adapter_weight_and_no_base_weight(config):
    model = attach(load_backbone(config), config).train()
    with torch.no_grad():
        for name, parameter in adapter_weights(model).items():
            if "lora_B" in name:
                parameter.fill_(0.01)
    ids = some_ids()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_the_gradient_is_that_of_peft_over_a_dense_base(config, tmp_path):
    from lorafit.backbone import fresh_weights

    ids = some_ids()
    ours = attach(load_backbone(config, dense_budget_bytes=0), config)
    dense = load_backbone(config.model_copy(update={"quantization": "none"}))
    dense.load_state_dict({weight.parameter: weight.tensor for weight in fresh_weights(config, "quantized")})
    theirs = attach(dense, config)
    for model in (ours, theirs):
        for name, parameter in adapter_weights(model).items():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        model(ids, labels=ids).loss.backward()
    for (name, a), b in zip(adapter_weights(ours).items(), adapter_weights(theirs).values()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_attaches_to_each_family_in_4_bits(tmp_path, family):
    config = RunConfig(
        base=str(save_base(tmp_path / "base", family)), targets="all-linear", rank=2, alpha=4.0, dropout=0
    )
    model = attach(load_backbone(config), config).train()
    ids = some_ids()
    model(ids, labels=ids).loss.backward()
    moved = [p for name, p in adapter_weights(model).items() if "lora_B" in name and p.grad.abs().sum() > 0]
    assert len(moved) == len(adapter_weights(model)) // 2


def test_explicit_names_win_over_the_settings(config):
    model = attach(load_backbone(config), config, ("gate_proj",))
    assert all("gate_proj" in name for name in adapter_weights(model))


def test_4_bit_parameters_count_at_their_true_number(config):
    dense = load_backbone(config.model_copy(update={"quantization": "none"}))
    total = sum(parameter.numel() for parameter in dense.parameters())
    model = attach(load_backbone(config), config)
    counts = count_parameters(model)
    # per layer q: 64 -> 64 and v: 64 -> 32, rank 16
    trainable = 2 * 16 * ((64 + 64) + (64 + 32))
    assert (counts.trainable, counts.total) == (trainable, total + trainable)
    assert counts.percent == pytest.approx(100 * trainable / (total + trainable))
    assert (counts.trainable, counts.total) == model.get_nb_trainable_parameters()


def test_rwkv_answers_with_the_weights_that_it_trains_with(tmp_path):
    base = save_small(tmp_path / "base", "rwkv")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_every": 1}))  # it would halve in each layer
    config = resolve(flags={"base": base, "targets": "all-linear", "dropout": 0.0}).config
    model = attach(load_backbone(config), config)
    stir(model)
    with torch.no_grad():
        training, answering, again = [
            model.train(trains)(some_ids(20), use_cache=False).logits for trains in (True, False, True)
        ]
    assert torch.equal(training, answering) and torch.equal(training, again)


def test_molmo_trains_on_text_alone_with_the_logits_of_evaluation(tmp_path):
    architecture = small_config("molmo2")
    auto_class(architecture).from_config(architecture).save_pretrained(tmp_path / "base")
    config = RunConfig(base=str(tmp_path / "base"), dropout=0.0)
    model = attach(load_backbone(config), config)
    training, answering = [model.train(trains)(some_ids(20)).logits for trains in (True, False)]
    assert torch.equal(training, answering) and model.train().training
