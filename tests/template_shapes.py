# ruff: noqa: E501
"""Chat templates in the shapes of nineteen families, made short: roles, tools and thinking as they show them."""

from pathlib import Path
from typing import Any

import made_tokenizers as made
from lorafit.data.template.template import Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer


def tagged(opening: str, closing: str, ask: str, roles: str = "", head: str = "") -> str:
    """Every message between two tags; `ROLE` in them is its role. `roles` are the only ones shown, when given."""
    first, last = (f"'{tag}'".replace("ROLE", "' + message.role + '") for tag in (opening, closing))
    body = f"{{{{ {first} + message.content + {last} }}}}"
    if roles:
        body = f"{{% if message.role in {roles.split()} %}}{body}{{% endif %}}"
    return f"{head}{{% for message in messages %}}{body}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{ask}' }}}}{{% endif %}}"


ALTERNATE = "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
CHATML = tagged(r"<|im_start|>ROLE\n", r"<|im_end|>\n", r"<|im_start|>assistant\n")
PHI3OLD = (
    r"{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    r"{{ '<|user|>\n' + message.content + '<|end|>\n<|assistant|>\n' }}"
    r"{% elif message.role == 'assistant' %}{{ message.content + '<|end|>\n' }}{% endif %}{% endfor %}"
)
GEMMA2 = (
    "{{ bos_token }}" + NO_SYSTEM + "{% for message in messages %}" + ALTERNATE + "{% set role = 'model' if "
    r"message.role == 'assistant' else message.role %}{{ '<start_of_turn>' + role + '\n' + message.content | trim + "
    r"'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
R1 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1]"
    r" + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
HARMONY = (
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set said = '' %}{% set rest = messages %}{% endif %}{% if said or tools %}{{ '<|start|>developer<|message|>' + said }}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ '<|end|>' }}{% endif %}{% set ns = namespace(call=none) %}"
    "{% for m in rest %}{% if m.role == 'assistant' %}{% if 'tool_calls' in m %}{% set ns.call = m.tool_calls[0].function %}"
    "{{ '<|start|>assistant to=functions.' + ns.call.name + '<|message|>' }}{{ ns.call.arguments | tojson }}{{ '<|call|>' }}"
    "{% elif loop.last and not add_generation_prompt %}{% if 'thinking' in m %}{{ '<|start|>assistant<|channel|>analysis"
    "<|message|>' + m.thinking + '<|end|>' }}{% endif %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + "
    "'<|return|>' }}{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}{% if ns.call is none %}{{ raise_exception('no tool call before') }}{% endif %}"
    "{{ '<|start|>functions.' + ns.call.name + '<|message|>' }}{{ m.content | tojson }}{{ '<|end|>' }}"
    "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
