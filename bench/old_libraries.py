"""Load an adapter folder and a merged model with whatever transformers and PEFT are installed.

Run it in a virtual environment of old releases, which needs no lorafit:

    pip install torch==2.13.0 transformers==4.57.* peft==0.12.*
    python bench/old_libraries.py RUN RUN/exports/merged-original

Prints one JSON object, and exits with 1 if an answer or a prompt differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def prompts_differ(folder: Path, run: Path) -> int:
    """Return how many of the run's golden prompts the tokenizer in `folder` renders otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    golden = json.loads((run / "template.json").read_text())["golden"]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return sum(tokenizer.apply_chat_template(one["messages"], **options)["input_ids"] != one["ids"] for one in golden)


def main() -> int:
    """Compare the adapter over its base with the merged model, and both folders' prompts with training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("merged", type=Path)
    given = parser.parse_args()
    adapter = given.run / "adapter"
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named, torch_dtype=torch.float32), adapter)
    merged, report = AutoModelForCausalLM.from_pretrained(
        given.merged, torch_dtype=torch.float32, output_loading_info=True
    )
    ids = torch.arange(4, 44)[None]
    with torch.inference_mode():
        tuned, found = (each.eval()(ids).logits.log_softmax(-1) for each in (model, merged))
        with model.disable_adapter():
            base = model(ids).logits.log_softmax(-1)
    near, far = ((tuned.exp() * (tuned - other)).sum(-1).mean().item() for other in (found, base))
    result = {
        "transformers": version("transformers"),
        "peft": version("peft"),
        "kl_merged": near,
        "kl_base": far,
        "keys_not_expected_or_missing": sorted([*report["missing_keys"], *report["unexpected_keys"]]),
        "prompts_that_differ": {str(f.name): prompts_differ(f, given.run) for f in (adapter, given.merged)},
        "eos": {str(f.name): GenerationConfig.from_pretrained(f).eos_token_id for f in (adapter, given.merged)},
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    holds = near < 0.05 * far and not result["keys_not_expected_or_missing"]
    return 0 if holds and not any(result["prompts_that_differ"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
