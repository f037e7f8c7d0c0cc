"""The builtin engine: each answer is the run's own, whatever else is in the batch."""

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lorafit.errors import AdapterError, LorafitError, UsageError, VerificationError
from lorafit.methods.lora import AdapterFiles, GroupedAdapters, plain_adapter
from lorafit.runs import RunDir
from lorafit.serve.decoding import Chosen, Sampling, choose, scheduler
from lorafit.serve.decoding.batch import Tail
from lorafit.serve.decoding.fair_queue import FairQueue
from made_runs import MOST_TOKENS, QUESTIONS, seal, write_run


@pytest.fixture(scope="module")
def engine(make_engine, runs):
    engine = make_engine()
    for name, run in runs.items():
        engine.add_adapter(name, run)
    return engine


def served(engine, name, question):
    prompt = engine.base.template.prompt_ids([{"role": "user", "content": question}])
    ids = engine.answer(prompt, None if name == "base" else name, MOST_TOKENS)
    return engine.base.template.tokenizer.decode(ids)


def test_every_answer_is_the_runs_own_with_three_adapters_in_two_slots(engine, own_answers):
    keys = [*own_answers, *own_answers]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda key: served(engine, key[0], QUESTIONS[key[1]]), keys))
    assert answers == [own_answers[key] for key in keys]
    assert len(set(own_answers.values())) > len(QUESTIONS), "the adapters answer differently"


def test_a_request_whose_token_cannot_be_chosen_ends_alone(engine, own_answers, monkeypatch):
    def chosen(logits, sampling, *more):
        if sampling.temperature:
            raise RuntimeError("no token")
        return choose(logits, sampling, *more)

    monkeypatch.setattr(scheduler, "choose", chosen)
    prompt = engine.base.template.prompt_ids([{"role": "user", "content": QUESTIONS[0]}])

    async def sampled():
        async for _ in engine.stream(prompt, None, Sampling(temperature=1.0), max_new_tokens=4):
            pass

    with ThreadPoolExecutor(2) as clients:
        failing, neighbour = clients.submit(asyncio.run, sampled()), clients.submit(served, engine, "bob", QUESTIONS[0])
        with pytest.raises(RuntimeError, match="no token"):
            failing.result()
        assert neighbour.result() == own_answers["bob", 0]
    assert engine.scheduler.state == "ready"


def test_a_slots_log_probabilities_are_those_of_its_dense_update(engine, runs):
    def compare():
        decoder, version = engine.decoder, engine.pool.names()["bob"]
        weights = engine.pool.weights(version)
        slot = engine.pool.place(version)
        engine.pool.release(version)
        tail = Tail(list(range(20, 60)), 30)
        dense = {name: (torch.eye(a.shape[1]), version.scale * b @ a) for name, (a, b) in weights.items()}
        [wanted] = decoder.plain_log_probs([tail], lambda: plain_adapter(decoder.model, dense, 1.0))
        found = [decoder.slot_log_probs(tail, 2, index) for index in (slot, 0)]
        return [(each - wanted).abs().max() for each in found]

    near, far = engine.scheduler.call(compare).result()
    assert near < 1e-3 < far


def test_a_wrong_slot_is_found_by_the_golden_prompts(engine):
    version = engine.pool.names()["bob"]
    weights = engine.pool.weights(version)
    wrong = {name: (a, b + 0.05 * b.std()) for name, (a, b) in weights.items()}

    def prove():
        put = engine.decoder.adapters.put
        engine.decoder.adapters.put = lambda slot, _, scale: put(slot, wrong, scale)
        try:
            return engine.proof.prove_adapter(version, weights, engine.pool.proof_slot)
        finally:
            engine.decoder.adapters.put = put

    with pytest.raises(VerificationError, match="golden prompts differ"):
        engine.scheduler.call(prove).result()


