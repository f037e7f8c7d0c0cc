"""A stand-in for vLLM's program: `vllm serve FOLDER --flag value …`, computed by transformers and PEFT.

It samples unless it is told not to, as vLLM does. With STUB_VLLM=exit it ends at once. HARMS break a stand-in in this
process: "template" answers other prompt ids, "weights" computes with the base alone.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HARMS = set()


def flags(words):
    """Flag -> value, a list of values, or True."""
    found, name = {}, None
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            found[name] = True
        else:
            held = found[name]
            found[name] = word if held is True else [*([held] if isinstance(held, str) else held), word]
    return found


class Model:
    def __init__(self, folder, given):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(given.get("tokenizer", folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.stops = model.generation_config.eos_token_id
        self.is_greedy = json.loads(given.get("override-generation-config", "{}")).get("temperature") == 0
        names = given.get("served-model-name", "base")
        self.models = {names[0] if isinstance(names, list) else names: model}
        modules = given.get("lora-modules", [])
        for module in [modules] if isinstance(modules, str) else modules:
            from peft import PeftModel

            name, path = module.split("=", 1)
            ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self.models[name] = ours if "weights" in HARMS else PeftModel.from_pretrained(ours, path).eval()

    def ids(self, messages):
        made = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ids = list(made["input_ids"])
        return [ids[0], *ids] if "template" in HARMS else ids

    def handle(self, path, body):
        model = self.models[body["model"]]
        if path == "/tokenize":
            return {"tokens": self.ids(body["messages"])}
        if path == "/v1/chat/completions":
            ids = self.torch.tensor([self.ids(body["messages"])])
            self.torch.manual_seed(0)
            options = {"do_sample": False} if self.is_greedy else {"do_sample": True, "temperature": 3.0}
            out = model.generate(input_ids=ids, max_new_tokens=body["max_tokens"], eos_token_id=self.stops, **options)
            text = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        with self.torch.no_grad():
            rows = model(input_ids=self.torch.tensor([body["prompt"]])).logits[0].log_softmax(-1)
        values, tokens = rows.topk(body["prompt_logprobs"])
        told = [
            {str(token): {"logprob": value} for token, value in zip(*pair, strict=True)}
            for pair in zip(tokens.tolist(), values.tolist(), strict=True)
        ]
        return {"choices": [{"prompt_logprobs": [None, *told[:-1]]}]}


def server_of(words):
    """The server of the command line `serve FOLDER --flag value …`."""
    assert words[0] == "serve", words
    given = flags(words[2:])
    model = Model(Path(words[1]), given)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, content):
            raw = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self):
            self.answer({})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.answer(model.handle(self.path, body))

    return ThreadingHTTPServer((given["host"], int(given["port"])), Handler)


def main():
    if os.environ.get("STUB_VLLM") == "exit":
        sys.exit("ValueError: no such device")
    server_of(sys.argv[1:]).serve_forever()


if __name__ == "__main__":
    main()
