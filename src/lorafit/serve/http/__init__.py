"""http: OpenAI's routes over an engine, with keys, limits, metrics and a log of usage."""

from lorafit.serve.http.app import make_app
from lorafit.serve.http.server import ServerOptions

__all__ = ["ServerOptions", "make_app"]
