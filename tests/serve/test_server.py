"""The server, through the real openai client: own answers for everyone, and an error of its own for what is wrong."""

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from made_runs import MOST_TOKENS, QUESTIONS
from made_server import ACME, ADMIN, KEY


def ask(client, model, question, **more):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model=model, messages=messages, **{"max_completion_tokens": MOST_TOKENS, **more}
    )


def http(served, key=KEY):
    return httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {key}"}, timeout=30)


def test_the_responses_api_gives_the_same_answers_whole_and_as_a_stream(client, own_answers):
    text = [{"type": "input_text", "text": QUESTIONS[0]}]
    more = {"model": "alice", "max_output_tokens": MOST_TOKENS}
    for given in (QUESTIONS[0], [{"role": "user", "content": text}]):
        whole = client.responses.create(input=given, **more)
        assert whole.output_text == own_answers["alice", 0]
        assert whole.status in ("completed", "incomplete") and whole.usage.output_tokens > 0
    *_, cut = client.responses.create(input=QUESTIONS[0], **more | {"max_output_tokens": 1}, stream=True)
    assert cut.type == "response.incomplete" and cut.response.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(input=QUESTIONS[0], stream=True, **more))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    pieces = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert pieces == events[-1].response.output_text == own_answers["alice", 0]
    with client.responses.stream(input=QUESTIONS[0], **more) as stream:
        *_, last = stream  # the client's own state machine; an answer that was cut is no completed one for it
    assert last.response.output_text == own_answers["alice", 0]


ABSENT = [
    {"tools": [{"type": "web_search"}]},
    {"previous_response_id": "resp_1"},
    {"text": {"format": {"type": "json_object"}}},
    {"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]},
]


@pytest.mark.parametrize("more", ABSENT)
def test_the_responses_api_says_what_it_has_not(client, more):
    with pytest.raises(openai.InternalServerError, match="the builtin engine") as caught:
        client.responses.create(**{"model": "alice", "input": "Hello", **more})
    assert caught.value.status_code == 501


def test_sixteen_clients_get_each_runs_own_answer_while_adapters_come_and_go(served, client, own_answers, runs):
    stop = threading.Event()
    statuses = []

    def churn():
        with http(served, ADMIN) as admin:
            while not statuses or not stop.wait(0.3):
                body = {"lora_name": "guest", "lora_path": str(runs["carol"])}
                statuses.append(admin.post("/v1/load_lora_adapter", json=body).status_code)
                again = {"lora_name": "alice", "lora_path": str(runs["alice"]), "load_inplace": True}
                statuses.append(admin.post("/v1/load_lora_adapter", json=again).status_code)
                statuses.append(admin.post("/v1/unload_lora_adapter", json={"lora_name": "guest"}).status_code)

    def one(key):
        name, index = key
        if random.Random(str(key)).random() < 0.5:
            return ask(client, name, QUESTIONS[index]).choices[0].message.content
        return "".join(
            chunk.choices[0].delta.content or "" for chunk in ask(client, name, QUESTIONS[index], stream=True)
        )

    keys = list(own_answers) * 2
    churning = threading.Thread(target=churn)
    churning.start()
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(one, keys))
    stop.set()
    churning.join()
    assert answers == [own_answers[key] for key in keys]
    assert set(statuses) == {200} and len(statuses) >= 3


def test_models_say_parent_and_sampling_and_each_key_sees_its_own(served, client):
    models = {model.id: model for model in client.models.list().data}
    assert set(models) == {"base", "alice", "bob", "carol"}
    assert models["bob"].parent == "base" and models["base"].parent is None
    assert models["bob"].default_sampling["temperature"] == 0
    with http(served, ACME) as acme:
        assert [model["id"] for model in acme.get("/v1/models").json()["data"]] == ["alice"]


