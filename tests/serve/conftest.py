"""Three runs over the demo's base, with other ranks and weights, and an engine that serves them."""

from types import SimpleNamespace

import openai
import pytest

from lorafit.serve.adapters import ServedBase
from lorafit.serve.engines import BuiltinEngine, Limits
from lorafit.serve.http import ServerOptions, make_app
from lorafit.serve.http.metrics import Metrics
from lorafit.serve.http.server import Server
from lorafit.serve.tenants import Tenants
from made_runs import MOST_TOKENS, QUESTIONS, RANKS, write_run
from made_server import ADMIN, KEY, TENANTS, listening


class Silent:
    """A watch that only keeps what it is told."""

    def __init__(self):
        self.admitted, self.crashes = [], []

    def on_admitted(self, generation):
        self.admitted.append(generation)

    def on_step(self, running, waiting, used_positions):
        pass

    def on_crash(self, error):
        self.crashes.append(error)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    return {name: write_run(root / name, seed, rank) for seed, (name, rank) in enumerate(RANKS.items())}


@pytest.fixture(scope="session")
def make_engine(runs):
    """A function that makes an engine over the runs' base; all are stopped at the end."""
    made = []

    def make(**limits):
        root = runs["alice"].parent
        sizes = {"max_num_seqs": 6, "max_model_len": 256, "max_loras": 2, "host_loras": 1, **limits}
        engine = BuiltinEngine(ServedBase.of_run(runs["alice"]), "base", [root], Limits(**sizes), Silent())
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.stop(1)


@pytest.fixture(scope="session")
def own_answers(runs):
    """What each run's own chat, and the base, answer greedily to QUESTIONS: (name, index) -> text."""
    from lorafit.api.load import load

    found = {}
    for name, run in runs.items():
        session = load(run)
        for index, question in enumerate(QUESTIONS):
            found[name, index] = session.answer(question, max_new_tokens=MOST_TOKENS)
            if name == "alice":
                found["base", index] = session.answer(question, max_new_tokens=MOST_TOKENS, tuned=False)
    return found


@pytest.fixture(scope="session")
def served(make_engine, runs, tmp_path_factory):
    """A server of the three runs."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "tenants.yaml").write_text(TENANTS)
    engine = make_engine()
    for name, run in runs.items():
        engine.add_adapter(name, run)
    metrics = engine.scheduler.watch = Metrics()
    tenants = Tenants.of(KEY, ADMIN, folder / "tenants.yaml")
    server = Server(engine, tenants, metrics, ServerOptions(usage_log=folder / "usage.jsonl", drain_s=5))
    with listening(make_app(server), lifespan="on") as url:
        yield SimpleNamespace(url=url, server=server, engine=engine, log=folder / "usage.jsonl")


@pytest.fixture(scope="session")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)
