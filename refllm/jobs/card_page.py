"""The page of a model card: the record of ``model_card`` as Markdown, in the form that the
Hugging Face hub reads.

Left out: any number that the record does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from refllm.jobs.model_card import Record


def page(record: Record) -> str:
    """The card as Markdown; it depends on the record alone."""
    sections = [
        _front(record),
        f"# {record['name']}",
        _what_it_is(record),
        "## Data",
        _data(record["data"]),
        "## Training",
        _training(record["training"]),
        "## Measured",
        _measured(record["measured"], record["made with"]["python"]),
        "## What it is good for, and what not",
        "Measuring: perplexity, KL divergence between a model and its quantised form, "
        "acceptance in speculative decoding, caches, schedulers. It writes text that "
        "looks like its data, without meaning.\n\nIt knows no facts, follows no "
        "instructions, and its code is not to be run. Small models have no activation "
        "outliers: methods that treat these (LLM.int8(), SmoothQuant) have little to do "
        "here.",
    ]
    return "\n\n".join(sections) + "\n"


def _front(record: Record) -> str:
    """The YAML header that the hub reads."""
    python = record["data"]["code"]
    lines = ["license: mit", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags:", "  - refllm"]
    if python:
        lines += ["  - python", "  - code"]
    return "\n".join(["---", *lines, "---"])


def _what_it_is(record: Record) -> str:
    """Size, type and origin in one paragraph."""
    made = record["made with"]
    origin = "from random weights"
    source = "the command"
    if record["training"].get("start"):
        origin = "in several runs"
        source = "the last of the commands"
    return (
        f"A {record['architecture']}. {record['parameters']:,} parameters, stored as "
        f"{record['stored as']}, trained {origin} by refllm "
        f"{made['refllm']} (NumPy {made['numpy']}, Python {made['python']}); "
        "`transformers` loads this directory as it is. Every number on this page was "
        f"computed by {source} below; "
        "`card.json` holds them for programs."
    )


def _data(data: Record) -> str:
    """The streams of text as a table."""
    rows = [
        [
            name,
            f"{s['documents']:,}",
            f"{s['bytes'] / 1e6:.2f} MB",
            f"{s['tokens']:,}",
            f"{s['passes']:.1f}",
        ]
        for name, s in data["streams"].items()
    ]
    held = data["held out"]
    rows.append(
        [
            "held out",
            f"{held['documents']:,}",
            f"{held['bytes'] / 1e6:.2f} MB",
            f"{held['tokens']:,}",
            "0",
        ]
    )
    return (
        f"Trained on {data['name']}. The text is not part of this directory: "
        "`manifest.json` lists the name and the SHA-256 of every document.\n\n"
        + _table(["stream", "documents", "text", "tokens", "passes"], rows)
    )


def _training(training: Record) -> str:
    """Phases, optimizer and the command that reproduces the run."""
    plan = training["plan"]
    phases = "; ".join(
        f"{p['steps']:,} steps of {p['batch']} × {p['length']}"
        for p in plan["phases"]
        if p["steps"]
    )
    taught = ""
    if training["teacher"]:
        taught = f" Distilled from {training['teacher']}."
    name = {"adamw": "AdamW", "muon": "Muon for the layers' matrices and AdamW for the rest"}[
        plan.get("optimizer", "adamw")
    ]
    remark = f" {training['remark']}" if training["remark"] else ""
    return (
        f"{phases} tokens ({training['tokens']:,} in all, {training['seconds'] / 60:.0f} "
        f"minutes). {name}, peak rate {plan['peak_rate']:g} after {plan['warmup']} steps "
        f"of warm-up, then {plan['schedule']} to zero; weight decay "
        f"{plan['weight_decay']:g}, gradients clipped at {plan['clip']:g}, seed "
        f"{plan['seed']}.{taught} The curve is in "
        f"`curve.json`.{remark}{_start(training)}\n\n```sh\n{training['command']}\n```"
    )


def _start(training: Record) -> str:
    """The runs before this one, back to random weights; the counts above are those of the
    last run alone.
    """
    start = training.get("start")
    if not start:
        return ""
    text = f" It went on from weights called {start['name']} ({_digest(start)})"
    if share := training.get("start share"):
        text += f". What is stored is {1 - share:g} of the last weights and {share:g} of those"
    runs = []  # the latest first
    while start and start["training"]:
        runs.append((start["training"], _digest(start)))
        start = start["training"].get("start")
    if not runs:
        return text + "."
    lines = [
        f"{i}. {run['steps']:,} steps, {run['tokens']:,} tokens, which gave {digest}: "
        f"`{run['command']}` "
        f"{run.get('remark') or ''}".rstrip()
        for i, (run, digest) in enumerate(reversed(runs), 1)
    ]
    count = sum(run["tokens"] for run, _ in runs)
    plural = "s" if len(runs) > 1 else ""
    before = (
        f"Before it {count:,} tokens were read in {len(runs)} run{plural}, each from the "
        "end of the one above it"
    )
    return f"{text}.\n\n{before}:\n\n" + "\n".join(lines) + "\n\nThe last run:"


def _digest(start: Record) -> str:
    """The beginning of the SHA-256 of a model's weights."""
    return f"SHA-256 {next(iter(start['sha256'].values()), '')[:12]}…"


def _measured(m: Record, python: str) -> str:
    """Losses per document and per context length; samples; distance from the teacher."""
    lines = [
        f"**{m['bits per byte']:.3f} bits per byte** (perplexity {m['perplexity']:.2f}, "
        f"{m['nats per token']:.3f} nats per token) on {m['tokens']:,} held-out tokens, "
        f"Python {python}, windows of {m['window']:,} every {m['stride']:,} tokens.",
        _table(
            ["document", "tokens", "bytes", "bits per byte"],
            [
                [d["name"], f"{d['tokens']:,}", f"{d['bytes']:,}", f"{d['bits per byte']:.3f}"]
                for d in m["documents"]
            ],
        ),
        f"By the number of tokens read before (windows of {m['window']:,} without overlap):",
        _table(
            ["tokens before", "scored", "bits per byte"],
            [
                [_range(b["from"], b["to"]), f"{b['tokens']:,}", f"{b['bits per byte']:.3f}"]
                for b in m["by context"]
            ],
        ),
    ]
    if samples := m.get("samples"):
        lines += [
            f"Share of {samples['count']} samples at temperature {samples['temperature']} "
            f"that pass Python {python}'s `tokenize` once their last line is trimmed, and "
            "of the beginnings of real files, which may be cut inside brackets or a long "
            "string too:",
            _table(
                ["tokens", "samples", "real files"],
                [
                    [f"{x['tokens']}", f"{x['share']:.0%}", f"{x['share of real text']:.0%}"]
                    for x in samples["by length"]
                ],
            ),
        ]
    if near := m.get("against the teacher"):
        lines.append(
            f"Against its teacher, on {near['tokens']:,} held-out tokens: acceptance Σ "
            f"min(p, q) {near['acceptance']:.3f} at temperature 1, top-1 agreement "
            f"{near['same first choice'][0]:.3f}, KL {near['KL'][0]:.3f} nats."
        )
    return "\n\n".join(lines)


def _range(low: int, high: int) -> str:
    """An inclusive range of token counts.

    >>> _range(0, 0), _range(1, 1023)
    ('0', '1–1,023')
    """
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right.

    >>> print(_table(["file", "bytes"], [["a.py", "12"]]))
    | file | bytes |
    | --- | ---: |
    | a.py | 12 |
    """
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])
