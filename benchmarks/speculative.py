r"""What speculation gains on this machine: tokens per step, wall clock against plain decoding,
the cost of verification.

    python benchmarks/speculative.py --output benchmarks/results/speculative.json \
        --figure figures/data/speculative.json

Batch 1, float32, one thread. The baseline is the fastest plain decoding that refllm has
(``generate_tokens``), on the same prompts in the same round; each ratio is plain time over
speculative time, median and range of the rounds. Greedy texts are compared token for token;
differences at a near tie of two float32 sums are counted.

| task | prompts                                                    | left out                  |
|------|------------------------------------------------------------|---------------------------|
| code | pieces of held-out modules                                 | outputs that loop         |
| copy | a piece of a held-out module, then its beginning again     | the same, and outputs     |
|      |                                                            | with fewer than 30 % of   |
|      |                                                            | 8-grams from the prompt   |

Drafters: ``model``, a chain of γ tokens of the draft model; ``tree``, a chain as long as it
is sure and a fan of what is left of γ nodes (``TreeDrafter``); ``n-gram``; ``n-gram,
tree``, the tree where no n-gram is found.

An output loops if more than a fifth of its 8-grams stood in it before: prompt lookup looks
wonderful on those. The tasks are picked by the plain greedy output, before anything is
drafted; a temperature above 0 uses the same prompts.

Beside each measurement stands the formula τ t(1) / (t(γ+1) + d c) with the τ, t and c of
this run, d the calls of the draft model a step (γ in a chain), and the projection for a
device on which t is flat and a step costs its bytes: τ / (1 + d b), b the draft's share of
the target's bytes. Then batches in the engine: the size from which drafting loses, without
and with γ chosen by cost. Last, ``verify`` alone at V = 128k, γ = 8, against p.sum() +
q.sum().
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, finish, ratios, shown, table
from threadpoolctl import threadpool_limits

from refllm.api import Model, load
from refllm.backend import finite_argmax
from refllm.corpus import held_out_documents
from refllm.decode.fast.captured_step import make_decode_step
from refllm.decode.generate import generate_tokens
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.decode.speculative.acceptance import Acceptance, speedup
from refllm.decode.speculative.cascade import Cascade
from refllm.decode.speculative.interface import Drafter
from refllm.decode.speculative.loop import speculate
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.decode.speculative.verification import verify, verify_block
from refllm.kv.contiguous import ContiguousCache
from refllm.measure.records import Record
from refllm.measure.records import write as write_record
from refllm.serve.adaptive_drafts import AdaptiveDrafting
from refllm.serve.draft_costs import measure_costs
from refllm.serve.engine import Engine
from refllm.serve.request import Request

GRAM = 8
LONG = (7, 15)  # drafts that cost nothing may be many: with the token before them, 8 and 16 rows


# --- tasks --------------------------------------------------------------------------------


def loops(tokens: Sequence[int]) -> bool:
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return len(set(grams)) < 0.8 * len(grams)


def copied(prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Share of the output's 8-grams that stand in the prompt."""
    known = {tuple(prompt[i : i + GRAM]) for i in range(len(prompt) - GRAM + 1)}
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return sum(g in known for g in grams) / len(grams)


def tasks(model: Model, count: int, new: int) -> dict[str, dict[str, Any]]:
    """The first prompts of each kind whose plain greedy output qualifies, and how many were
    looked at.
    """
    pieces = []
    for document in held_out_documents():
        ids = model.tokenizer.encode(document.text)
        pieces += [ids[i : i + 240] for i in range(0, len(ids) - 240, 240)]
    order = np.random.default_rng(0).permutation(len(pieces))
    made: dict[str, dict[str, Any]] = {}
    for name in ("code", "copy"):
        chosen = []
        looked = 0
        share = []
        for i in order:
            if len(chosen) == count:
                break
            prompt = pieces[i] if name == "code" else [*pieces[i], *pieces[i][:24]]
            text = plain(model, prompt, new, GREEDY)
            looked += 1
            if not loops(text) and (name == "code" or copied(prompt, text) >= 0.3):
                chosen.append(prompt)
                share.append(copied(prompt, text))
        if not chosen:
            raise SystemExit(f"no prompt qualifies for the task {name}: the comparison is void")
        made[name] = {"prompts": chosen, "looked_at": looked, "copied": statistics.mean(share)}
        print(
            f"{name}: {len(chosen)} prompts of {looked}, {statistics.mean(share):.0%} copied",
            file=sys.stderr,
        )
    return made


