import json

from safetensors.torch import load_file

import lorafit
from little_run import write_rows
from lorafit.backbone.base_checkpoint import Checkpoint
from published_bases import publish
from tiny_models import save_small, save_tokenizer


def test_a_run_over_mxfp4_is_merged_onto_the_dequantised_base(tmp_path):
    base, rows = tmp_path / "base", write_rows(tmp_path / "rows.jsonl")
    save_small(base, "gpt_oss")
    save_tokenizer(base)
    publish(base, "mxfp4")
    settings = {"base": str(base), "quantization": "none", "max_steps": 1, "lr": 0.02, "holdout": 0.4}
    planned = lorafit.plan(rows, **settings).plan
    assert any("published in MXFP4" in note for note in planned.shape.notes)
    lorafit.train(rows, out=tmp_path / "run", **settings)
    merged = lorafit.merge(tmp_path / "run")
    assert merged.passed and merged.report.onto == "original"
    config = json.loads((merged.folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert "published in MXFP4, dequantized" in (merged.folder / "README.md").read_text()
    stored, written = Checkpoint.open(base), load_file(merged.folder / "model.safetensors")
    assert stored.published == "mxfp4" and stored.names() == set(written)
    same = {name for name, value in written.items() if value.equal(stored.read(name))}
    assert set(written) - same == {name for name in written if name.endswith(("q_proj.weight", "v_proj.weight"))}