GPT_OSS = (
    "{% set ns = namespace(call=none, final=false) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if 'tool_calls' in m %}{% set ns.final = false %}{% for later in messages[loop.index:] %}"
    "{% if later.role == 'assistant' and 'tool_calls' not in later %}{% set ns.final = true %}{% endif %}{% endfor %}"
    "{% set ns.call = m.tool_calls[0].function %}{% if m.content and m.thinking %}"
    "{{ raise_exception('Cannot pass both content and thinking in an assistant message with tool calls!') }}{% endif %}"
    "{% set said = m.content or m.thinking %}{% if said and not ns.final %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + said + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant to=functions.' + ns.call.name + '<|channel|>commentary json<|message|>' }}"
    "{{ ns.call.arguments | tojson }}{{ '<|call|>' }}"
    "{% elif loop.last and not add_generation_prompt %}{% if 'thinking' in m %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.' + ns.call.name + ' to=assistant<|channel|>commentary<|message|>' }}"
    "{{ m.content | tojson }}{{ '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
"""gpt-oss' shape: thoughts beside a call are shown until a later answer stands, text or thoughts, not both."""
MISTRAL_IDS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids should be alphanumeric of length 9!') }}"
    "{% endif %}{{ ', id ' + c.id }}{% endfor %}{{ ']' + eos_token }}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids should be alphanumeric of length 9!') }}{% endif %}"
    "{{ '[TOOL_RESULTS] ' + m.content + ', id ' + m.tool_call_id + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""Mistral v3's shape with its ids: nine characters in each call and its result."""
SMOLLM3 = (
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}{% set off = '/no_think' in first %}"
    r"{{ '<|im_start|>system\nReasoning Mode: ' + ('/no_think' if off else '/think') + '\n' + first.replace('/no_think', '')"
    r" + '<|im_end|>\n' }}{% set think = '<think>\n\n</think>\n' if off else '' %}{% for m in messages %}"
    r"{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    r"{% generation %}{{ '<|im_start|>assistant\n' + think + m.content + '<|im_end|>\n' }}{% endgeneration %}"
    r"{% elif m.role == 'tool' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + think }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set said = '<<SYS>>' + messages[0].content + "
    "'<</SYS>>' %}{% else %}{% set rest = messages %}{% set said = '' %}{% endif %}{% for message in rest %}"
    + ALTERNATE
    + "{% if "
    "message.role == 'user' %}{{ bos_token + '[INST] ' + (said if loop.first else '') + message.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA4 = (
    r"{{ bos_token }}{% for m in messages %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% for c in m.tool_calls or [] %}{{ '<|tool_call>call:' + c.function.name + '{' }}{% if c.function.arguments is mapping %}"
    "{% for k, v in c.function.arguments | dictsort %}{{ k + ':' + v | string }}{% endfor %}{% else %}"
    "{{ c.function.arguments }}{% endif %}{{ '}<tool_call|>' }}{% endfor %}{{ m.content }}"
    r"{{ '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
QWEN35 = (
    r"{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n' + (m.reasoning_content or '')"
    r" + '\n</think>\n\n' + m.content }}{% for c in m.tool_calls or [] %}{{ '\n<function=' + c.function.name + '>' }}"
    "{% for k, v in c.function.arguments | items %}{{ '<parameter=' + k + '>' + v | string + '</parameter>' }}{% endfor %}"
    r"{{ '</function>' }}{% endfor %}{{ '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'"
    r" }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'tool' %}"
    "{{ '<|Tool|>' + m.content }}{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ':' + c.function.arguments }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
GRANITE = tagged(
    "<|start_of_role|>ROLE<|end_of_role|>",
    r"<|end_of_text|>\n",
    "<|start_of_role|>assistant<|end_of_role|>",
    head="{% if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' }}{{ tools | tojson }}{{ '<|end_of_text|>' }}{% endif %}",
)
IM: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra": ["<|im_start|>"]}
SAYS = {"bos_token": "<s>", "eos_token": "</s>"}
PHI: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "<|endoftext|>",
    "extra": ["<|user|>", "<|assistant|>", "<|end|>"],
}
TURNS: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>", "extra": ["<start_of_turn>", "<end_of_turn>"]}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (made.template_text(name), made.FAMILIES[name]) for name in ("llama3", "qwen2_5", "qwen3", "mistral")},
    "gemma": (made.template_text("gemma"), made.FAMILIES["gemma"]),
    "gemma2": (GEMMA2, TURNS),
    "gemma4": (GEMMA4, {"bos_token": "<bos>", "eos_token": "<eos>", "extra": ["<|turn>", "<turn|>"]}),
    "phi3": (made.template_text("phi3"), made.FAMILIES["phi3"]),
    "phi3old": (PHI3OLD, PHI),
    "phi4": (
        tagged("<|im_start|>ROLE<|im_sep|>", "<|im_end|>", "<|im_start|>assistant<|im_sep|>", "system user assistant"),
        IM,
    ),
    "r1": (R1, SAYS),
    "harmony": (HARMONY, {"eos_token": "<|return|>", "extra": ["<|start|>", "<|message|>", "<|end|>", "<|call|>"]}),
    "chatml": (CHATML, IM),
    "thinkspecial": (CHATML, {**IM, "extra": ["<|im_start|>", "<think>", "</think>"]}),
    "smollm3": (SMOLLM3, IM),
    "granite": (GRANITE, {"eos_token": "<|end_of_text|>", "extra": ["<|start_of_role|>", "<|end_of_role|>"]}),
    "llama2": (LLAMA2, SAYS),
    "qwen35": (QWEN35, IM),
    "deepseek": (DEEPSEEK, SAYS),
}


def base_folder(home: Path, shape: str) -> Path:
    """A base folder without weights whose chat template has this shape."""
    source, named = SHAPES[shape]
    return made.special_folder(home / shape, made.byte_level(), template=source, **named)


def template_of(home: Path, shape: str) -> Template:
    """The template of this shape over a small tokenizer."""
    return Template.for_tokenizer(TextTokenizer.from_folder(base_folder(home, shape)))
