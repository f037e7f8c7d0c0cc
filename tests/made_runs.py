"""Runs over the demo's base whose adapters are drawn, not trained: for tests that serve."""

from dataclasses import replace

import torch

from lorafit.backbone import base_fingerprint, load_backbone
from lorafit.config import RunConfig, resolve
from lorafit.data import Template, TextTokenizer
from lorafit.demo import BASE
from lorafit.methods.lora import attach, save_adapter
from lorafit.runs import RunDir, RunFingerprint, RunIdentity, adapter_hashes, held_settings

RANKS = {"alice": 2, "bob": 5, "carol": 8}
QUESTIONS = ("Route this ticket to a queue.\nThe courier lost my red lamp.", "Hello")
MOST_TOKENS = 10


def write_run(folder, seed, rank, **settings):
    """A run directory whose adapter is drawn from `seed`."""
    targets = "all-linear" if seed % 2 else "qv"
    flags = {"base": str(BASE), "dropout": 0.0, "rank": rank, "alpha": 2.0 * rank, "targets": targets, **settings}
    config = resolve(flags=flags).config
    run = RunDir(folder)
    folder.mkdir()
    run.write_config(config, dict.fromkeys(RunConfig.model_fields, "default"))
    template = Template.for_tokenizer(TextTokenizer.from_base(config.base))
    template.save(run.template)
    run.samples.write_text("")
    run.split.write_text("")
    live = attach(load_backbone(config), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
    save_adapter(live, run.adapter, config, base_name=config.base)
    fingerprint = RunFingerprint("", "", template.sha256, base_fingerprint(BASE), held_settings(config))
    seal(run, RunIdentity("id", fingerprint))
    return folder


def seal(run, identity=None, **fingerprint):
    """Seal the run as it is now, with other fields of its fingerprint."""
    identity = identity or RunIdentity.read(run.identity)
    fields = {"settings": held_settings(run.config()), **fingerprint}
    identity = replace(identity, adapter=adapter_hashes(run.adapter), is_sealed=False)
    run.seal_files(replace(identity, fingerprint=replace(identity.fingerprint, **fields)))
