"""A stand-in for `vllm serve`, for tests of what stands before it: every model answers with its own name."""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from stub_vllm import flags

SEEN = {"cancelled": 0, "bodies": [], "flags": {}, "environment": {}}


def as_list(value):
    return value if isinstance(value, list) else [value]


class Handler(BaseHTTPRequestHandler):
    models: ClassVar[dict[str, str]] = {}

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, kind="application/json"):
        raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        self.answer({"models": self.models, **SEEN} if self.path == "/seen" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.models:
                return self.answer({"error": "already been loaded"}, 400)
            self.models[body["lora_name"]] = body["lora_path"]
            return self.answer("Success", kind="text/plain")
        if self.path == "/v1/unload_lora_adapter":
            found = self.models.pop(body["lora_name"], None)
            return self.answer("Success" if found else "unknown", 200 if found else 404, "text/plain")
        SEEN["bodies"].append(body)
        if body["model"] not in self.models:
            return self.answer({"error": {"message": "no such model"}}, 404)
        if body.get("stream"):
            return self.stream(body["model"])
        choice = {"index": 0, "message": {"role": "assistant", "content": body["model"]}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        common = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"]}
        return self.answer({**common, "choices": [choice], "usage": usage})

    def stream(self, name):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            for place in range(200 if name == "base" else 1):
                delta = {"content": name if not place else "."}
                common = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": name}
                chunk = {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.05)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            SEEN["cancelled"] += 1


def main():
    given = flags(sys.argv[3:])
    SEEN["flags"] = {**given, "model": sys.argv[2]}
    SEEN["environment"] = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "HF_"))}
    Handler.models = dict.fromkeys(as_list(given["served-model-name"]), "")
    Handler.models |= dict(each.split("=", 1) for each in as_list(given.get("lora-modules", [])))
    ThreadingHTTPServer((given["host"], int(given["port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