def test_usage_logprobs_stop_and_n_are_openais(served, client, own_answers):
    name, index = next(key for key in own_answers if len(own_answers[key]) > 8)
    whole = own_answers[name, index]
    answer = ask(client, name, QUESTIONS[index], logprobs=True, top_logprobs=3, n=2)
    assert [choice.message.content for choice in answer.choices] == [whole, whole]
    content = answer.choices[0].logprobs.content
    assert len(content[0].top_logprobs) == 3 and content[0].logprob == content[0].top_logprobs[0].logprob <= 0
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in answer.choices)
    stop = whole[4:6]
    assert ask(client, name, QUESTIONS[index], stop=stop).choices[0].message.content == whole[: whole.find(stop)]
    chunks = list(ask(client, name, QUESTIONS[index], stop=[stop], stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole[: whole.find(stop)] and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    short = ask(client, name, QUESTIONS[index], max_completion_tokens=1)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1


def test_a_rendered_prompt_has_its_bos_once_and_the_ids_are_the_trained_ones(served, client, own_answers):
    template = served.engine.base.template
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    prompt = template.prompt_text(messages)
    with http(served) as plain:
        as_text = plain.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
        as_chat = plain.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert as_text == as_chat == template.prompt_ids(messages)
    for given in (prompt, template.prompt_ids(messages)):
        made = client.completions.create(model="bob", prompt=given, max_tokens=MOST_TOKENS, logprobs=1)
        assert made.choices[0].text == own_answers["bob", 0]
    assert made.usage.prompt_tokens == len(as_chat)


def test_completions_stream_several_answers_to_several_prompts_up_to_a_stop(served, client, own_answers):
    prompts = [served.engine.base.template.prompt_text([{"role": "user", "content": each}]) for each in QUESTIONS]
    stop = own_answers["bob", 0][3:5]
    more = {"model": "bob", "prompt": prompts, "n": 2, "max_tokens": MOST_TOKENS, "stop": [stop, "never said"]}
    whole = client.completions.create(**more, logprobs=2)
    wanted = [own_answers["bob", index].split(stop)[0] for index in (0, 0, 1, 1)]
    assert [choice.text for choice in whole.choices] == wanted
    for choice in whole.choices:
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) and all(len(each) >= 2 for each in told.top_logprobs)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**more, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == wanted


def test_a_seed_repeats_a_sampled_answer(client):
    first, again = (
        ask(client, "bob", QUESTIONS[1], temperature=1.5, seed=7).choices[0].message.content for _ in range(2)
    )
    others = {
        ask(client, "bob", QUESTIONS[1], temperature=1.5, seed=seed).choices[0].message.content for seed in range(6)
    }
    assert first == again and len(others) > 1


@pytest.mark.parametrize("route", ["/v1/models", "/health", "/ready", "/metrics", "/nothing"])
def test_every_route_needs_a_key(served, route):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"x-api-key": "ü".encode()}):
        answer = httpx.get(served.url + route, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    assert httpx.get(served.url + route, headers={"x-api-key": ADMIN}).status_code == (
        404 if "nothing" in route else 200
    )


def test_loading_needs_the_admin_key_and_an_allowed_place(served, runs, tmp_path):
    body = {"lora_name": "mine", "lora_path": str(runs["alice"])}
    for key in (KEY, ACME):
        with http(served, key) as other:
            assert other.post("/v1/load_lora_adapter", json=body).status_code == 403
            assert other.post("/v1/unload_lora_adapter", json=body).status_code == 403
    with http(served, ADMIN) as admin:
        refused = {
            "place": {**body, "lora_path": str(tmp_path)},
            "missing": {**body, "lora_path": str(runs["alice"].parent / "no")},
            "climbing": {**body, "lora_path": str(runs["alice"] / ".." / ".." / "..")},
            "name in use": {"lora_name": "alice", "lora_path": str(runs["alice"])},
            "nul": {**body, "lora_path": "a\0b"},
        }
        for what, content in refused.items():
            answer = admin.post("/v1/load_lora_adapter", json=content)
            assert answer.status_code == 400, what
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "nobody"}).status_code == 404


