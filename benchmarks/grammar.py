"""JSON Schema: how many real schemas are enforced exactly, and how long compiling and masks take.

    python benchmarks/grammar.py --output benchmarks/results/grammar.json

Compared with llguidance and xgrammar (``pip install 'refllm[grammars]'``) on real schemas with
instances marked valid or invalid (guidance-ai/jsonschemabench, ``maskbench/data``; the sample in
``../shared/data``, or ``--data FILE``).

Counted: an instance is what ``json.dumps(data, ensure_ascii=False)`` writes, read token by token
by the bundled tokenizer. A schema is right if it compiles and all its instances are judged as
marked; valid instances rejected and invalid ones accepted are counted among compiled schemas. The
schemas are divided among ``--processes`` processes. ``--judged RECORD`` takes the counts of an
earlier record and measures times alone.

Measured here: processor time of compiling (without the tokenizer's trie) and of each mask along
the instances of every ``--every``-th schema. ``first`` is the mask of a state that is asked for
the first time in this run of a text (in refllm mostly warm too: states repeat), ``again`` the same
one right after it. The engines take turns, schema by schema; percentiles are over all masks of a
round, the ratio is that of the medians.

Left out: the time to apply a mask to logits; several threads.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, EngineError, Worker, environment, finish, ratios, shown, spread, table

DATA = Path(os.environ.get("REFLLM_SHARED_DATA", HERE.parent.parent / "shared" / "data"))
SCHEMAS = DATA / "maskbench" / "schemas.jsonl.gz"
ENGINES = ("refllm", "llguidance", "xgrammar")
JUDGED_WITH = "stdlib"
PERCENTILES = (50, 99)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="JSON Schemas against llguidance and xgrammar.")
    parser.add_argument("--data", type=Path, default=SCHEMAS, help="schemas.jsonl.gz")
    parser.add_argument("--limit", type=int, help="the first schemas alone")
    parser.add_argument("--judged", type=Path, help="a record whose counts are taken over")
    parser.add_argument("--every", type=int, default=12, help="time every n-th schema")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2, help="for judging")
    parser.add_argument("--models", nargs="+", default=["stdlib", "smollm2"], help="vocabularies")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    options = parser.parse_args(arguments)
    if not options.data.is_file():
        print(f"no schemas at {options.data}: pass --data FILE, or set REFLLM_SHARED_DATA")
        return 2
    names = [name for name in options.engines if importlib.util.find_spec(name)]
    skipped = [name for name in options.engines if name not in names]
    for name in skipped:
        print(f"{name} is not installed: pip install 'refllm[grammars]'")
    cases = read(options.data)[: options.limit]
    if options.judged:
        counts = counts_of(options.judged, len(cases))
    else:
        counts = {name: judged(name, cases, options.processes) for name in names}
    record: dict[str, Any] = {
        "benchmark": "grammar",
        "environment": environment(("llguidance", "xgrammar"), dict.fromkeys(names, 1)),
        "settings": {
            "schemas": len(cases),
            "instances": sum(len(case["tests"]) for case in cases),
            "timed": len(cases[:: options.every]),
            "rounds": options.rounds,
            "judged_with": JUDGED_WITH,
        },
        "skipped": skipped,
        "results": {
            "judged": counts,
            "timed": [],
        },
    }
    show_judged(record)
    for model in options.models:
        row = timed(names, model, cases[:: options.every], options.rounds)
        record["results"]["timed"].append(row)
        show_timed(row)
    finish(record, options.output)
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The schemas with their instances."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def counts_of(path: Path, schemas: int) -> dict[str, Any]:
    """What an earlier record counted, of as many schemas."""
    earlier = json.loads(path.read_text())
    if earlier["settings"]["schemas"] != schemas:
        raise SystemExit(f"{path} has counts of another number of schemas than {schemas}")
    counts: dict[str, Any] = earlier["results"]["judged"]
    return counts


def requests(model: str, cases: Sequence[dict[str, Any]], timed: bool) -> list[dict[str, Any]]:
    """What the engines are asked: the schema as text, the instances as tokens."""
    import refllm

    tokenizer = refllm.load(model).tokenizer
    return [
        {
            "model": model,
            "schema": json.dumps(case["schema"]),
            "instances": [
                tokenizer.encode(json.dumps(test["data"], ensure_ascii=False))
                for test in case["tests"]
            ],
            "timed": timed,
        }
        for case in cases
    ]


# --- counted --------------------------------------------------------------------------------


def judged(name: str, cases: Sequence[dict[str, Any]], processes: int) -> dict[str, Any]:
    """One engine's judgement of all cases, divided among processes."""
    asked = requests(JUDGED_WITH, cases, timed=False)
    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(lambda i: _ask_all(name, asked[i::processes]), range(processes)))
    answers: list[dict[str, Any]] = [{}] * len(cases)
    for i, part in enumerate(parts):
        answers[i::processes] = part
    counts: Counter[str] = Counter()
    families: dict[str, list[int]] = {}
    for case, answer in zip(cases, answers, strict=True):
        right = _count(case, answer, counts)
        family = families.setdefault(case["family"], [0, 0])
        family[0] += right
        family[1] += 1
    keys = ("compiled", "right", "valid_rejected", "invalid_accepted", "crashed")
    return {key: counts[key] for key in keys} | {"right_of_family": dict(sorted(families.items()))}


