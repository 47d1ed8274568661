"""Three language programs on the pretrained model, with shared prefixes and one engine, and the
naive way: one request after the other, nothing cached.

Source: Zheng et al. 2024 (SGLang), §2 and §6; Yao et al. 2023 for the tree of thought.

| program          | what it does                                       | what it shares           |
|------------------|----------------------------------------------------|--------------------------|
| tree of thought  | three ideas per level, the model votes for each,   | the text so far, between |
|                  | the best is continued                              | ideas and votes          |
| JSON extraction  | facts of a sentence under a JSON Schema            | instruction and examples |
| multiple choice  | which topic is a sentence from, by ``select``      | examples; text of a      |
|                  |                                                    | question between choices |

Answers are the same both ways (greedy, or sampled with the same seeds). Counted are tokens
through the network and forward passes; no times, which depend on the device.

    python -m refllm.experiments.language_programs

Left out: how good the answers of a model of 135 million parameters are, beyond the share of
right choices.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refllm.api import Model, load
from refllm.array_types import Json
from refllm.lang import Runtime, Savings, State, gen, program, select
from refllm.measure.plotting import FULL, TECHNIQUE, new_figure, styled
from refllm.measure.records import Record, Values, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "python -m refllm.experiments.language_programs"
RECORD = Path("figures/data/language_programs.json")

# --- the programs ---------------------------------------------------------------------------


@program
def tree_of_thought(s: State, task: str, width: int = 3, depth: int = 2) -> list[float]:
    """Ideas, votes, and the best idea continued; returns the winner's vote of each level."""
    s += f"Task: {task}\nWrite one short step at a time.\n"
    votes = []
    for level in range(depth):
        s += f"Step {level + 1}:"
        ideas = s.fork(width)
        for seed, idea in enumerate(ideas):
            idea += gen("thought", max_tokens=24, stop="\n", temperature=0.9, seed=seed)
            idea += "\nIs this a good step? Answer:"
            idea += select("vote", [" yes", " no"])
        ideas.join()
        scores = [_preference(idea) for idea in ideas]
        best = scores.index(max(scores))
        votes.append(max(scores))
        s += ideas[best]["thought"] + "\n"
    return votes


def _preference(idea: State) -> float:
    """log p(yes) − log p(no), each a mean over its tokens."""
    yes, no = idea.meta("vote").scores  # type: ignore[union-attr]  # of a select
    return float(yes - no)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 24},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
EXAMPLES = """Extract name, age and city as JSON.
Text: Yesterday I met Ada, who is 36 and lives in London.
JSON: {"name": "Ada", "age": 36, "city": "London"}
Text: Karl moved to Bonn when he turned 52.
JSON: {"name": "Karl", "age": 52, "city": "Bonn"}
"""


@program
def extract(s: State, text: str) -> object:
    """The facts of a sentence as a value that the schema accepts."""
    s += EXAMPLES + f"Text: {text}\nJSON: "
    s += gen("facts", max_tokens=64, json_schema=PERSON)
    return json.loads(s["facts"])


@program
def choose_topic(s: State, sentence: str, topics: Sequence[str]) -> str:
    """Which topic of a reference manual a sentence is from."""
    s += (
        "Which topic of the Python reference is each sentence from?\n"
        "Sentence: The try statement specifies exception handlers.\nTopic: try\n"
        "Sentence: Strings can be concatenated with the + operator.\nTopic: strings\n"
    )
    s += f"Sentence: {sentence}\nTopic:"
    s += select("topic", [f" {topic}" for topic in topics])
    return str(s["topic"]).strip()


# --- their inputs ---------------------------------------------------------------------------

TASKS = [
    "Plan a birthday party for ten children.",
    "Explain to a friend how to bake bread.",
]
PEOPLE = [
    "My neighbour Maria, 41, has always lived in Madrid.",
    "At 29, Tom left his job and went to live in Oslo.",
    "Lena is 8 years old and goes to school in Vienna.",
    "The winner was Ivan from Sofia, only 17.",
    "Aunt Rosa celebrated her 90th birthday in Naples.",
    "Paul, a 33 year old baker, works in Lyon.",
]


