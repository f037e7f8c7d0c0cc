import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lorafit.backbone import base_fingerprint, load_backbone
from lorafit.config import RunConfig
from lorafit.data.template.template import Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.export import Row
from lorafit.methods.lora import attach, save_adapter
from lorafit.runs import RunDir, RunFingerprint, RunIdentity, adapter_hashes, held_settings
from tiny_models import save_base, stir

JINJA = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '' }}{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\\n' }}{% endfor %}"
)


def trained_run(
    folder,
    family="llama",
    dtype=torch.bfloat16,
    chat_template=None,
    std=0.05,
    overrides=None,
    tokenizer=None,
    **settings,
):
    """A run directory as `train` leaves it, over a tiny base, and the live adapter model."""
    base = save_base(folder / "base", family, dtype, **(overrides or {}))
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copy(tokenizer / name, base / name)
    if chat_template:
        (base / "chat_template.jinja").write_text(chat_template)
    config = RunConfig(base=str(base), dropout=0.0, rank=4, alpha=8.0, **settings)
    run = RunDir(folder / "run")
    run.path.mkdir()
    run.write_config(config, dict.fromkeys(RunConfig.model_fields, "default"))
    template = Template.for_tokenizer(TextTokenizer.from_base(config.base))
    template.save(run.template)
    run.samples.write_text("")
    run.split.write_text("")
    live = attach(load_backbone(config), config)
    stir(live, std)
    save_adapter(live, run.adapter, config, base_name=config.base)
    fingerprint = RunFingerprint("", "", template.sha256, base_fingerprint(base), held_settings(config))
    seal(run, RunIdentity("id", fingerprint))
    return SimpleNamespace(path=run.path, run=run, config=config, live=live.eval(), base=base)


def seal(run, identity=None):
    """Seal the run as it is now."""
    identity = identity or RunIdentity.read(run.identity)
    identity = replace(identity, adapter=adapter_hashes(run.adapter), is_sealed=False)
    run.seal_files(replace(identity, fingerprint=replace(identity.fingerprint, settings=held_settings(run.config()))))


def some_rows(count=6, length=24):
    """Rows (ids, mask) whose last third is supervised."""
    generator = np.random.default_rng(0)
    mask = np.arange(length) >= 2 * length // 3
    return [Row(generator.integers(4, 256, length).astype(np.int32), mask) for _ in range(count)]


@pytest.fixture(scope="session")
def make_run():
    return trained_run


@pytest.fixture(scope="session")
def rows():
    return some_rows()


@pytest.fixture(scope="session")
def jinja():
    return JINJA


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run over the tiny Llama, shared: exports of it must go elsewhere."""
    return trained_run(tmp_path_factory.mktemp("trained"))