def plain(model: Model, prompt: Sequence[int], new: int, sampling: SamplingParams) -> list[int]:
    rng = np.random.default_rng(1)
    return [
        t for (t,) in generate_tokens(model.weights, model.config, [prompt], new, sampling, rng)
    ]


# --- wall clock ---------------------------------------------------------------------------


def race(
    model: Model,
    make: dict[str, Callable[[], Drafter]],
    prompts: Sequence[Sequence[int]],
    new: int,
    sampling: SamplingParams,
    rounds: int,
) -> dict[str, Any]:
    """Each drafter against plain decoding, in turn; the time of a prompt's prefill is in
    neither.
    """
    drafters = {name: one() for name, one in make.items()}
    times: dict[str, list[float]] = {name: [] for name in ("plain", *drafters)}
    stats = {name: Acceptance() for name in drafters}
    models = {
        name: next(
            (d for d in getattr(one, "drafters", [one]) if isinstance(d, ModelDrafter)), None
        )
        for name, one in drafters.items()
    }
    parted = dict.fromkeys(drafters, 0)
    for number in range(rounds):
        spent = dict.fromkeys(times, 0.0)
        for k, prompt in enumerate(prompts):
            began = 0.0
            first = True
            text = []
            for (token,) in generate_tokens(
                model.weights, model.config, [prompt], new, sampling, np.random.default_rng(k)
            ):
                text.append(token)
                if first:
                    began = time.perf_counter()
                    first = False
            spent["plain"] += time.perf_counter() - began
            for name, drafter in drafters.items():
                rng = np.random.default_rng(100 * number + k)
                steps = []
                began = 0.0
                for step in speculate(
                    model.weights, model.config, prompt, new, sampling, rng, drafter
                ):
                    steps.append(step)
                    began = began or time.perf_counter()
                spent[name] += time.perf_counter() - began
                for step in steps[1:]:
                    stats[name].add(len(step.drafts), step.accepted, step.judged)
                if sampling.temperature == 0:
                    parted[name] += [t for step in steps for t in step.tokens] != text
        for name, seconds in spent.items():
            times[name].append(seconds)
    return {
        name: {
            "speedup": ratios(times["plain"], times[name]),
            "rate": s.rate,
            "alpha": s.alpha,
            "length": s.length,
            "by_place": s.by_place[:12],
            "parted": parted[name],
            "proposed_a_step": s.proposed / s.steps,
            "passes_a_step": 0.0 if (one := models[name]) is None else one.passes / s.steps,
        }
        for name, s in stats.items()
    }


def step_costs(
    model: Model, draft: Model, most: int, rounds: int, context: int = 256
) -> dict[str, Any]:
    """t(n) of one sequence for n = 1 … most and the time of a draft, microseconds, medians
    in turn.
    """
    cache = ContiguousCache(model.config, 1, context + most, like=model.weights["norm"])
    cache.lengths = [context]
    rng = np.random.default_rng(0)
    drafter = ModelDrafter(draft, 4)
    text = rng.integers(1, model.config.vocab_size, context).tolist()
    drafter.propose(text, 4, GREEDY, rng)
    compute = make_decode_step(model.weights, model.config)
    times: dict[int, list[float]] = {n: [] for n in range(1, most + 1)}
    drafts = []
    for _ in range(rounds):
        for n, spent in times.items():
            tokens = rng.integers(1, model.config.vocab_size, n).tolist()
            began = time.perf_counter()
            finite_argmax(compute(tokens, cache.positions([n]), cache.view([n])))
            spent.append(time.perf_counter() - began)
        began = time.perf_counter()
        drafter.propose(text, 4, GREEDY, rng)
        drafts.append((time.perf_counter() - began) / 4)
    return {
        "t": [1e6 * statistics.median(times[n]) for n in times],
        "draft": 1e6 * statistics.median(drafts),
    }


