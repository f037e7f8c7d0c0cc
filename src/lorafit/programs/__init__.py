"""programs: other programs that lorafit starts, waits for and stops."""

from lorafit.programs.program import Program, free_port, post_json
from lorafit.programs.vllm import VLLM_VARIABLE, find_vllm, vllm_command, vllm_program

__all__ = [
    "VLLM_VARIABLE",
    "Program",
    "find_vllm",
    "free_port",
    "post_json",
    "vllm_command",
    "vllm_program",
]
