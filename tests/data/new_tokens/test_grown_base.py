"""A base grown by new tokens: its tokenizer, its rows, and the bases that cannot grow."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.backbone import base_fingerprint
from lorafit.data import TextTokenizer
from lorafit.data.new_tokens.grown_base import GrownBase
from lorafit.data.new_tokens.grown_weights import Growth, write_grown
from lorafit.errors import BackboneError, UsageError
from tiny_models import save_base

TEXTS = ("<tool>", "</tool>")


def stored(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def grown(base):
    made = GrownBase.of(str(base), None, TEXTS)
    made.add_weights()
    return made


def test_the_tokenizer_has_the_tokens_and_no_other_id_changes(base, grown):
    before, after = TextTokenizer.from_base(str(base)), TextTokenizer.from_base(str(grown.folder))
    theirs = AutoTokenizer.from_pretrained(grown.folder)
    assert grown.tokens == {"<tool>": 260, "</tool>": 261}
    text = "a<tool>b c</tool>"
    assert after.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert after.encode(text)[1::3] == [260, *before.encode("c")]
    assert after.decode(after.encode(text)) == text
    assert after.encode("<eos> and ünï") == before.encode("<eos> and ünï")


def test_new_rows_are_the_mean_and_all_others_stay(base, grown):
    was, now = stored(base), stored(grown.folder)
    assert set(was) == set(now) and base_fingerprint(grown.folder) != base_fingerprint(base)
    for name, tensor in was.items():
        assert torch.equal(now[name][: len(tensor)], tensor), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert now[name].shape == (264, 64)  # 260 is divisible by 4
        mean = was[name].double().mean(0).to(torch.bfloat16)
        assert all(torch.equal(row, mean) for row in now[name][260:])
    model = AutoModelForCausalLM.from_pretrained(grown.folder)
    assert model.config.vocab_size == 264
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs.resize_token_embeddings(262)
    torch.testing.assert_close(
        model.get_input_embeddings().weight[260:262].float(),
        theirs.get_input_embeddings().weight[260:],
        atol=2e-3,
        rtol=0,
    )


def test_spare_rows_take_the_tokens_and_only_those(base, tmp_path):
    spare = shutil.copytree(base, tmp_path / "spare")
    for path in spare.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if len(tensor) == 260:
                tensors[name] = torch.cat([tensor, torch.full((4, 64), 7.0, dtype=tensor.dtype)])
        save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((spare / "config.json").read_text())
    (spare / "config.json").write_text(json.dumps({**config, "vocab_size": 264}))
    made = GrownBase.of(str(spare), None, TEXTS)
    made.add_weights()
    rows = stored(made.folder)["lm_head.weight"]
    mean = stored(base)["lm_head.weight"].double().mean(0).to(torch.bfloat16)
    assert rows.shape == (264, 64) and torch.equal(rows[260], mean) and torch.equal(rows[261], mean)
    assert bool((rows[262:] == 7).all())


def test_it_is_kept_and_made_again_with_the_same_bytes(base, grown):
    assert GrownBase.of(str(base), None, TEXTS) == grown
    assert GrownBase.of(str(grown.folder), None, TEXTS) == grown  # as a finished run names it
    digest, damaged = base_fingerprint(grown.folder), grown.folder / "tokenizer.json"
    damaged.write_text(damaged.read_text().replace("<tool>", "<took>"))
    assert GrownBase.read(grown.folder) is None
    again = GrownBase.of(str(base), None, TEXTS)
    assert again == grown and not again.has_weights
    again.add_weights()
    assert again.has_weights and base_fingerprint(grown.folder) == digest
    rewritten = next(path for path in grown.folder.glob("*.safetensors") if path.stat().st_nlink == 1)
    rewritten.write_bytes(rewritten.read_bytes()[:-1])
    assert not again.has_weights
    again.add_weights()
    assert again.has_weights


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("<|eos|>",), "'<|eos|>' is a token of the base already; name it in trainable_tokens"),
        ((" x y",), "' x y' cannot become a token"),
        (tuple(map(str, range(10_001))), "10,001 tokens are new, and 10,000 are the most"),
    ],
)
def test_texts_that_cannot_become_tokens_are_refused(base, texts, words):
    with pytest.raises(UsageError) as refused:
        GrownBase.of(str(base), None, texts)
    assert words in str(refused.value)


def test_bases_that_cannot_grow_are_refused(base, tmp_path):
    odd = shutil.copytree(base, tmp_path / "odd")
    (odd / "tokenizer.json").rename(odd / "other.json")
    with pytest.raises(BackboneError):
        GrownBase.of(str(odd), None, TEXTS)
    (odd / "other.json").rename(odd / "tokenizer.json")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "vocab_size_per_layer_input": 9}))
    with pytest.raises(BackboneError, match="each of its layers has a vocabulary of its own; leave new_tokens out"):
        GrownBase.of(str(odd), None, TEXTS)
    (odd / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    with pytest.raises(BackboneError, match="no tensor of it has the 999 rows of its vocabulary"):
        GrownBase.of(str(odd), None, TEXTS).add_weights()


def test_a_damaged_base_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{cut")
    with pytest.raises(BackboneError, match="the file is truncated"):
        write_grown(tmp_path, tmp_path / "grown", Growth(8, (8,)))
