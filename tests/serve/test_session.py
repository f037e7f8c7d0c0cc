"""A finished run answers; tuned, or as its base would."""

import json
import shutil
from dataclasses import replace

import pytest

from lorafit.api.load import load
from lorafit.errors import LorafitError, RunDirError, UsageError, VerificationError
from lorafit.runs import RunDir, RunIdentity, adapter_hashes

QUESTION = [{"role": "user", "content": "Route this ticket to a queue.\nThe courier lost my red lamp."}]


def test_tuned_and_base_differ_and_a_stream_adds_up(tiny_run):
    session = load(tiny_run.run.path)
    pieces = []
    tuned = session.answer(QUESTION, max_new_tokens=10, on_text=pieces.append)
    assert tuned.startswith("".join(pieces))
    assert tuned != session.answer(QUESTION, tuned=False, max_new_tokens=10)
    assert tuned == session.answer(QUESTION, max_new_tokens=10), "the adapter is back after the base has answered"


def test_a_text_is_a_conversation_of_one_turn_and_what_is_none_is_refused(tiny_run):
    session = load(tiny_run.run.path)
    answer = session.answer(QUESTION, max_new_tokens=10)
    assert session.answer(QUESTION[0]["content"], max_new_tokens=10) == answer
    for messages in ([], ["hello"], [["user", "hello"]]):
        with pytest.raises(UsageError, match="the conversation has no messages"):
            session.answer(messages)
    with pytest.raises(UsageError, match="at least one token"):
        session.answer(QUESTION, max_new_tokens=0)


def test_an_answer_ends_where_the_models_positions_do(tiny_run, monkeypatch):
    session = load(tiny_run.run.path)
    whole = session.answer(QUESTION, max_new_tokens=8)
    prompt = session.template.prompt_ids(QUESTION)
    config = session.engine.model.config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", len(prompt) + 3)
    assert session.answer(QUESTION, max_new_tokens=8) == session.answer(QUESTION, max_new_tokens=3) != whole
    monkeypatch.setattr(config, "max_position_embeddings", len(prompt))
    with pytest.raises(UsageError, match=f"takes {len(prompt)} tokens, but the base has {len(prompt)} positions"):
        session.answer(QUESTION)


def test_a_token_without_a_row_in_the_embedding_table_is_refused(tiny_run, monkeypatch):
    session = load(tiny_run.run.path)
    assert session.engine.vocabulary == session.engine.model.get_input_embeddings().num_embeddings
    last = max(session.template.prompt_ids(QUESTION))
    monkeypatch.setattr(type(session.engine), "vocabulary", last)
    with pytest.raises(UsageError, match=f"has the id {last:,}, and the base's embedding table has {last:,} rows"):
        session.answer(QUESTION)


def test_a_loaded_run_answers_as_the_live_model_did(tiny_run):
    from lorafit.engine import generate

    session = load(tiny_run.run.path)
    prompt = session.template.prompt_ids(QUESTION)
    (live,) = generate(tiny_run.model, [prompt], session.template.stop_ids, max_new_tokens=10)
    assert session.answer(QUESTION, max_new_tokens=10) == session.template.tokenizer.decode(live)


def copied(tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.run.path, folder)
    return folder


def test_a_template_that_renders_another_prompt_is_an_error(tiny_run, tmp_path):
    folder = copied(tiny_run, tmp_path)
    content = json.loads((folder / "template.json").read_text())
    text = json.dumps(content).replace("<|assistant|>", "<|helper|>")
    (folder / "template.json").write_text(text)
    with pytest.raises(RunDirError, match=r"template\.json: the file has changed since training"):
        load(folder)
    sealed_again(folder)
    with pytest.raises(RunDirError, match=r"template\.json: the file has changed since training"):
        load(folder)


def test_a_sealed_file_that_cannot_be_read_is_not_called_changed(tiny_run, tmp_path):
    for name, words in (("template.json", "cannot be read"), ("adapter/adapter_model.safetensors", "cannot be read")):
        folder = copied(tiny_run, tmp_path / name.partition("/")[0])
        (folder / name).unlink()
        (folder / name).mkdir()  # a superuser may read every file
        with pytest.raises(RunDirError, match=rf"{name}: the file {words} \(Is a directory\); check its permissions"):
            load(folder)


def test_an_edited_template_with_a_hash_of_its_own_is_refused(tiny_run, tmp_path):
    from lorafit.api.merge import merge, template_of
    from lorafit.data import Template

    folder = copied(tiny_run, tmp_path)
    trained = template_of(RunDir(folder))
    Template(trained.tokenizer, "Obey. " + trained.source, "tokenizer").save(folder / "template.json")
    for verb in (load, merge):
        with pytest.raises(RunDirError, match=r"template\.json: the file has changed since training"):
            verb(folder)
    assert not (folder / "exports").exists() or not any((folder / "exports").iterdir())


def test_a_held_out_row_of_somebodys_choice_proves_no_merge(tiny_run, tmp_path):
    from lorafit.api.merge import merge

    folder = copied(tiny_run, tmp_path)
    row = json.dumps(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "source": ""}
    )
    (folder / "held-out.jsonl").write_text(row + "\n")
    with pytest.raises(RunDirError, match=r"held-out\.jsonl: the file has changed since training"):
        merge(folder)
    sealed_again(folder)
    with pytest.raises(VerificationError, match="too few rows for a proof: 1 with 2 tokens"):
        merge(folder)


def test_a_truncated_adapter_is_one_sentence(tiny_run, tmp_path):
    folder = copied(tiny_run, tmp_path)
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LorafitError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_run_is_said_to_be_so(tmp_path):
    with pytest.raises(RunDirError, match="holds no run"):
        load(tmp_path)


def sealed_again(folder, **values):
    """Seal the run as it is now, as somebody would who wants it to be believed."""
    run = RunDir(folder)
    identity = replace(RunIdentity.read(run.identity), adapter=adapter_hashes(run.adapter), **values)
    run.seal_files(replace(identity, is_sealed=False))


def test_an_adapter_with_one_bit_flipped_is_refused(tiny_run, tmp_path):
    from lorafit.api.merge import merge
    from lorafit.errors import AdapterError

    folder = copied(tiny_run, tmp_path)
    path = folder / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    for verb in (load, merge):
        with pytest.raises(AdapterError, match="the adapter has changed since training"):
            verb(folder)
    assert not (folder / "exports" / "merged").exists()
    sealed_again(folder)
    load(folder)


def test_another_alpha_than_the_trained_one_is_refused(tiny_run, tmp_path):
    from lorafit.api.merge import merge
    from lorafit.errors import AdapterError

    folder = copied(tiny_run, tmp_path)
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 64}))
    sealed_again(folder)
    for verb in (load, merge):
        with pytest.raises(AdapterError, match="trained with"):
            verb(folder)


def test_a_base_that_is_not_the_trained_one_is_refused(tiny_run, tmp_path):
    folder = copied(tiny_run, tmp_path)
    (folder / "base.json").unlink()  # a note for people: the sealed fingerprint counts
    load(folder)
    fingerprint = RunIdentity.read(folder / "fingerprint.json").fingerprint
    sealed_again(folder, fingerprint=replace(fingerprint, base="0" * 64))
    with pytest.raises(VerificationError, match="the base has changed since the run was trained"):
        load(folder)


def test_a_model_in_a_format_that_chat_does_not_serve_is_refused_by_the_formats_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "verification.json").write_text('{"export_format": "gguf"}')
    with pytest.raises(UsageError, match="in the format 'gguf', and this command opens safetensors"):
        load(tmp_path)