def test_what_must_not_be_served_is_refused_with_one_sentence(engine, runs, tmp_path_factory):
    root = runs["alice"].parent
    other = shutil.copytree(runs["alice"], root / "other-template")
    content = json.loads((other / "template.json").read_text())
    content["stop_ids"] = [content["stop_ids"][0] + 1]
    (other / "template.json").write_text(json.dumps(content))
    seal(RunDir(other))
    rebased = shutil.copytree(runs["alice"], root / "other-base")
    seal(RunDir(rebased), base="0" * 64)
    pickled = shutil.copytree(runs["alice"], root / "pickled")
    (pickled / "adapter" / "x.bin").write_bytes(b"")
    seal(RunDir(pickled))
    bare = shutil.copytree(runs["alice"] / "adapter", root / "bare")
    dense = write_run(root / "dense", 0, 2, quantization="none")
    (root / "link").symlink_to(tmp_path_factory.mktemp("outside"))
    refused = {
        other: "stop token has changed",
        rebased: "another base",
        pickled: "pickle",
        bare: "names no run",
        dense: "quantization=none",
        root / "link": "not loaded from this place",
        root / "missing": "no such folder",
        root.parent: "not loaded from this place",
    }
    for path, reason in refused.items():
        with pytest.raises(LorafitError, match=reason) as caught:
            engine.add_adapter("refused", path)
        assert "\n" not in str(caught.value)
    assert "refused" not in engine.pool.names()


def test_an_adapter_whose_keys_match_nothing_is_refused(engine, runs):
    from safetensors.torch import load_file, save_file

    run = shutil.copytree(runs["alice"], runs["alice"].parent / "no-keys")
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "x_proj"): tensor for name, tensor in load_file(path).items()}, path)
    seal(RunDir(run))
    with pytest.raises(AdapterError, match="does not fit the base"):
        engine.add_adapter("no-keys", run)


def test_names_are_checked_and_a_second_load_needs_to_say_so(engine, runs):
    for name in ("base", "", "a b", "x" * 200):
        with pytest.raises(UsageError):
            engine.add_adapter(name, runs["alice"])
    with pytest.raises(UsageError, match="already loaded"):
        engine.add_adapter("alice", runs["alice"])
    with pytest.raises(UsageError, match="no adapter of this name"):
        engine.remove_adapter("nobody")


def test_files_that_changed_after_loading_are_not_read_again(make_engine, runs):
    engine = make_engine(max_loras=1, host_loras=1)
    copy = shutil.copytree(runs["alice"], runs["alice"].parent / "changing")
    engine.add_adapter("changing", copy)
    engine.add_adapter("bob", runs["bob"])  # takes the one place in host memory
    served(engine, "bob", QUESTIONS[0])
    files = sorted((runs["carol"] / "adapter").iterdir())
    for file in files:
        shutil.copy(file, copy / "adapter" / file.name)
    with pytest.raises(AdapterError, match="changed since it was loaded"):
        served(engine, "changing", QUESTIONS[0])
    assert AdapterFiles.open(copy / "adapter").rank == 8


def test_a_seed_repeats_an_answer_and_top_p_narrows_it():
    logits = torch.tensor([2.0, 1.0, 0.5, -3.0])
    free = Sampling(temperature=1.0, seed=3)
    drawn = [[choose(logits, free, generator, ()).token for _ in range(50)] for generator in (free.generator(),) * 1]
    again = free.generator()
    assert drawn[0] == [choose(logits, free, again, ()).token for _ in range(50)]
    assert set(drawn[0]) >= {0, 1, 2}
    narrow = Sampling(temperature=1.0, top_p=0.5, seed=3)
    generator = narrow.generator()
    assert {choose(logits, narrow, generator, ()).token for _ in range(50)} == {0}
    asked = choose(logits, Sampling(logprobs=2), None, ())
    assert [token for token, _ in asked.top] == [0, 1]
    assert asked.logprob == pytest.approx(float(logits.log_softmax(-1)[0]))
    assert choose(logits, Sampling(repetition_penalty=3.0), None, [0]).token == 1


def test_tenants_are_served_in_proportion_to_their_priorities():
    queue = FairQueue()
    for number in range(60):
        queue.put("low", ("low", number))
        queue.put("high", ("high", number))
    order = []
    for _ in range(30):
        tenant, item = next(queue.heads())
        queue.remove(tenant, item)
        queue.admitted(tenant)
        queue.charge(tenant, 10, {"low": 1.0, "high": 2.0}[tenant])
        order.append(tenant)
    assert order.count("high") == 20
    for number in range(20):
        queue.put("late", ("late", number))
    for _ in range(8):
        tenant, item = next(queue.heads())
        queue.remove(tenant, item)
        queue.charge(tenant, 10, {"low": 1.0, "high": 2.0, "late": 1.0}[tenant])
        order.append(tenant)
    assert order[30:].count("late") <= 3, "a newcomer has no claim to the share that it never used"


