"""What the benchmarks share: the record of the machine, engines in processes of their own,
turns, medians.

Every wall-clock number here is a ratio, measured on this machine: the engines take turns,
round after round, and a ratio is formed within each round. A shared machine changes its speed
by half from one minute to the next; that cancels in a ratio of two measurements in a row, and
the median over the rounds removes most of the rest.

Each engine has a process of its own: two engines in one process share an allocator, an OpenMP
pool and the huge pages, and the first one imported decides for both. While one works, the
others wait in a read of a pipe.

Messages are lines of JSON over the worker's standard streams. Left out: statistics beyond
the median and the range (the rounds are in the results, so anything else can be computed
from them).

Run as a program, it prints the record of this machine.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
POOLS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
FORMAT = 1  # raised when a field of a record changes its meaning


# --- the record of the machine ------------------------------------------------------------


def environment(packages: Iterable[str], threads: Mapping[str, int]) -> dict[str, Any]:
    """Hardware, versions and load; ``threads[engine]`` is how many threads compute in that
    engine.
    """
    import numpy  # noqa: F401 (brings its BLAS, which the next line asks about)
    from threadpoolctl import threadpool_info

    from refllm.measure.device import processor_details

    blas = [
        f"{p['internal_api']} {p['version']} ({p.get('architecture', '?')})"
        for p in threadpool_info()
        if p["user_api"] == "blas"
    ]
    return {
        "cpu": processor_details(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip() or "unknown",
        "python": platform.python_version(),
        "blas": ", ".join(blas) or "unknown",
        "versions": {name: version(name) for name in ("refllm", "numpy", *packages)},
        "threads": dict(threads),
        "load_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def version(package: str) -> str | None:
    """The installed version, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package != "refllm":
            return None
        import refllm  # run from a clone that is not installed

        return refllm.__version__


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


# --- engines in processes of their own ----------------------------------------------------


class EngineError(RuntimeError):
    """A worker ended instead of answering; its own message stands above, on standard error."""


class Worker:
    """An engine in a process: ``python -m engines.MODULE ARGUMENTS``, asked by ``ask`` and
    answering in order.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        threads: int,
        extra: Mapping[str, str] | None = None,
    ):
        path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {name: str(threads) for name in POOLS}
        own |= {"PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false"}
        self.name = module
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"engines.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **own, **(extra or {})},
        )
        self.about = self._answer()  # what the engine says of itself, once it is ready

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise EngineError(f"the engine {self.name} has ended") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineError(f"the engine {self.name} ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let the engine end (it reads the end of its input), or end it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, with a request unread
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Channel:
    """The worker's end: requests come by ``receive`` (None at the end), answers go by
    ``send``.
    """

    def __init__(self) -> None:
        # Libraries print to standard output: keep the pipe for ourselves and show what they
        # print on stderr.
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any] | None:
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def send(self, **answer: Any) -> None:
        print(json.dumps(answer), file=self.answers, flush=True)


# --- the network --------------------------------------------------------------------------


@contextlib.contextmanager
def network(path: str | None) -> Iterator[tuple[Path, str]]:
    """(a checkpoint directory, what it is): ``path``, else the bundled model, else random
    weights of its shape.
    """
    from refllm.checkpoints.sources import BUNDLED, bundled

    if path is not None:
        yield Path(path), path
    elif "stdlib" in bundled():
        yield BUNDLED / "stdlib", "stdlib, bundled"
    else:
        with tempfile.TemporaryDirectory() as folder:
            random_checkpoint(Path(folder) / "random")
            yield (
                Path(folder) / "random",
                "random weights of the shape of stdlib (4.2 M parameters)",
            )


def bundled_shape() -> Any:
    """The config of the bundled target, which is also the one that ``training.py`` trains."""
    from refllm.model.config import ModelConfig

    return ModelConfig(
        "llama",
        4096,
        256,
        768,
        4,
        4,
        2,
        64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(0,),
    )


def random_checkpoint(path: Path) -> None:
    """Initial weights; the tokenizer is trained on a single module and knows few words."""
    import numpy as np

    from refllm import corpus
    from refllm.checkpoints.tokenizer import Tokenizer
    from refllm.checkpoints.writer import save
    from refllm.train.loop import initialize

    tokenizer = Tokenizer.train((d.text for d in corpus.held_out_documents()[:1]), 512)
    save(path, bundled_shape(), initialize(bundled_shape(), np.random.default_rng(0)), tokenizer)


# --- results ------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range of the rounds' values."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """``spread`` of ours[i] / theirs[i]: the two of a round are measured right after each other."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def shown(value: Mapping[str, float] | None) -> str:
    """A ratio as the tables print it: median, then the range of the rounds."""
    if value is None:
        return "-"
    return f"{value['median']:.2f}x ({value['low']:.2f}-{value['high']:.2f})"


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under a header, every column as wide as it needs."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def finish(record: dict[str, Any], output: Path | None) -> None:
    """Complete a record, say how much the machine can be trusted, and write it as JSON."""
    about = record["environment"]
    about["load_after"] = round(os.getloadavg()[0], 2)
    # A load of one is the benchmark itself: engines take turns.
    about["quiet"] = (
        about["load_before"] < 0.5 and about["load_after"] < max(about["threads"].values()) + 0.5
    )
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    print(
        f"\n{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB; "
        f"{about['system']}, {about['libc']}"
    )
    print(f"Python {about['python']}, {packages}; {about['blas']}; threads: {about['threads']}")
    if not about["quiet"]:
        print(
            f"The machine was not quiet (load {about['load_before']} before, "
            f"{about['load_after']} after): the ratios hold within their range, the rates "
            "do not."
        )
    if output is not None:
        from refllm.atomic import write_atomic

        output.parent.mkdir(parents=True, exist_ok=True)
        head = {"format": FORMAT, "benchmark": record["benchmark"], "kind": "B"}
        write_atomic(output, json.dumps({**head, **record}, indent=1) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    print(json.dumps(environment(("torch", "transformers", "llama-cpp-python"), {}), indent=1))
