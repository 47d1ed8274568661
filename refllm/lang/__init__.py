"""Programs around a language model: text, generated text, decisions and branches in one
function, whose requests share an engine and its prefix cache.

Read ``primitives`` first: what a program appends. Then ``state``: what a program appends it to,
and how states branch; ``runtime``: the engine that serves all of them, and what was saved.

1. ``primitives``: ``gen``, ``select``, ``system``, ``user``, ``assistant``.
2. ``choices``: the three rules by which ``select`` decides.
3. ``state``: ``State`` and its branches.
4. ``runtime``: ``Runtime``, ``Program``.

Source: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs"
(2024), §2 (the language) and §3 (RadixAttention).

Left out: images and video, tracing and compiling a program, choosing the order of requests by a
program's structure.
"""

from refllm.lang.choices import RULES, Decision
from refllm.lang.primitives import Gen, Role, Select, assistant, gen, select, system, user
from refllm.lang.runtime import Program, Runtime, Savings, program
from refllm.lang.state import Branches, State

__all__ = [
    "RULES",
    "Branches",
    "Decision",
    "Gen",
    "Program",
    "Role",
    "Runtime",
    "Savings",
    "Select",
    "State",
    "assistant",
    "gen",
    "program",
    "select",
    "system",
    "user",
]