def test_a_tenant_has_its_adapters_and_its_limits(served):
    acme = openai.OpenAI(base_url=f"{served.url}/v1", api_key=ACME, max_retries=0)
    with pytest.raises(openai.PermissionDeniedError):
        ask(acme, "bob", "x")
    with pytest.raises(openai.RateLimitError) as limited:
        ask(acme, "alice", "x", n=3)  # two at once
    for _ in range(5):
        ask(acme, "alice", "x", max_completion_tokens=1)
    with pytest.raises(openai.RateLimitError) as limited:
        ask(acme, "alice", "x")
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60
    lines = [json.loads(line) for line in served.log.read_text().splitlines()]
    of_acme = [line for line in lines if line["tenant"] == "acme"]
    assert [line["status"] for line in of_acme].count(200) == 5
    assert all(line["completion_tokens"] == 1 for line in of_acme if line["status"] == 200)
    with http(served, ADMIN) as admin:
        text = admin.get("/metrics").text
    assert 'lorafit_requests_total{model="alice",status="200",tenant="acme"} 5.0' in text
    assert "lorafit_time_to_first_token_seconds_count" in text and "lorafit_kv_used_ratio" in text


def test_what_the_builtin_engine_lacks_is_said_so(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    asked = [{"tools": [tool]}, {"response_format": schema}, {"presence_penalty": 1.0}, {"logit_bias": {"5": 9}}]
    others = [{"top_k": 5}, {"guided_json": {"a": 1}}, {"min_tokens": 3}, {"chat_template": "x"}, {"functions": [tool]}]
    for more in (*asked, *({"extra_body": each} for each in others)):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, "bob", "x", **more)
        assert caught.value.status_code == 501 and "serve it with vLLM" in str(caught.value)


