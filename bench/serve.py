"""Serving under load.

python bench/serve.py engine BASE OUT [options]   # the builtin engine in this process, without HTTP
    python bench/serve.py http BASE OUT [options]     # the same through `lorafit serve`, which it starts
    python bench/serve.py load URL --models A B …     # a running server through HTTP; key: LORAFIT_API_KEY
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    engine = verbs.add_parser("engine")
    engine.add_argument("base")
    engine.add_argument("out", type=Path)
    engine.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32])
    engine.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    engine.add_argument("--rank", type=int, default=16)
    engine.add_argument("--targets", default="qv")
    engine.add_argument("--prompt", type=int, default=128)
    engine.add_argument("--new", type=int, default=128)
    engine.add_argument("--dense", type=int, nargs="+", default=[0, 1], help="0: NF4; 1: dequantized once")
    http = verbs.add_parser("http")
    http.add_argument("base")
    http.add_argument("out", type=Path)
    http.add_argument("--adapters", type=int, default=8)
    http.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    http.add_argument("--rank", type=int, default=16)
    http.add_argument("--targets", default="qv")
    http.add_argument("--prompt", type=int, default=128)
    http.add_argument("--new", type=int, default=128)
    proof = verbs.add_parser("prove")
    proof.add_argument("bases", nargs="+")
    load = verbs.add_parser("load")
    load.add_argument("url")
    load.add_argument("--models", nargs="+", required=True)
    load.add_argument("--clients", type=int, default=8)
    load.add_argument("--requests", type=int, default=64)
    load.add_argument("--new", type=int, default=32)
    load.add_argument("--disconnects", type=float, default=0.1, help="share of clients' requests that they leave")
    arguments = vars(parser.parse_args())
    verb = arguments.pop("verb")
    if verb == "prove":
        from serve_engine import prove

        for base in arguments["bases"]:
            prove(base)
    if verb == "http":
        from serve_http import run_http

        run_http(arguments.pop("base"), arguments.pop("out"), **arguments)
    if verb == "load":
        from serve_load import run_load

        run_load(arguments.pop("url"), **arguments)
    if verb == "engine":
        from serve_engine import run_engine

        counts, dense = arguments.pop("adapters"), [bool(each) for each in arguments.pop("dense")]
        run_engine(arguments.pop("base"), arguments.pop("out"), counts=counts, dense=dense, **arguments)


if __name__ == "__main__":
    main()