def test_answers_are_the_same_when_the_next_step_starts_before_the_last_is_read(engine, own_answers):
    keys = [*own_answers, *own_answers]
    ids = engine.base.template.prompt_ids([{"role": "user", "content": QUESTIONS[0]}])
    version = engine.pool.pin("alice")
    sampled = Sampling(temperature=0.8, seed=3)
    alone = collect(engine, ids, version, sampled)
    engine.decoder.runs_ahead = True
    try:
        with ThreadPoolExecutor(16) as clients:
            among = clients.submit(collect, engine, ids, version, sampled)
            answers = list(clients.map(lambda key: served(engine, key[0], QUESTIONS[key[1]]), keys))
        assert answers == [own_answers[key] for key in keys]
        assert among.result() == alone
    finally:
        engine.decoder.runs_ahead = False
        engine.pool.unpin(version)


def collect(engine, ids, version, sampling):
    """The tokens of one answer."""

    async def run():
        events = engine.stream(ids, version, sampling, max_new_tokens=MOST_TOKENS)
        return [event.token async for event in events if isinstance(event, Chosen)]

    return asyncio.run(run())


def test_adapters_of_a_batch_are_multiplied_at_once_or_gathered_with_one_result():
    from torch import nn

    model = nn.Sequential(nn.Linear(12, 10))
    adapters = GroupedAdapters(model, 4)
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(size, generator=generator) for size in ((rank, 12), (10, rank))] for rank in (2, 3, 5)]
    for slot, pair in enumerate(pairs, start=1):
        adapters.put(slot, {"0": tuple(pair)}, 0.5)
    rows = [0, 3, 1, 2, 3]
    x = torch.randn(len(rows), 4, 12, generator=generator)
    with adapters.rows(torch.tensor(rows)):
        together = model(x)
    for row, slot in enumerate(rows):
        with adapters.rows(torch.tensor([slot])):
            alone = model(x[row : row + 1])[0]
        a, b = pairs[slot - 1] if slot else (torch.zeros(1, 12), torch.zeros(10, 1))
        wanted = model(x[row]) + 0.5 * x[row] @ a.T @ b.T
        torch.testing.assert_close(together[row], wanted)
        torch.testing.assert_close(alone, wanted)


def test_infinite_values_of_one_adapter_stay_in_its_rows():
    from torch import nn

    model = nn.Sequential(nn.Linear(4, 4))
    adapters = GroupedAdapters(model, 2)
    adapters.put(1, {"0": (torch.full((1, 4), 3e38), torch.ones(4, 1))}, 1.0)
    adapters.put(2, {"0": (torch.ones(1, 4), torch.ones(4, 1))}, 1.0)
    x = torch.full((2, 1, 4), 10.0)
    with adapters.rows(torch.tensor([1, 2])):
        found = model(x)
    assert not found[0].isfinite().any()
    torch.testing.assert_close(found[1], model(x)[1] + 40)


def test_one_token_of_grouped_queries_attends_as_sdpa_does():
    from types import SimpleNamespace

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from lorafit.serve.decoding.fused import slot_attention

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 8, 1, 16, generator=generator)
    key, value = (torch.randn(3, 2, 20, 16, generator=generator) for _ in range(2))
    mask = torch.arange(20)[None, None, None] <= torch.tensor([4, 19, 0])[:, None, None, None]
    module = SimpleNamespace(num_key_value_groups=4, is_causal=True, training=False)
    wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = slot_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, wanted)


def test_only_norms_that_are_plain_are_fused():
    from torch import nn
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from lorafit.serve.decoding.fused import fuse_norms

    model = nn.ModuleList([LlamaRMSNorm(8, eps=1e-6), GemmaRMSNorm(8, eps=1e-6)])
    with torch.no_grad():
        for norm in model:
            norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    before = [norm(x) for norm in model]
    assert fuse_norms(model) == 1
    torch.testing.assert_close([norm(x) for norm in model], before)
