"""Judge real JSON Schemas: which of them compile, and which of their instances are judged right.

    python -m tests.decode.grammar.maskbench                  # the sample of real schemas
    python -m tests.decode.grammar.maskbench --suite          # the official draft 2020-12 suite
    python -m tests.decode.grammar.maskbench --judge jsonschema
    python -m tests.decode.grammar.maskbench --only Github_easy---o65454

The data is read from the folder that ``REFLLM_SHARED_DATA`` names, or else from ``../shared/data``
beside the repository:

| path | what |
|---|---|
| ``maskbench/schemas.jsonl.gz`` | schemas with instances marked valid or invalid |
| ``json-schema-test-suite/tests/draft2020-12/*.json`` | the official suite |

An instance is the bytes of ``json.dumps(data, ensure_ascii=False)``. A schema is *right* if it
compiles and all its instances are judged as they are marked. Instances are counted among the
schemas that compile: ``valid rejected``, ``invalid accepted``. The compact form and the indented
one must be judged alike (``spellings``).

This is no test; ``test_maskbench.py`` runs it on a small part.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 10  # per schema, its instances apart
FOLDER = Path(__file__).parents[4] / "shared" / "data"


@dataclass(frozen=True)
class Case:
    """A schema and its instances."""

    name: str
    family: str
    schema: object
    instances: tuple[tuple[object, bool], ...]  # (data, valid)


@dataclass
class Verdict:
    """What became of a case."""

    name: str
    family: str
    seconds: float = 0.0  # to compile
    refused: str | None = None  # the keyword, where the schema does not compile
    message: str = ""
    crashed: bool = False  # by an error that is no GrammarError, or by the time limit
    rejected: list[int] = field(default_factory=list)  # valid instances
    accepted: list[int] = field(default_factory=list)  # invalid ones
    spellings: list[int] = field(default_factory=list)  # judged otherwise when spelled otherwise
    instances: int = 0
    megabytes: float = 0.0  # resident at most, of the process so far

    @property
    def right(self) -> bool:
        """Whether the schema compiled and all its instances are judged as marked."""
        wrong = self.crashed or self.rejected or self.accepted or self.spellings
        return self.refused is None and not wrong


def data_folder() -> Path | None:
    """Where the data lies; None if it is not there."""
    folder = Path(os.environ.get("REFLLM_SHARED_DATA", FOLDER))
    return folder if (folder / "maskbench").is_dir() else None


def sample(folder: Path) -> Iterator[Case]:
    """The real schemas."""
    with gzip.open(folder / "maskbench" / "schemas.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            instances = tuple((test["data"], test["valid"]) for test in row["tests"])
            yield Case(row["name"], row["family"], row["schema"], instances)


def suite(folder: Path) -> Iterator[Case]:
    """The groups of the official suite."""
    tests = folder / "json-schema-test-suite" / "tests" / "draft2020-12"
    for path in sorted(tests.glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            instances = tuple((test["data"], test["valid"]) for test in group["tests"])
            yield Case(
                f"{path.stem}: {group['description']}", path.stem, group["schema"], instances
            )


Judge = Callable[[bytes], bool]


def refllm_judge(schema: object, assert_formats: bool) -> Judge:
    """The automaton of the schema, read byte by byte."""
    from refllm.decode.grammar.automaton import accepting, step
    from refllm.decode.grammar.schema import compile_schema

    automaton, _ = compile_schema(schema, assert_formats=assert_formats)
    start = automaton.start()

    def judge(text: bytes) -> bool:
        state = start
        for byte in text:
            if state is None:
                return False
            state = step(state, byte)
        return state is not None and accepting(state)

    return judge


def jsonschema_judge(schema: object, assert_formats: bool) -> Judge:
    """The reference implementation, which the marks come from."""
    import jsonschema
    from jsonschema.validators import validator_for

    newest = jsonschema.Draft202012Validator
    kind = validator_for(schema, default=newest)
    checker = jsonschema.FormatChecker() if assert_formats else None
    validator = kind(schema, format_checker=checker)
    return lambda text: validator.is_valid(json.loads(text))


JUDGES = {"refllm": refllm_judge, "jsonschema": jsonschema_judge}


def spellings(data: object) -> list[bytes]:
    """The texts of a JSON value that are judged: default, compact, indented."""
    return [
        json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        ),
        json.dumps(data, ensure_ascii=False, indent=2).encode("utf-8", "surrogatepass"),
    ]


def _out_of_time(*_: object) -> None:
    raise TimeoutError("out of time")


def run_case(job: tuple[Case, str, bool, bool]) -> Verdict:
    """Compile one schema and judge its instances."""
    from refllm.decode.grammar.errors import GrammarError

    case, judge_name, assert_formats, all_spellings = job
    verdict = Verdict(case.name, case.family, instances=len(case.instances))
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, SECONDS * 2)  # the machine may be busy
    start = time.process_time()
    try:
        judge = JUDGES[judge_name](case.schema, assert_formats)
        verdict.seconds = time.process_time() - start
        signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
        for number, (data, valid) in enumerate(case.instances):
            texts = spellings(data)[: 3 if all_spellings else 1]
            judged = [judge(text) for text in texts]
            if judged[0] != valid:
                (verdict.rejected if valid else verdict.accepted).append(number)
            if len(set(judged)) > 1:
                verdict.spellings.append(number)
    except GrammarError as error:
        verdict.refused = error.keyword or "?"
        verdict.message = str(error)
        verdict.seconds = time.process_time() - start
    except Exception as error:  # a fault: reported, so that the others are still judged
        verdict.crashed = True
        verdict.message = f"{type(error).__name__}: {error}"
        verdict.seconds = time.process_time() - start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    verdict.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return verdict


def report(verdicts: list[Verdict]) -> str:
    """The table of all verdicts, with the names of what failed."""
    lines: list[str] = []
    for each in verdicts:
        if each.crashed:
            lines.append(f"crashed   {each.name}: {each.message}")
        elif each.refused is None and not each.right:
            wrong = f"valid rejected {each.rejected}, invalid accepted {each.accepted}"
            lines.append(f"wrong     {each.name}: {wrong}, spellings {each.spellings}")
        elif each.refused is not None:
            lines.append(f"rejected  {each.name}: {each.message}")
    refused = Counter(each.refused for each in verdicts if each.refused is not None)
    seconds = sorted(each.seconds for each in verdicts)
    compiled = [each for each in verdicts if each.refused is None and not each.crashed]
    right = sum(each.right for each in verdicts)
    lines += [
        "",
        f"schemas                {len(verdicts)}",
        f"compiled               {len(compiled)}",
        f"right                  {right}  ({right / len(verdicts):.2%})",
        f"crashed                {sum(each.crashed for each in verdicts)}",
        f"valid rejected         {sum(len(each.rejected) for each in compiled)}",
        f"invalid accepted       {sum(len(each.accepted) for each in compiled)}",
        f"spellings differ       {sum(len(each.spellings) for each in compiled)}",
        f"instances              {sum(each.instances for each in verdicts)}",
        f"not compiled, by keyword: {dict(refused.most_common())}",
        f"compile, ms            median {1000 * statistics.median(seconds):.1f}, "
        f"p99 {1000 * seconds[int(0.99 * (len(seconds) - 1))]:.0f}, "
        f"longest {1000 * seconds[-1]:.0f}",
        f"memory, MiB            {max(each.megabytes for each in verdicts):.0f}",
        "",
        "family                 schemas  compiled  right",
    ]
    for family in sorted({each.family for each in verdicts}):
        of_family = [each for each in verdicts if each.family == family]
        in_family = sum(each.refused is None and not each.crashed for each in of_family)
        good = sum(each.right for each in of_family)
        lines.append(f"{family:22} {len(of_family):7} {in_family:9} {good:6}")
    return "\n".join(lines)


def main() -> None:
    """Run the cases that the command line asks for and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--suite", action="store_true", help="the official suite")
    parser.add_argument("--judge", choices=sorted(JUDGES), default="refllm")
    parser.add_argument("--only", help="a part of the names")
    parser.add_argument("--every", type=int, default=1, help="one case in so many")
    parser.add_argument("--spellings", action="store_true", help="compact and indented text too")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    folder = data_folder()
    if folder is None:
        raise SystemExit("no data: set REFLLM_SHARED_DATA to the folder that holds maskbench/")
    cases = list(suite(folder) if options.suite else sample(folder))
    cases = [case for case in cases if not options.only or options.only in case.name]
    cases = cases[:: options.every]
    jobs = [(case, options.judge, not options.suite, options.spellings) for case in cases]
    if options.workers == 1:
        verdicts = [run_case(job) for job in jobs]
    else:
        with ProcessPoolExecutor(options.workers) as pool:
            verdicts = list(pool.map(run_case, jobs, chunksize=8))
    print(report(verdicts))


if __name__ == "__main__":
    main()
