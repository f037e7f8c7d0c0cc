import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafit.errors import VerificationError
from lorafit.export import format_named, merge
from lorafit.export import verify as verify_export
from lorafit.export.verify.comparison import Comparison
from lorafit.export.verify.verification import _judge_routed
from lorafit.methods import METHODS


def verify(live, folder, rows, onto, **given):
    form = format_named("safetensors")
    return verify_export(live, folder, rows, onto, method=METHODS["lora"], export_format=form, **given)


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    return merge(trained.path, out=tmp_path_factory.mktemp("merged") / "out").folder


def damaged(folder, copy_to, change):
    """A copy of the artefact with `change(tensors)` applied."""
    import shutil

    copy = shutil.copytree(folder, copy_to)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_faithful_merge_passes_near_the_floor_and_far_from_the_base(trained, merged, rows):
    result = verify(trained.live, merged, rows, "quantized")
    assert result.passed, result.reason
    assert result.floor.kl > 0 and result.floors < 5
    assert result.base.kl > 10 * result.merged.kl
    assert result.merged.top1_agreement > 0.9
    assert abs(result.merged.loss - result.live_loss) < 0.02
    assert result.rows == len(rows) and result.positions == sum(mask.sum() for _, mask in rows)
    assert (result.live_dtype, result.merged_dtype) == ("float32", "bfloat16")


def test_what_is_measured_is_kl_agreement_and_loss_of_the_supervised_tokens(trained, merged, rows):
    from transformers import AutoModelForCausalLM

    result = verify(trained.live, merged, rows, "quantized")
    artefact = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)  # as it will be served
    kl, agree, loss, live_loss = [], [], [], []
    with torch.no_grad():
        for ids, mask in rows:
            batch = torch.tensor(ids[None].astype(np.int64))
            for i in np.flatnonzero(mask):
                p = trained.live(batch).logits[0, i - 1].double().log_softmax(-1)
                q = artefact(batch).logits[0, i - 1].double().log_softmax(-1)
                kl.append(float((p.exp() * (p - q)).sum()))
                agree.append(bool(p.argmax() == q.argmax()))
                loss.append(-float(q[ids[i]]))
                live_loss.append(-float(p[ids[i]]))
    assert result.merged.kl == pytest.approx(np.mean(kl), rel=0.3)  # rounded, and really in bf16
    assert result.merged.top1_agreement == pytest.approx(np.mean(agree), abs=0.05)
    assert result.merged.loss == pytest.approx(np.mean(loss), rel=1e-3)
    assert result.live_loss == pytest.approx(np.mean(live_loss), rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({k: v * 1.1 for k, v in t.items() if "o_proj" in k}),
        lambda t: t.update({k: v.roll(1, 0) for k, v in t.items() if "layers.0.self_attn.q_proj" in k}),
        lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items() if "layers.1.self_attn.v_proj" in k}),
    ],
    ids=["scaled", "shifted", "lost"],
)
def test_a_damaged_artefact_fails(trained, merged, rows, tmp_path, change):
    result = verify(trained.live, damaged(merged, tmp_path / "bad", change), rows, "quantized")
    assert not result.passed and result.floors > 10
    assert "above" in result.reason


def test_the_base_without_the_delta_fails_and_so_does_a_double_delta(trained, merged, rows, tmp_path):
    from lorafit.methods.lora import Deltas

    deltas = Deltas.from_folder(trained.run.adapter)
    for sign in (-1, 1):

        def change(tensors, sign=sign):
            for name, delta in deltas.items():
                tensors[name] = (tensors[name].float() + sign * delta.dense()).to(torch.bfloat16)

        result = verify(trained.live, damaged(merged, tmp_path / f"bad{sign}", change), rows, "quantized")
        assert not result.passed


def test_merging_by_requantising_as_peft_does_fails(trained, merged, rows, tmp_path):
    from lorafit.backbone import dequantize, quantize

    def change(tensors):
        for name, tensor in tensors.items():
            if "_proj" in name:
                tensors[name] = dequantize(quantize(tensor.float())).to(torch.bfloat16)

    result = verify(trained.live, damaged(merged, tmp_path / "peft", change), rows, "quantized")
    assert not result.passed