def batches(
    model: Model,
    draft: Model,
    prompts: Sequence[Sequence[int]],
    sizes: Sequence[int],
    new: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Engine time without drafts over engine time with: γ fixed at 3, and chosen by
    measured costs.
    """
    sequences = max(sizes)
    shared = {
        name: ModelDrafter(draft, 3, sampling=GREEDY, sequences=sequences)
        for name in ("fixed", "adaptive")
    }
    costs = measure_costs(model, shared["adaptive"], most=4 * sequences)
    rows = []
    for size in sizes:
        drafting = {
            name: AdaptiveDrafting(shared[name], costs=costs if name == "adaptive" else None)
            for name in shared
        }
        times: dict[str, list[float]] = {"plain": [], "fixed": [], "adaptive": []}
        for _ in range(rounds):
            for name, spent in times.items():
                # one for all rounds, as a server has it: it knows what is accepted
                drafter = drafting.get(name)
                engine = Engine(
                    model, num_blocks=sequences * 24, drafter=drafter, prefix_cache=None
                )
                for i in range(size):
                    engine.submit(
                        Request(prompts[i % len(prompts)][:64], new, request_id=i, ignore_eos=True)
                    )
                engine.step()  # the prefill
                began = time.perf_counter()
                engine.run()
                spent.append(time.perf_counter() - began)
        chosen = drafting["adaptive"].gammas
        rows.append(
            {"batch": size, "gammas": {str(g): n for g, n in sorted(chosen.items())}}
            | {name: ratios(times["plain"], times[name]) for name in shared}
        )
    return rows


def verification(rounds: int, vocab: int = 128 * 1024, gamma: int = 8) -> list[dict[str, Any]]:
    """``verify``, validation included, over p.sum() + q.sum(), in turn."""
    rows = []
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float64"):
        p, q = (rng.random((n, vocab)).astype(dtype) for n in (gamma + 1, gamma))
        p = p / p.sum(axis=-1, keepdims=True)
        q = q / q.sum(axis=-1, keepdims=True)
        draft = rng.integers(0, vocab, gamma)
        calls = {
            "sums": lambda p=p, q=q: (p.sum(), q.sum()),
            "verify": lambda p=p, q=q, d=draft: verify(p, q, d, rng),
            "verify_block": lambda p=p, q=q, d=draft: verify_block(p, q, d, rng),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
        rows.append(
            {"dtype": dtype, "sums_ms": 1e3 * statistics.median(times["sums"])}
            | {
                name: statistics.median(times[name]) / statistics.median(times["sums"])
                for name in ("verify", "verify_block")
            }
        )
    return rows


# --- the record ---------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    model = load("stdlib")
    draft = load("stdlib-draft")
    share = draft.config.num_parameters / model.config.num_parameters
    record: dict[str, Any] = {
        "benchmark": "speculative",
        "environment": environment((), {"refllm": 1}),
        "settings": {
            name: getattr(options, name)
            for name in ("prompts", "new", "rounds", "gammas", "temperatures", "batch")
        },
        "bytes_share_of_draft": share,
        "costs_us": step_costs(model, draft, 1 + max(16, *options.gammas), 15 * options.rounds),
    }
    found = tasks(model, options.prompts, options.new)
    record["tasks"] = {
        name: {k: v for k, v in task.items() if k != "prompts"} for name, task in found.items()
    }
    cost = record["costs_us"]["t"]
    c = record["costs_us"]["draft"]
    record["results"] = []
    for task in found:
        for temperature in options.temperatures:
            print(f"{task}, temperature {temperature}", file=sys.stderr)
            make: dict[tuple[str, int], Any] = {
                ("model", g): lambda g=g: ModelDrafter(draft, g) for g in options.gammas
            }
            make |= {
                ("n-gram", g): lambda g=g: NGramDrafter(g) for g in sorted({*options.gammas, *LONG})
            }
            for g in (g for g in options.gammas if g > 1):  # a tree of one node is a chain
                make["tree", g] = lambda g=g: TreeDrafter(draft, g)
                make["n-gram, tree", g] = lambda g=g: Cascade(
                    NGramDrafter(g), TreeDrafter(draft, g)
                )
            sampling = SamplingParams(temperature=temperature)
            results = race(
                model, make, found[task]["prompts"], options.new, sampling, options.rounds
            )
            for (drafter, gamma), result in results.items():
                paid = result["proposed_a_step"]  # n-grams do not always find something
                passes = result["passes_a_step"]
                time_of = float(np.interp(1 + paid, range(1, len(cost) + 1), cost)) + c * passes
                flat = 1 + passes * share
                record["results"].append(
                    {
                        "task": task,
                        "temperature": temperature,
                        "drafter": drafter,
                        "gamma": gamma,
                        **result,
                        "formula": result["length"] * cost[0] / time_of,
                        "flat": result["length"] / flat,
                        "independent": speedup(
                            result["alpha"], gamma, cost, 0 if drafter == "n-gram" else c
                        ),
                    }
                )
    record["batches"] = batches(
        model, draft, found["code"]["prompts"], options.batch, options.new, options.rounds
    )
    record["verify"] = verification(15 * options.rounds)
    return record


def show(record: dict[str, Any]) -> None:
    t = record["costs_us"]["t"]
    c = record["costs_us"]["draft"]
    picked = [n for n in (1, 2, 3, 4, 5, 7, 9, 17) if n <= len(t)]
    table(
        "cost of a step of n tokens, t(n)/t(1), and of a draft (measured here)",
        ["t(1)", *(f"t({n})" for n in picked[1:]), "draft"],
        [[f"{t[0]:.0f} us", *(f"{t[n - 1] / t[0]:.2f}" for n in picked[1:]), f"{c / t[0]:.3f}"]],
    )
    rows = [
        [
            r["task"],
            r["temperature"],
            r["drafter"],
            r["gamma"],
            f"{r['rate']:.2f}",
            f"{r['alpha']:.2f}",
            f"{r['length']:.2f}",
            shown(r["speedup"]),
            f"{r['formula']:.2f}x",
            f"{r['flat']:.2f}x",
            r["parted"],
        ]
        for r in record["results"]
    ]
    header = [
        "task",
        "T",
        "drafter",
        "γ",
        "rate (A)",
        "α (A)",
        "τ (A)",
        "plain / speculative (B)",
        "formula",
        "flat t (C)",
        "near ties",
    ]
    table("speculation, batch 1", header, rows)
    rows = [
        [r["batch"], shown(r["fixed"]), shown(r["adaptive"]), r["gammas"]]
        for r in record["batches"]
    ]
    table(
        "in the engine: without drafts / with (B)",
        ["batch", "γ = 3", "γ by cost", "γ chosen (times)"],
        rows,
    )
    rows = [
        [r["dtype"], f"{r['sums_ms']:.2f} ms", f"{r['verify']:.2f}x", f"{r['verify_block']:.2f}x"]
        for r in record["verify"]
    ]
    table(
        "V = 131,072, γ = 8, validation included, over p.sum() + q.sum() (target: 3x)",
        ["dtype", "sums", "verify", "verify_block"],
        rows,
    )
    for task, drafters, target in (
        ("code", ("model", "tree"), 1.3),
        ("code", ("n-gram, tree",), 1.3),
        ("copy", ("n-gram", "n-gram, tree"), 2.0),
    ):
        some = [r for r in record["results"] if r["task"] == task and r["drafter"] in drafters]
        if some:
            best = max(some, key=lambda r: r["speedup"]["median"])
            print(
                f"\nbest on {task} with {best['drafter']}: {shown(best['speedup'])} at γ = "
                f"{best['gamma']}, temperature {best['temperature']} (target {target}x)"
            )


def figure(record: dict[str, Any], path: Path, command: str) -> None:
    about = record["environment"]
    values = {
        name: record[name] for name in ("results", "batches", "costs_us", "bytes_share_of_draft")
    }
    hardware = f"{about['cpu']}, one thread, load {about['load_before']}"
    write_record(path, Record(command, "A, B, C", hardware, values))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with threadpool_limits(1):
        record = run(options)
    show(record)
    finish(record, options.output)
    if options.figure is not None:
        typed = sys.argv[1:] if arguments is None else arguments
        figure(record, options.figure, " ".join(["python benchmarks/speculative.py", *typed]))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speculative against plain decoding, as ratios.")
    parser.add_argument("--prompts", type=int, default=6, help="prompts a task")
    parser.add_argument("--new", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gammas", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    parser.add_argument("--figure", type=Path, help="where to write the figure's data")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