def _ask_all(name: str, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of one process; one that ends is started again after the schema at fault."""
    worker = Worker(f"grammar_{name}", [], threads=1)
    answers = []
    for request in asked:
        try:
            answers.append(worker.ask(**request))
        except EngineError:
            answers.append({"rejected": "the engine's process ended", "crashed": True})
            worker.close()
            worker = Worker(f"grammar_{name}", [], threads=1)
    worker.close()
    return answers


def _count(case: dict[str, Any], answer: dict[str, Any], counts: Counter[str]) -> bool:
    """Count one schema; whether it is right."""
    counts["crashed"] += bool(answer.get("crashed"))
    if answer["rejected"] is not None:
        return False
    marks = [test["valid"] for test in case["tests"]]
    pairs = list(zip(marks, answer["verdicts"], strict=True))
    right = all(mark == verdict for mark, verdict in pairs)
    counts["compiled"] += 1
    counts["right"] += right
    counts["valid_rejected"] += pairs.count((True, False))
    counts["invalid_accepted"] += pairs.count((False, True))
    return right


# --- timed ----------------------------------------------------------------------------------


def timed(
    names: Sequence[str], model: str, cases: Sequence[dict[str, Any]], rounds: int
) -> dict[str, Any]:
    """Compile and mask times of each engine on one vocabulary, schema by schema in turn."""
    workers = {name: Worker(f"grammar_{name}", [], threads=1) for name in names}
    asked = requests(model, cases, timed=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        times: dict[str, dict[str, list[float]]] = {
            name: {"compile": [], "first": [], "again": []} for name in names
        }
        for request in asked:
            for name, worker in workers.items():
                answer = worker.ask(**request)
                if answer["rejected"] is None:
                    times[name]["compile"].append(answer["compile"])
                    times[name]["first"] += answer["first"]
                    times[name]["again"] += answer["again"]
        for name in names:
            found[name].append(_percentiles(times[name]))
    for worker in workers.values():
        worker.close()
    return {
        "model": model,
        "vocabulary": _vocabulary(model),
        "microseconds": {
            name: {key: spread([one[key] for one in each]) for key in each[0]}
            for name, each in found.items()
        },
        "ratio_to_refllm": {
            name: {
                key: ratios([one[key] for one in each], [one[key] for one in found["refllm"]])
                for key in each[0]
            }
            for name, each in found.items()
            if name != "refllm" and "refllm" in found
        },
    }


def _vocabulary(model: str) -> int:
    import refllm

    return int(refllm.load(model).config.vocab_size)


def _percentiles(times: dict[str, list[float]]) -> dict[str, float]:
    """Microseconds by name, such as ``first_p99``."""
    return {
        f"{what}_p{p}": round(float(np.percentile(values, p)) * 1e6, 2)
        for what, values in times.items()
        for p in PERCENTILES
    }


# --- shown ----------------------------------------------------------------------------------


def show_judged(record: dict[str, Any]) -> None:
    results = record["results"]["judged"]
    total = record["settings"]["schemas"]
    keys = ("compiled", "right", "valid_rejected", "invalid_accepted", "crashed")
    rows = [
        [name, *(row[key] for key in keys), f"{100 * row['right'] / total:.1f} %"]
        for name, row in results.items()
    ]
    title = f"{total} schemas, {record['settings']['instances']} instances (counted)"
    header = ["engine", *(key.replace("_", " ") for key in keys), "share right"]
    table(title, header, rows)
    families = next(iter(results.values()))["right_of_family"]
    table(
        "schemas right, by family (counted)",
        ["family", "of", *results],
        [
            [family, of, *(row["right_of_family"][family][0] for row in results.values())]
            for family, (_, of) in families.items()
        ],
    )


def show_timed(row: dict[str, Any]) -> None:
    keys = list(next(iter(row["microseconds"].values())))
    rows = []
    for name, times in row["microseconds"].items():
        rows.append([name, *(f"{times[key]['median']:,.0f}" for key in keys)])
        if name in row["ratio_to_refllm"]:
            ratio = row["ratio_to_refllm"][name]
            rows.append([f"{name} / refllm", *(shown(ratio[key]) for key in keys)])
    title = f"{row['model']}, {row['vocabulary']:,} tokens: microseconds (measured here)"
    table(title, ["engine", *(key.replace("_", " ") for key in keys)], rows)


if __name__ == "__main__":
    sys.exit(main())