def questions(count: int = 8) -> list[Json]:
    """Sentences of ``pydoc_data.topics`` and four topics each, of which one is right."""
    from pydoc_data.topics import topics

    names = [name for name in sorted(topics) if name.isalpha() and name not in ("try", "strings")]
    chosen = names[:: max(1, len(names) // count)][:count]
    found = []
    for i, name in enumerate(chosen):
        text = " ".join(topics[name].split("\n\n")[2].split())[:160]
        others = [chosen[(i + k) % count] for k in (1, 2, 3)]
        options = sorted([name, *others])
        found.append({"sentence": text, "topics": options, "right": name})
    return found


# --- both ways ------------------------------------------------------------------------------


def tree(runtime: Runtime) -> list[object]:
    """The texts of all trees."""
    return [s.text for s in tree_of_thought.run_batch(runtime, [{"task": task} for task in TASKS])]


def extraction(runtime: Runtime) -> list[object]:
    """The facts of all sentences."""
    return [s.returned for s in extract.run_batch(runtime, [{"text": text} for text in PEOPLE])]


def multiple_choice(runtime: Runtime) -> list[object]:
    """The chosen topics."""
    cases = [{key: q[key] for key in ("sentence", "topics")} for q in questions()]
    return [s.returned for s in choose_topic.run_batch(runtime, cases)]


PROGRAMS: dict[str, Callable[[Runtime], list[object]]] = {
    "tree of thought": tree,
    "JSON extraction": extraction,
    "multiple choice": multiple_choice,
}


def measure(model: Model, name: str) -> Json:
    """One program both ways; ValueError if its answers differ."""
    counts: dict[str, Savings] = {}
    answers: dict[str, list[object]] = {}
    for way in ("shared", "naive"):
        options: Json = {} if way == "shared" else {"prefix_cache": None, "concurrent": False}
        with Runtime(model, **options) as runtime:
            answers[way] = PROGRAMS[name](runtime)
            counts[way] = runtime.savings
    row: Json = {"program": name, "same_answers": answers["shared"] == answers["naive"]}
    for way, found in counts.items():
        row[way] = vars(found) | {"hit_rate": found.hit_rate}
    if name == "multiple choice":
        right = [q["right"] for q in questions()]
        row["right"] = sum(a == b for a, b in zip(answers["shared"], right, strict=True))
        row["questions"] = len(right)
    return row


@styled
def draw(values: Values) -> Figure:
    """Tokens through the network and forward passes, relative to the naive way."""
    rows = values["rows"]
    figure = new_figure(height=2.6)
    panels = [
        ("computed_tokens", "tokens through the network"),
        ("forward_passes", "forward passes"),
    ]
    names = [row["program"] for row in rows]
    for ax, (key, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        shares = [100 * row["shared"][key] / row["naive"][key] for row in rows]
        ax.barh(names, [100] * len(rows), color=FULL, alpha=0.2)
        ax.barh(names, shares, color=TECHNIQUE)
        for name, share in zip(names, shares, strict=True):
            ax.text(share + 2, name, f"{share:.0f} %", va="center")
        ax.set_xlim(0, 112)
        ax.set_xlabel("% of the naive way")
        ax.set_title(label)
    figure.axes[0].invert_yaxis()
    figure.suptitle("Programs that share prefixes compute a part of what the naive way computes")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the record."""
    parser = argparse.ArgumentParser(description="language programs, shared and naive")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", type=Path, default=RECORD)
    chosen = parser.parse_args(arguments)
    model = load(chosen.model)
    rows = []
    for name in PROGRAMS:
        rows.append(measure(model, name))
        print(json.dumps(rows[-1]), file=sys.stderr)
    write(chosen.output, Record(COMMAND, "A", "none", {"model": chosen.model, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