def test_fields_that_ask_for_nothing_are_ignored_and_misspelt_ones_are_not(client):
    nothing = {"top_k": -1, "repetition_penalty": 1.0, "ignore_eos": False, "guided_json": None, "cache_prompt": True}
    assert ask(client, "bob", "x", user="me", metadata={"a": "b"}, extra_body=nothing, max_tokens=1).choices
    for body, said in (
        ({"max_token": 5}, "did you mean max_tokens"),
        ({"stop": ["a", ""]}, "stop is a text or a list"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "one of system, developer, user"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            ask(client, "bob", "x", extra_body=body)


def test_the_developers_role_is_the_systems(client):
    answers = {
        client.chat.completions.create(
            model="bob",
            messages=[{"role": role, "content": "Route."}, {"role": "user", "content": "x"}],
            max_tokens=5,
        ).usage.prompt_tokens
        for role in ("system", "developer")
    }
    assert len(answers) == 1


def test_what_is_not_there_is_told_with_what_is(served, client):
    assert client.models.retrieve("bob").id == "bob"
    with pytest.raises(openai.NotFoundError, match="no model called gpt-4 is loaded; there is base, alice, bob"):
        client.models.retrieve("gpt-4")
    with http(served) as own:
        told = own.post("/v1/messages", json={}).json()["error"]["message"]
        assert told.startswith("there is no /v1/messages; there are ") and "/v1/chat/completions" in told
        assert own.get("/v1/completions").json()["error"]["message"] == "/v1/completions takes POST, not GET"


def test_a_client_that_leaves_frees_its_slot(served, client):
    for stream in (True, False):
        with http(served) as leaving:
            body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "stream": stream}
            body |= {"temperature": 3.0, "max_tokens": 200}
            try:
                with leaving.stream("POST", "/v1/chat/completions", json=body, timeout=0.3) as answer:
                    next(answer.iter_lines())
            except httpx.TimeoutException:
                pass
        tenant = served.server.tenants.find(KEY)
        assert tenant is not None
        deadline = time.monotonic() + 2
        while (sum(served.engine.scheduler.load) or tenant.running) and time.monotonic() < deadline:
            time.sleep(0.01)  # the request ends a moment after its text
        assert served.engine.scheduler.load == (0, 0) and tenant.running == 0


def test_an_unloaded_adapter_finishes_its_answer_and_is_then_gone(served, client, runs, own_answers):
    served.engine.add_adapter("leaving", runs["carol"])
    alone = ask(client, "leaving", QUESTIONS[0], logprobs=True).choices[0]
    chunks = ask(client, "leaving", QUESTIONS[0], stream=True, logprobs=True)
    began = next(chunks)
    served.engine.remove_adapter("leaving")
    served.engine.add_adapter("leaving", runs["alice"])
    choices = [chunk.choices[0] for chunk in (began, *chunks)]
    assert "".join(each.delta.content or "" for each in choices) == own_answers["carol", 0]
    told = [token.logprob for each in choices if each.logprobs for token in each.logprobs.content or ()]
    assert told == pytest.approx([token.logprob for token in alone.logprobs.content], abs=1e-4)
    assert ask(client, "leaving", QUESTIONS[0]).choices[0].message.content == own_answers["alice", 0]
    served.engine.remove_adapter("leaving")
    with pytest.raises(openai.NotFoundError):
        ask(client, "leaving", QUESTIONS[0])


def malformed(count):
    """Bodies of requests that are wrong, each in its way."""
    random_ = random.Random(0)
    good = {"model": "bob", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    wrong = [None, True, -1, 1e400, "", "x" * 10_000, [], [[]], {}, {"a": {}}, "\ud800", [None], 2**70, 0.5]
    raw = [b"", b"{", b"\xff\xfe{}", b"[]", b"null", b'{"a":' * 5000, b"NaN", b'{"model": NaN}', b'{"model":"\\ud800"}']
    fields = [
        *good,
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "stream",
        "logprobs",
        "top_logprobs",
        "prompt",
        "tools",
    ]
    fields += ["stream_options", "response_format", "max_completion_tokens", "logit_bias"]
    bodies = list(raw)
    while len(bodies) < count:
        body = {**good, random_.choice(fields): random_.choice(wrong)}
        if random_.random() < 0.4:
            body["messages"] = [{random_.choice(["role", "content", "x"]): random_.choice(wrong)}]
        bodies.append(json.dumps(body).encode())
    return bodies


def test_two_hundred_malformed_requests_make_no_500(served):
    statuses = set()
    routes = [
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    ]
    with http(served, ADMIN) as admin:
        for number, body in enumerate(malformed(200)):
            answer = admin.post(routes[number % len(routes)], content=body)
            statuses.add(answer.status_code)
            assert answer.status_code < 500 or answer.status_code == 501, (answer.text, body[:300])
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], body[:300]
        assert 400 in statuses
        assert admin.post("/v1/completions", content=b" " * (5 << 20)).status_code == 413
        assert admin.get("/v1/chat/completions").status_code == 405
        long = {"model": "bob", "messages": [{"role": "user", "content": "x " * 5000}]}
        assert "tokens" in admin.post("/v1/chat/completions", json=long).json()["error"]["message"]
        deep = {"type": "json_schema", "json_schema": {}}
        for _ in range(100):
            deep = {"properties": deep}
        body = {"model": "bob", "messages": [{"role": "user", "content": "x"}], "response_format": deep}
        assert "nests deeper" in admin.post("/v1/chat/completions", json=body).json()["error"]["message"]


def test_a_crash_answers_503_and_the_next_request_is_served(served, client, own_answers, monkeypatch):
    decoder = served.engine.decoder

    def crash(*arguments):
        monkeypatch.undo()
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(decoder, "decode", crash)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "bob", QUESTIONS[0])
    assert caught.value.status_code == 503 and "retry-after" in caught.value.response.headers
    assert ask(client, "bob", QUESTIONS[0]).choices[0].message.content == own_answers["bob", 0]
    assert "lorafit_engine_crashes_total 1.0" in served.server.metrics.text().decode()


def test_a_server_that_stops_finishes_answers_and_takes_no_new_ones(make_engine, runs):
    engine = make_engine(max_num_seqs=2)
    engine.add_adapter("alice", runs["alice"])
    prompt = engine.base.template.prompt_ids([{"role": "user", "content": QUESTIONS[0]}])
    expected = engine.answer(prompt, "alice", 8)
    with ThreadPoolExecutor(1) as other:
        running = other.submit(engine.answer, prompt, "alice", 8)
        while not sum(engine.scheduler.load):
            time.sleep(0.001)
        assert engine.stop(10), "nothing was cut off"
        assert running.result() == expected
    with pytest.raises(Exception, match="the engine is stopped"):
        engine.answer(prompt, "alice", 8)


def test_a_token_without_a_row_in_the_embedding_table_is_a_bad_request(served, monkeypatch):
    monkeypatch.setattr(served.engine, "vocabulary", 1)
    with http(served) as client:
        answer = client.post(
            "/v1/chat/completions", json={"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
        )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert "the base's embedding table has 1 rows" in answer.json()["error"]["message"]
