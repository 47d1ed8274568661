"""A model card whose every number is computed: the record of a trained model, and the page
made from it.

| part of the record | what it holds                                                                        |
|--------------------|--------------------------------------------------------------------------------------|
| ``data``           | documents, bytes, tokens of each stream, and how often each was passed through       |
| ``training``       | the plan, steps, tokens, seconds, the command that reproduces it                     |
| ``measured``       | bits per byte (by document, by length of the context), samples that tokenize, and    |
|                    | for a draft its distance from the model that it was distilled from                   |

The acceptance of a draft q by its target p at temperature 1 is the mean over positions of Σ
min(p, q), the probability that speculative sampling keeps a drafted token (Leviathan et al.
2023, theorem 3.5, β = 1 − D_LK).

Left out: benchmarks of facts or instructions, which models of this size do not have.
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from refllm.api import Model
from refllm.backend import namespace, to_numpy
from refllm.corpus import Document
from refllm.decode.sampling_params import SamplingParams
from refllm.measure.comparison import compare
from refllm.measure.perplexity import bits_by_position, evaluate
from refllm.measure.windows import plan_windows

Progress = Callable[[str, int, int], None]  # (what, done, total)
Record = dict[str, Any]
SAMPLES = 100
SAMPLE_TEMPERATURE = 0.8
SAMPLE_LENGTHS = (64, 128, 256)  # tokens: the shorter are beginnings of the longest


def measure(
    model: Model,
    held_out: Sequence[Document],
    *,
    code: Sequence[Document] = (),
    teacher: Model | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Record:
    """The ``measured`` part of a card. ``code`` is Python that samples are compared with,
    if that is what it writes.
    """
    window = min(1024, model.config.max_position_embeddings)

    def scored(stride: int, what: str) -> Any:
        return evaluate(
            model,
            held_out,
            window=window,
            stride=stride,
            progress=lambda done, total: progress(what, done, total),
        )

    score = scored(max(1, window // 2), "held-out text")
    record: Record = {
        "bits per byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "nats per token": score.nats_per_token,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "window": score.window,
        "stride": score.stride,
        "documents": [
            {"name": d.name, "tokens": d.tokens, "bytes": d.bytes, "bits per byte": d.bits_per_byte}
            for d in score.documents
            if d.tokens
        ],
    }
    by_length = bits_by_position(scored(window, "by length of the context"))
    record["by context"] = [
        {
            "from": b.low,
            "to": b.high,
            "tokens": b.tokens,
            "nats per token": b.nats_per_token,
            "bits per byte": b.bits_per_byte,
        }
        for b in by_length
    ]
    if code:
        progress("samples", 0, 1)
        record["samples"] = sample_record(model, code, np.random.default_rng(seed))
    if teacher is not None:
        record["against the teacher"] = _against(model, teacher, held_out, window, seed, progress)
    return record


def sample_record(model: Model, real: Sequence[Document], rng: np.random.Generator) -> Record:
    """The share of free samples that Python's own tokenizer reads once the last line is
    trimmed, by length.

    A text that is cut inside brackets or a long string does not pass, however good it is.
    So the same is measured on the beginnings of documents drawn from ``real``: that is what
    could be reached.
    """
    begin = model.config.bos_token_id or 0
    longest = min(SAMPLE_LENGTHS[-1], model.config.max_position_embeddings - 1)
    sampling = SamplingParams(temperature=SAMPLE_TEMPERATURE)
    ids = model.generate_batch([[begin]] * SAMPLES, longest, sampling=sampling, rng=rng)
    chosen = [real[i] for i in rng.permutation(len(real))[:SAMPLES]]
    texts = [model.tokenizer.encode(d.text[: 40 * longest])[:longest] for d in chosen]

    def share(parts: Sequence[Sequence[int]], length: int) -> float:
        return sum(tokenizes(model.tokenizer.decode(part[:length])) for part in parts) / len(parts)

    lengths = sorted({min(length, longest) for length in SAMPLE_LENGTHS})
    return {
        "count": SAMPLES,
        "temperature": SAMPLE_TEMPERATURE,
        "by length": [
            {"tokens": n, "share": share(ids, n), "share of real text": share(texts, n)}
            for n in lengths
        ],
    }


def tokenizes(text: str) -> bool:
    """Does ``tokenize`` read the text up to its last line break? What follows it may be cut
    anywhere.
    """
    whole = text[: text.rfind("\n") + 1]
    try:
        for _ in tokenize.generate_tokens(io.StringIO(whole).readline):
            pass
    except (tokenize.TokenError, SyntaxError):  # IndentationError is a SyntaxError
        return False
    return True


def acceptance(model: Model, target: Model, documents: Iterable[Document], window: int) -> float:
    """Mean Σ min(p, q) over every position of the documents, read in windows that do not
    overlap.
    """
    whole = plan_windows(model, list(documents), window, window)
    total = 0.0
    count = 0
    for w in whole.windows:
        tokens = whole.tokens[w.document][w.begin : w.end]
        q, p = (_probabilities(m.logits(tokens)) for m in (model, target))
        xp = namespace(p, q)
        total += float(to_numpy(xp.sum(xp.minimum(p, q))))
        count += len(tokens)
    return total / count


def _probabilities(z: Any) -> Any:
    xp = namespace(z)
    p = xp.exp(z - xp.max(z, axis=-1, keepdims=True))
    return p / xp.sum(p, axis=-1, keepdims=True)


def _against(
    model: Model,
    teacher: Model,
    held_out: Sequence[Document],
    window: int,
    seed: int,
    progress: Progress,
) -> Record:
    result = compare(
        model,
        teacher,
        held_out,
        rng=np.random.default_rng(seed),
        window=window,
        stride=window,
        progress=lambda done, total: progress("against the teacher", done, total),
    )
    return {
        "tokens": result.model.tokens,
        "KL": [result.kl.mean, result.kl.low, result.kl.high],
        "same first choice": [result.agreement.mean, result.agreement.low, result.agreement.high],
        "interval": result.method,
        "acceptance": acceptance(model, teacher, held_out, window),
    }


def page(record: Record) -> str:
    """The card as Markdown, in the form that the Hugging Face hub reads; a function of the
    record alone.
    """
    data, training, measured = (record[key] for key in ("data", "training", "measured"))
    sections = [
        _front(record),
        f"# {record['name']}",
        _what_it_is(record),
        "## Data",
        _data(data),
        "## Training",
        _training(training),
        "## Measured",
        _measured(measured, record["made with"]["python"]),
        "## What it is good for, and what not",
        "Measuring: perplexity, KL divergence between a model and its quantised form, acceptance in speculative "
        "decoding, caches, schedulers. It writes text that looks like its data, without meaning.\n\n"
        "It knows no facts, follows no instructions, and its code is not to be run. Small models have no activation "
        "outliers: methods that treat these (LLM.int8(), SmoothQuant) have little to do here.",
    ]
    return "\n\n".join(sections) + "\n"


def _front(record: Record) -> str:
    python = record["data"]["code"]
    lines = ["license: mit", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags:", "  - refllm"] + (["  - python", "  - code"] if python else [])
    return "\n".join(["---", *lines, "---"])


def _what_it_is(record: Record) -> str:
    made = record["made with"]
    went_on = bool(record["training"].get("start"))
    return (
        f"A {record['architecture']}. {record['parameters']:,} parameters, stored as {record['stored as']}, "
        f"trained {'in several runs' if went_on else 'from random weights'} by refllm {made['refllm']} "
        f"(NumPy {made['numpy']}, Python {made['python']}); `transformers` loads this directory as it is. Every number "
        f"on this page was computed by {'the last of the commands' if went_on else 'the command'} below; `card.json` "
        "holds them for programs."
    )


def _data(data: Record) -> str:
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
        f"Trained on {data['name']}. The text is not part of this directory: `manifest.json` lists the name and the "
        "SHA-256 of every document.\n\n"
        + _table(["stream", "documents", "text", "tokens", "passes"], rows)
    )


def _training(training: Record) -> str:
    plan = training["plan"]
    phases = "; ".join(
        f"{p['steps']:,} steps of {p['batch']} × {p['length']}"
        for p in plan["phases"]
        if p["steps"]
    )
    if training["teacher"]:
        taught = f" Distilled from {training['teacher']}."
    else:
        taught = ""
    name = {"adamw": "AdamW", "muon": "Muon for the layers' matrices and AdamW for the rest"}[
        plan.get("optimizer", "adamw")
    ]
    remark = f" {training['remark']}" if training["remark"] else ""
    return (
        f"{phases} tokens ({training['tokens']:,} in all, {training['seconds'] / 60:.0f} minutes). {name}, peak rate "
        f"{plan['peak_rate']:g} after {plan['warmup']} steps of warm-up, then {plan['schedule']} to zero; weight decay "
        f"{plan['weight_decay']:g}, gradients clipped at {plan['clip']:g}, seed {plan['seed']}.{taught}"
        f" The curve is in `curve.json`.{remark}{_start(training)}\n\n```sh\n{training['command']}\n```"
    )


def _start(training: Record) -> str:
    """Where a run went on from, back to random weights; the counts above are those of the
    last run itself.
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
        f"{i}. {run['steps']:,} steps, {run['tokens']:,} tokens, which gave {digest}: `{run['command']}` "
        f"{run.get('remark') or ''}".rstrip()
        for i, (run, digest) in enumerate(reversed(runs), 1)
    ]
    count = sum(run["tokens"] for run, _ in runs)
    plural = "s" if len(runs) > 1 else ""
    before = f"Before it {count:,} tokens were read in {len(runs)} run{plural}, each from the end of the one above it"
    return f"{text}.\n\n{before}:\n\n" + "\n".join(lines) + "\n\nThe last run:"


def _digest(start: Record) -> str:
    return f"SHA-256 {next(iter(start['sha256'].values()), '')[:12]}…"


def _measured(m: Record, python: str) -> str:
    lines = [
        f"**{m['bits per byte']:.3f} bits per byte** (perplexity {m['perplexity']:.2f}, {m['nats per token']:.3f} nats "
        f"per token) on {m['tokens']:,} held-out tokens, Python {python}, windows of {m['window']:,} every "
        f"{m['stride']:,} tokens.",
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
            f"Share of {samples['count']} samples at temperature {samples['temperature']} that pass Python {python}'s "
            "`tokenize` once their last line is trimmed, and of the beginnings of real files, which may be cut inside "
            "brackets or a long string too:",
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
            f"Against its teacher, on {near['tokens']:,} held-out tokens: acceptance Σ min(p, q) "
            f"{near['acceptance']:.3f} at temperature 1, the same first choice {near['same first choice'][0]:.3f}, "
            f"KL {near['KL'][0]:.3f} nats."
        )
    return "\n\n".join(lines)


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])
