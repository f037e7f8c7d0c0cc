"""adapter: the files that let an adapter folder serve alone, and the base that it names."""

from __future__ import annotations

from pathlib import Path

from lorafit.backbone import stored_dtype
from lorafit.config import RunConfig
from lorafit.export.companions import companion_text, read_companion, write_companions, write_text_companions
from lorafit.export.finished_run import FinishedRun
from lorafit.export.lineage import Lineage
from lorafit.export.model_card import adapter_card, whole_card
from lorafit.export.verify import write_chat_template
from lorafit.findings import Finding
from lorafit.runs import ChosenWeights, RunDir, RunIdentity, adapter_hashes, changed_file, write_text

ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
"""The model card, which its owner may edit: no hash holds it."""


def write_adapter_companions(run: RunDir, staged: Path) -> list[Finding]:
    """Write tokenizer, chat template, generation settings, lineage and model card beside the weights in `staged`.

    A whole model gets its base's config.json too, with the dtype of its weights.

    Returns finding V001 if transformers would render another prompt from `staged` than training had. Raises
    BackboneError for a damaged file of the base.
    """
    parts = FinishedRun.of(run, ChosenWeights(staged))
    if (staged / "config.json").is_file():
        write_companions(parts, staged, stored_dtype(staged))
    else:
        write_text_companions(parts, staged)
    lineage = Lineage.of(run)
    write_origin(staged, parts.config, lineage)
    return write_chat_template(parts, staged)


def write_origin(folder: Path, config: RunConfig, lineage: Lineage) -> None:
    """Write lineage.json and the model card of the trained weights in `folder`."""
    lineage.write(folder)
    card = whole_card if config.method == "full" else adapter_card
    (folder / CARD).write_text(card(config, lineage), encoding="utf-8")


def result_hashes(folder: Path) -> dict[str, str]:
    """Return file name -> sha256 (hex) of the trained weights and their companions, without the model card."""
    return {name: digest for name, digest in adapter_hashes(folder).items() if name != CARD}


def follow_base(run: RunDir, identity: RunIdentity, base: str) -> RunIdentity:
    """Let the adapter of `run` name its base as `base`, after a move, and return the identity with the new hash.

    A damaged adapter stays as it is.
    """
    path = run.adapter / ADAPTER_CONFIG
    if changed_file(run.adapter, identity.adapter) is not None or not path.is_file():
        return identity
    config = read_companion(path)
    if config.get("base_model_name_or_path") in (None, base) or not identity.adapter:
        return identity
    write_text(path, companion_text(config | {"base_model_name_or_path": base}))
    followed = identity.ended_in(result_hashes(run.adapter))
    run.write_json(run.identity, followed.to_dict())
    return followed