def test_nan_in_the_artefact_fails_whatever_it_was_merged_onto(trained, merged, rows, tmp_path):
    bad = damaged(merged, tmp_path / "nan", lambda t: t["model.norm.weight"].fill_(float("nan")))
    for onto in ("quantized", "original"):
        result = verify(trained.live, bad, rows, onto)
        assert not result.passed and "not finite" in result.reason
        json.loads((bad / "verification.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_the_original_is_reported_and_gated_only_grossly(trained, rows, tmp_path):
    folder = merge(trained.path, onto="original", out=tmp_path / "out").folder
    result = verify(trained.live, folder, rows, "original")
    assert result.passed and result.onto == "original"
    strict = verify(trained.live, folder, rows, "quantized")
    assert not strict.passed  # the 4-bit error is far above the floor, so the two artefacts cannot be confused
    worse = damaged(folder, tmp_path / "bad", lambda t: t.update({k: v * 4 for k, v in t.items() if "lm_head" in k}))
    assert not verify(trained.live, worse, rows, "original").passed


def test_a_merge_onto_the_original_is_the_adapter_over_the_stored_weights(trained, rows, tmp_path):
    folder = merge(trained.path, onto="original", out=tmp_path / "out").folder
    base = Path(trained.config.base)
    result = verify(trained.live, folder, rows, "original", original=base)
    assert result.passed and "to the adapter over the base as stored" in result.reason
    assert result.exact.kl < 5 * result.exact_floor.kl < result.merged.kl / 10  # the live model is another model
    stored = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}

    def lose_one_update(tensors):
        name = "model.layers.1.self_attn.v_proj.weight"
        assert not torch.equal(tensors[name], stored[name])
        tensors[name] = stored[name]

    lacking = damaged(folder, tmp_path / "lacking", lose_one_update)
    assert verify(trained.live, lacking, rows, "original").passed  # near enough to the live model
    assert not verify(trained.live, lacking, rows, "original", original=base).passed
    quantized = merge(trained.path, onto="quantized", out=tmp_path / "quantized").folder
    assert not verify(trained.live, quantized, rows, "original", original=base).passed


def test_verification_json_holds_the_result_and_nothing_is_left_beside_it(trained, merged, rows):
    before = {path.name for path in merged.iterdir()} | {"verification.json"}
    result = verify(trained.live, merged, rows, "quantized")
    saved = json.loads((merged / "verification.json").read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    assert saved["passed"] is True and saved["merged"]["kl"] == result.merged.kl
    assert {path.name for path in merged.iterdir()} == before


def test_the_live_model_is_as_it_was_afterwards(trained, merged, rows):
    from tiny_models import some_ids

    trained.live.train()
    before = {name: parameter.clone() for name, parameter in trained.live.named_parameters()}
    logits = trained.live(some_ids()).logits
    verify(trained.live, merged, rows, "quantized")
    assert trained.live.training
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained.live.named_parameters())
    assert torch.equal(trained.live(some_ids()).logits, logits)
    trained.live.eval()


@pytest.mark.parametrize(("compute", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_live_models_in_16_bits_pass_too(make_run, rows, tmp_path, compute, dtype):
    run = make_run(tmp_path, compute=compute)
    result = verify(run.live, merge(run.path).folder, rows, "quantized")
    assert result.passed and result.floors < 5, result.reason
    assert (result.live_dtype, result.merged_dtype) == (dtype, "bfloat16")
    assert result.floor.kl > 0


def test_an_unquantised_run_passes_too(make_run, rows, tmp_path):
    run = make_run(tmp_path, quantization="none")
    report = merge(run.path)
    result = verify(run.live, report.folder, rows, report.onto)
    assert result.passed and result.floors < 5


def test_rows_that_supervise_nothing_are_left_out_and_none_at_all_is_an_error(trained, merged, rows):
    silent = (rows[0][0], np.zeros(len(rows[0][0]), bool))
    first_only = (rows[0][0], np.arange(len(rows[0][0])) == 0)
    assert verify(trained.live, merged, [silent, *rows, first_only], "quantized").rows == len(rows)
    with pytest.raises(VerificationError, match="no held-out row"):
        verify(trained.live, merged, [silent, first_only], "quantized")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compute", ["auto", "fp16", "fp32"])
def test_a_run_on_a_gpu_is_merged_and_verified_there(make_run, rows, tmp_path, compute):
    run = make_run(tmp_path, compute=compute)
    result = verify(run.live, merge(run.path).folder, rows, "quantized")
    assert result.passed and result.floors < 10, result.reason


def test_a_mixture_may_have_a_few_rows_beyond_the_floor_but_not_most():
    floor, base = Comparison(1e-6, 1.0, 2.0, 1e-6), Comparison(0.2, 0.4, 3.0, 0.2)
    passed, reason = _judge_routed(Comparison(2e-3, 1.0, 2.0, 5e-6), floor, base)  # one row went to another expert
    assert passed and "in the median row is within 10 ×" in reason and "mean KL 2.0e-03" in reason
    assert _judge_routed(Comparison(2e-3, 1.0, 2.0, 2e-3), floor, base) is None
    assert _judge_routed(Comparison(2e-2, 1.0, 2.0, 5e-6), floor, base) is None  # a tenth of the way to the base
    assert _judge_routed(Comparison(float("nan"), 0.0, 2.0, float("nan")), floor, base) is None
