"""Chat templates written for the tests, one for each way in which published ones are written,
and conversations to render with them.

Each file of ``tests/jinja`` is new text; what it shares with the published templates of its
kind is their constructs:

| template       | constructs |
|----------------|------------|
| chatml         | a loop, a default system message, expressions that join by + |
| blocks         | trim_blocks and lstrip_blocks: statements on lines of their own, indented |
| llama3_tools   | tools as indented JSON, tool calls, the date, scopes, is not defined |
| mistral        | alternation enforced, the system message joined to the first user message |
| mistral_tools  | the tools beside the last user message, selectattr, namespace counters |
| qwen25         | tools in XML tags, loop.previtem and nextitem around runs of tool results |
| qwen3          | a reversed scan with a namespace, reasoning cut out by split and strip |
| gemma          | alternation enforced, a role renamed, content as text or as a list of parts |
| phi            | control tokens made of roles |
| loop_controls  | loop controls |
| macros         | macros with defaults and keyword arguments, call blocks |
| generation     | the generation tag, with a variable of its own scope |
| documents      | documents, enumerated; format by % and by format |
| json           | JSON: non-ASCII text, separators, sorted keys, numbers, quotes |
| strings        | string methods, slices, tests |
| values         | lists and dicts: filters, dict methods, tests of types, arithmetic |
| scopes         | a set block, a filter block, with, nested loops and loop.depth |
| reasoning      | a tool role with names, ids and reasoning under its other names |
| joins          | joining with ~ and +, conditional expressions without else, undefined names |
| deepseek       | state and text in a namespace, content cut at a tag, non-ASCII tokens |
| schema         | a recursive macro over JSON schemas, map with a filter, dotted attributes |
| zephyr         | statements and expressions on lines of their own, eos_token |
| turns          | lists in a namespace, loops with if and else, loop.changed, splitlines |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted(Path(__file__).with_name("jinja").glob("*.jinja"))
}

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
SPECIAL += [
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<｜User｜>",
    "<｜Assistant｜>",
]
SPECIAL += ["<|user|>", "<|assistant|>", "<|system|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "  "]  # added, not special
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "wetter",
            "description": "Wie ist das Wetter in Zürich? ☀ <b>",
            "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "zeit", "description": "", "parameters": {}}},
]
DOCUMENTS = [{"title": "Eins", "text": "Erster"}, {"title": "Zwei", "text": "zweiter 'Text'"}]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = {
    "one": [user("What is the capital of France?")],
    "system": [{"role": "system", "content": " Be brief. "}, user("  Where is Zürich?\n")],
    "turns": [user("Hi"), assistant("Hello, 世界!  "), user("stop here"), assistant("why?\nso")],
    "twice": [user("a"), user("b")],
    "tools": [
        user("Wetter und Zeit?"),
        assistant(None, tool_calls=[call("wetter", ort="Zürich")]),
        {"role": "tool", "content": "18 °C", "tool_call_id": "c1", "name": "wetter"},
        {"role": "tool", "content": '{"h": 12}', "tool_call_id": "c2"},
        assistant("18 °C, um zwölf."),
    ],
    "two calls": [
        user("Beides!"),
        assistant("Gleich.", tool_calls=[call("wetter", ort="x"), call("zeit")]),
    ],
    "thinking": [
        user("2+2?"),
        assistant("<think>\nfour\n</think>\n\n4"),
        user("sure?"),
        assistant("Yes.", reasoning_content="it is four"),
    ],
    "parts": [user([{"type": "text", "text": " One "}, {"type": "text", "text": "two"}])],
    "empty": [user(""), assistant("")],
    "other roles": [user("x"), {"role": "critic", "content": "no"}, assistant("y", thinking="z")],
}
