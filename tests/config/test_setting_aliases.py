"""Settings by the names of other tools."""

import pytest

from lorafit.config import RunConfig, load_recipe, resolve
from lorafit.config.setting_aliases import ADVICE, SETTING_ALIASES, SWITCHES, VALUES, aliases_of, our_name
from lorafit.errors import UsageError

KEYS = set(RunConfig.model_fields)


def read(**given):
    """The settings that differ from the defaults."""
    return resolve(given).config.model_dump(exclude_defaults=True)


def test_every_name_leads_to_a_setting():
    made = {key for values in SWITCHES.values() for one in values.values() for key in one}
    assert set(SETTING_ALIASES.values()) | set(VALUES) | made <= KEYS
    assert not {*SETTING_ALIASES, *SWITCHES, *ADVICE} & KEYS


@pytest.mark.parametrize("theirs", SETTING_ALIASES)
def test_a_usual_name_is_the_setting_itself(theirs):
    values = {"rank": 3, "epochs": 2, "lr": 1e-3, "targets": "all-linear", "memory_policy": "keep", "alpha": 5}
    values |= {"gpu_memory": "9GiB", "on_long": "drop", "field_map": {"response": "a"}, "schedule": "linear"}
    values |= {
        "optimizer": "adamw",
        "rslora": True,
        "dora": True,
        "init_adapter": "a",
        "init_lora_weights": "olora",
        "new_tokens": ["<tool>"],
        "modules_to_save": "lm_head",
        "holdout": 0.2,
        "warmup": 0.2,
        "dropout": 0.1,
        "base": "b",
        "out": "o",
    }
    ours = SETTING_ALIASES[theirs]
    value = values.get(ours, ["a.jsonl"] if ours == "data" else 64)
    assert resolve({theirs: value}).config == resolve({ours: value}).config
    assert resolve({theirs: value}).names[ours] == theirs


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"load_in_4bit": True}, {}),
        ({"load_in_4bit": False, "load_in_8bit": False}, {"quantization": "none"}),
        ({"bf16": True, "fp16": False}, {"compute": "bf16"}),
        ({"bf16": "auto"}, {}),
        ({"init_lora_weights": True}, {}),
        ({"peft_init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "pissa"}),
        ({"pissa_init": True, "pissa_convert": True}, {"init_lora_weights": "pissa"}),
        ({"add_tokens": "<a>,<b>", "resize_vocab": True}, {"new_tokens": ("<a>", "<b>")}),
        ({"use_dora": True, "loraplus_lr_ratio": 16}, {"dora": True, "loraplus_lr_ratio": 16.0}),
        ({"adapter": "qlora", "load_in_4bit": True}, {}),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 4}, {"examples_per_step": 8}),
        ({"per_device_train_batch_size": 4}, {"examples_per_step": 4}),
        ({"gradient_checkpointing": True}, {"memory_policy": "recompute"}),
        ({"gradient_checkpointing": "unsloth"}, {"memory_policy": "recompute"}),
        ({"gradient_checkpointing": "reentrant"}, {"memory_policy": "recompute"}),
        ({"gradient_checkpointing": False}, {"memory_policy": "keep"}),
        ({"gradient_checkpointing": "auto"}, {}),
        ({"optimizer": "adamw_bnb_8bit"}, {"optimizer": "adamw_8bit"}),
        ({"optim": "adamw_torch"}, {"optimizer": "adamw"}),
        ({"lr_scheduler_type": "constant_with_warmup"}, {"schedule": "constant"}),
        ({"warmup_steps": 0}, {"warmup": 0.0}),
        ({"lora_target_linear": True}, {"targets": "all-linear"}),
        ({"lora_target": "q_proj,v_proj"}, {"targets": ("q_proj", "v_proj")}),
        ({"datasets": [{"path": "a.jsonl", "type": "alpaca"}]}, {"data": ("a.jsonl",)}),
        ({"sample_packing": True, "train_on_inputs": False, "strict": False}, {}),
        ({"report_to": "none"}, {}),
        ({"wandb_project": None, "learning_rate": None}, {}),
        ({"Learning_Rate": 1e-3}, {"lr": 1e-3}),
    ],
)
def test_what_has_an_exact_counterpart_is_translated(given, wanted):
    assert read(**given) == wanted


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gradient_accumulation_steps": 4}, "write examples_per_step"),
        ({"load_in_8bit": True}, "write quantization: nf4"),
        ({"loftq_config": {"loftq_bits": 4}}, "write init_lora_weights: loftq"),
        ({"trainable_token_indices": [3]}, "write trainable_tokens: the texts"),
        ({"warmup_steps": 10}, "write warmup: the share"),
        ({"wandb_project": "x"}, "write report_to: wandb"),
        ({"flash_attention": True}, "lorafit chooses attention itself"),
        ({"sample_packing": False}, "rows are packed"),
        ({"datasets": [{"path": "a.jsonl", "type": {"field": "b"}}]}, "write data"),
        ({"lr": 1.0, "learning_rate": 2.0}, "set it once"),
        ({"gradient_checkpointing": True, "memory_policy": "keep"}, "memory_policy to keep"),
        ({"trust_remote_code": True}, "lorafit never runs Python code"),
        ({"gradient_accumulation_steps": "many", "micro_batch_size": 2}, "write examples_per_step"),
    ],
)
def test_what_has_none_says_what_to_write(given, says):
    with pytest.raises(UsageError, match=says):
        resolve(given)


def test_a_flag_by_one_name_beats_the_recipe_by_another():
    resolved = resolve({"learning_rate": 1e-3, "cutoff_len": 99}, {"lr": 2e-3})
    assert (resolved.config.lr, resolved.config.max_length) == (2e-3, 99)
    assert resolved.names == {"max_length": "cutoff_len"}


def test_the_run_yaml_of_an_older_release_still_loads(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        'max_tokens: 512  # flag\nvram: "8GiB"\nlong: "drop"\nmap: {"response": "007"}\n'
        'gradient_checkpointing: "on"\nactivations: "recompute_layers=32,micro_tokens=4096"\nout: null\n'
    )
    config = resolve(load_recipe(path)).config
    assert (config.max_length, config.gpu_memory, config.on_long) == (512, "8GiB", "drop")
    assert (config.field_map, config.memory_policy) == ({"response": "007"}, "recompute_layers=32,micro_tokens=4096")


def test_a_config_takes_the_names_too():
    assert RunConfig(learning_rate=1e-3, gradient_checkpointing=True) == RunConfig(lr=1e-3, memory_policy="recompute")


def test_aliases_are_found_both_ways():
    for setting in KEYS:
        for alias in aliases_of(setting):
            assert alias in SWITCHES or our_name(alias, KEYS) in (setting, alias), alias
    assert "learning_rate" in aliases_of("lr")
