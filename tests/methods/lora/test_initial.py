"""PiSSA, OLoRA and LoftQ: PEFT's factors and gradients over a base that stays as it is, in files that say the same."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from little_trainer import assert_same, trainer
from lorafit.backbone import load_backbone
from lorafit.config import RunConfig
from lorafit.errors import AdapterError, UsageError
from lorafit.hardware import hardware_named
from lorafit.memory.footprint import static_memory
from lorafit.memory.inputs import DataStats, PlanInputs
from lorafit.methods import METHODS
from lorafit.methods.lora import INITIAL_FILE, Deltas, attach, count_parameters
from lorafit.methods.lora.initial.factors import principal
from lorafit.methods.lora.initial.principal import begin_with_product, principal_layers
from lorafit.shapes import ModelShape
from stirred import plain_model, stirred
from tiny_models import save_base, some_ids

LORA = METHODS["lora"]


def settings(base, init, **given):
    return RunConfig(
        **{"base": str(base), "init_lora_weights": init, "dropout": 0.0, "rank": 4, "alpha": 12.0, **given}
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), "qwen2")  # with biases


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=some_ids(), labels=some_ids()).loss
    loss.backward()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return loss.detach(), {name: weight.grad.clone() for name, weight in weights.items()}


def answers(model):
    with torch.no_grad():
        return model.eval()(some_ids()).logits


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_loss_and_gradients_are_pefts(base, init):
    config = settings(base, init, quantization="none", targets="all-linear")
    ours = attach(load_backbone(config), config)
    names = next(iter(ours.peft_config.values())).target_modules
    same = LoraConfig(r=4, lora_alpha=12.0, init_lora_weights=init, target_modules=names)
    theirs = get_peft_model(load_backbone(config), same)
    for path, layer in principal_layers(ours, "default"):
        other = theirs.get_submodule(path)
        a, b = other.lora_A["default"].weight.detach(), other.lora_B["default"].weight.detach()
        left = layer.get_base_layer().weight - 3.0 * layer.initial_b @ layer.initial_a
        assert 0.999 < left.norm() / other.get_base_layer().weight.norm() < 1.005  # PEFT's base is what is left
        begin_with_product(layer, "default", a.clone(), b.clone())  # a decomposition's signs are free
    stirred(ours), stirred(theirs)
    (found, gradients), (wanted, reference) = loss_and_gradients(ours), loss_and_gradients(theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_randomized_svd_finds_the_largest_components():
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))  # the hardest: no value stands out
    a, b = principal(weight, 16, scale=3.0, seed=0)
    exact = torch.linalg.svdvals(weight)[:16].square().sum()
    assert (weight - 3.0 * b @ a).square().sum() < weight.square().sum() - 0.995 * exact
    again = principal(weight, 16, scale=3.0, seed=0)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_fresh_product_changes_nothing_and_the_plan_counts_it(base, init):
    config = settings(base, init)
    model = attach(load_backbone(config), config)
    tuned = answers(model)
    with LORA.without(model):
        assert torch.equal(tuned, answers(model))
    shape = ModelShape.from_config(load_backbone(config).config.to_dict(), "it")
    inputs = PlanInputs(config, DataStats(1, 1, 1, 1, 1.0), shape, hardware_named("4090"))
    trains = count_parameters(model).trainable
    assert trains == inputs.adapter_parameters == inputs.initial_parameters
    (product,) = [part for part in static_memory(inputs) if part.name == "initial products"]
    held = sum(layer.initial_a.nbytes + layer.initial_b.nbytes for _, layer in principal_layers(model, "default"))
    assert product.size_bytes == held
    plain = inputs.with_settings(init_lora_weights="default")
    snapshot = LORA.snapshot(model, config)
    assert inputs.checkpoint_bytes - plain.checkpoint_bytes == snapshot.size_bytes - 4 * trains


def test_loftq_begins_nearer_to_the_original(base):
    config = settings(base, "loftq", rank=16, targets="all-linear")
    model = attach(load_backbone(config), config)
    original = answers(load_backbone(config.model_copy(update={"quantization": "none"}))).log_softmax(-1)
    started = torch.nn.functional.kl_div(answers(model).log_softmax(-1), original, log_target=True, reduction="sum")
    with LORA.without(model):
        packed = torch.nn.functional.kl_div(answers(model).log_softmax(-1), original, log_target=True, reduction="sum")
    assert started < 0.8 * packed


@pytest.mark.parametrize(("init", "quantization"), [("pissa", "nf4"), ("loftq", "nf4"), ("olora", "none")])
def test_the_merge_and_plain_peft_are_the_live_model(base, tmp_path, init, quantization):
    config = settings(base, init, quantization=quantization, rslora=True)
    live = stirred(attach(load_backbone(config), config))
    wanted, folder = answers(live), tmp_path / "adapter"
    LORA.save(live, folder, config)
    again = LORA.load(load_backbone(config), folder, config)
    torch.testing.assert_close(answers(again), wanted, rtol=1e-4, atol=1e-5)
    theirs = PeftModel.from_pretrained(plain_model(config), folder)
    torch.testing.assert_close(answers(theirs), wanted, rtol=1e-4, atol=1e-4)
    merged, deltas = plain_model(config), Deltas.from_folder(folder)
    for name, weight in merged.named_parameters():
        weight.data.copy_(deltas.merged(name, weight.data))
    torch.testing.assert_close(answers(merged), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answers(live.merge_and_unload()), wanted, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_ends_in_the_same_bits_and_wants_its_initial_product(base, tmp_path):
    given = {"init_lora_weights": "pissa", "max_steps": 4, "lr": 2e-3}
    whole = trainer(str(base), tmp_path / "whole", **given)
    whole.run()
    again = trainer(str(base), tmp_path / "again", **{**given, "seed": 0})
    for _, layer in principal_layers(again.model, "default"):
        layer.initial_a.mul_(-1), layer.initial_b.mul_(-1)  # as another GPU's decomposition may have it
    again.run(tmp_path / "whole" / "step-000002")
    assert_same(whole, again)
    adapter = tmp_path / "whole" / "step-000002" / "adapter"
    tensors = load_file(adapter / INITIAL_FILE)
    save_file({name: tensor[:1] for name, tensor in tensors.items()}, adapter / INITIAL_FILE)
    with pytest.raises(AdapterError, match="shape does not fit"):
        LORA.restore(again.model, adapter)
    (adapter / INITIAL_FILE).unlink()
    with pytest.raises(AdapterError, match="missing or unreadable; resume from another checkpoint"):
        LORA.restore(again.model, adapter)


def test_a_target_compiles_in_one_graph(base):
    config = settings(base, "pissa")
    model = stirred(attach(load_backbone(config, dense_budget_bytes=0), config)).train()
    (_, layer), *_ = principal_layers(model, "default")
    x = torch.randn(1, 7, layer.in_features)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_what_cannot_be_is_refused(base):
    for given, words in (
        ({"dora": True}, "init_lora_weights is pissa, and dora is true"),
        ({"rank": 768}, "stored with twice the rank, and adapters load with at most 1024; set rank to 512 or less"),
    ):
        with pytest.raises(UsageError, match=words):
            settings(base, "pissa", **given)
    with pytest.raises(UsageError, match="quantization is none; set quantization: nf4, or init_lora_weights: pissa"):
        settings(base, "loftq", quantization="none")
    config = settings(base, "olora", rank=500)
    with pytest.raises(AdapterError, match=r"has only .* components for rank 500"):
        attach(load_backbone(config), config)
