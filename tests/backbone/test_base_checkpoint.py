import shutil

import pytest
import torch
from safetensors.torch import save_file

from lorafit.backbone import base_checkpoint as checkpoint
from lorafit.backbone import base_fingerprint
from lorafit.backbone.base_checkpoint import Checkpoint
from tiny_models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "llama")


def test_a_copy_has_the_same_fingerprint_and_other_files_do_not_count(base, tmp_path):
    twin = shutil.copytree(base, tmp_path / "elsewhere")
    (twin / "README.md").write_text("hello")
    assert base_fingerprint(twin) == base_fingerprint(base)


@pytest.mark.parametrize("whole_file_bytes", [1 << 30, 1000])
def test_another_config_or_another_weight_has_another_fingerprint(base, tmp_path, monkeypatch, whole_file_bytes):
    monkeypatch.setattr(checkpoint, "WHOLE_FILE_BYTES", whole_file_bytes)
    monkeypatch.setattr(checkpoint, "SAMPLE_BYTES", 100)
    first = base_fingerprint(base)
    twin = shutil.copytree(base, tmp_path / "a")
    (twin / "config.json").write_text((twin / "config.json").read_text() + " ")
    assert base_fingerprint(twin) != first
    twin = shutil.copytree(base, tmp_path / "b")
    shard = sorted(twin.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert base_fingerprint(twin) != first


def test_samples_reach_from_the_first_byte_to_the_last_and_never_past_it():
    size = checkpoint.WHOLE_FILE_BYTES + 12345
    samples = checkpoint._samples(size)
    assert samples[0][0] == 0 and sum(samples[-1]) == size
    assert len(samples) == checkpoint.SAMPLES
    assert checkpoint._samples(10) == [(0, 10)]


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ((torch.bfloat16,), "BF16"),
        ((torch.float16, torch.int64), "F16"),
        ((torch.bfloat16, torch.float32), "F32"),
        ((torch.bfloat16, torch.float16), "F32"),
        ((torch.float64,), "F32"),
    ],
)
def test_the_widest_dtype_holds_every_stored_number(tmp_path, dtypes, widest):
    save_file({str(i): torch.ones(3, dtype=dtype) for i, dtype in enumerate(dtypes)}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).widest_float() == widest
