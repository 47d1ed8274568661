"""llama.cpp's own answers for made-up vocabularies: ``python
tests/golden/make_gguf_tokenizers.py``.

- For every name of a pre-tokenizer that refllm knows, for no name, and for SentencePiece with
  and without a space before the text: the token ids of 600 texts, and where a text contains
  control tokens also with those parsed. Records with equal ids are kept once.
- For small vocabularies with tokens of the usual spellings, of any type, with and without
  keys: which tokens begin and end a text, which end a generation, and which are control tokens.
- For the file of SmolLM2, where it is installed: its end tokens, and the ids of 600 texts with
  its control tokens among them.

Needs llama-cpp-python.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from gguf_vocabularies import (  # noqa: E402
    CONTROL,
    CONTROL_TOKENS,
    SMOLLM2_CONTROL,
    USER_DEFINED,
    USER_TOKENS,
    byte_level,
    case_metadata,
    cases,
    llama_cpp_tokenizer,
    sentencepiece,
    special_token_cases,
)
from nasty_texts import nasty_texts  # noqa: E402
from refllm.checkpoints.gguf_pre_tokenizers import NAMES  # noqa: E402
from refllm.checkpoints.sources import locate  # noqa: E402

llama_cpp = importlib.import_module("llama_cpp")
SPECIAL = [*CONTROL_TOKENS, *USER_TOKENS]
TEXTS = nasty_texts(600, seed=7, more=[*SPECIAL, "zebra", "quux", "Quux", "QUUX"])
PEER = f"llama-cpp-python {llama_cpp.__version__}"


def main() -> None:
    """Write ``gguf_tokenizers.npz``, ``gguf_special_tokens.json`` and ``gguf_smollm2.npz``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        record_ids(path)
        record_special_tokens(path)
    record_smollm2()


def record_ids(path: Path) -> None:
    """``gguf_tokenizers.npz``: vocabularies, texts, and for each group of equal answers the
    ids [sum of lengths] with their lengths [cases].
    """
    vocabularies = {"bytes": byte_level(), "pieces": sentencepiece()}
    files = {"": vocabularies["bytes"]}
    for name in NAMES:
        files[name] = vocabularies["bytes"] | {"tokenizer.ggml.pre": name}
    for prefix in (True, False):
        entry = {"tokenizer.ggml.add_space_prefix": prefix}
        files[f"sentencepiece {prefix}"] = vocabularies["pieces"] | entry
    groups: dict[bytes, str] = {}
    names: dict[str, str] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, entries in files.items():
        with llama_cpp_tokenizer(llama_cpp, entries, path) as model:
            found = [
                model.tokenize(text.encode(), add_bos=True, special=parse)
                for text, parse in cases(TEXTS, SPECIAL)
            ]
        ids, lengths = _flat(found)
        group = groups.setdefault(ids.tobytes() + lengths.tobytes(), name or "no name")
        names[name] = group
        arrays[f"{group}/ids"] = ids
        arrays[f"{group}/lengths"] = lengths
    plain = {kind: _plain(entries) for kind, entries in vocabularies.items()}
    about = {"peer": PEER, "names": names, "texts": TEXTS, "special": SPECIAL} | plain
    np.savez_compressed(HERE / "gguf_tokenizers.npz", about=_bytes(about), **arrays)


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """uint16: the ids of all rows, and the lengths of the rows."""
    ids = np.array([i for row in rows for i in row], dtype=np.uint16)
    return ids, np.array([len(row) for row in rows], dtype=np.uint16)


def _bytes(about: dict[str, Any]) -> np.ndarray:
    """A record as JSON, for a file of arrays."""
    return np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as JSON; ``case_metadata`` is the way back."""
    plain = {}
    for key, value in metadata.items():
        if isinstance(value, np.ndarray | np.generic):
            value = value.tolist()
        plain[key.removeprefix("tokenizer.ggml.")] = value
    return plain


def record_special_tokens(path: Path) -> None:
    """``gguf_special_tokens.json``: vocabularies, and what llama.cpp finds in them."""
    recorded = []
    for case in special_token_cases(150, seed=3):
        with llama_cpp_tokenizer(llama_cpp, case_metadata(case), path) as model:
            vocab = model._model.vocab
            size = len(case["tokens"])
            attributes = [llama_cpp.llama_vocab_get_attr(vocab, i) for i in range(size)]
            recorded.append({
                "case": case,
                "bos": llama_cpp.llama_vocab_bos(vocab),
                "eos": llama_cpp.llama_vocab_eos(vocab),
                "add_bos": llama_cpp.llama_vocab_get_add_bos(vocab),
                "add_eos": llama_cpp.llama_vocab_get_add_eos(vocab),
                "ends": [i for i in range(size) if llama_cpp.llama_vocab_is_eog(vocab, i)],
                "control": [i for i in range(size) if attributes[i] & 1 << CONTROL],
                "user defined": [i for i in range(size) if attributes[i] & 1 << USER_DEFINED],
            })  # fmt: skip
    text = json.dumps({"peer": PEER, "cases": recorded}, ensure_ascii=False, separators=(",", ":"))
    text = text.replace('},{"case"', '},\n{"case"')
    (HERE / "gguf_special_tokens.json").write_text(text + "\n", encoding="utf-8")


def record_smollm2() -> None:
    """``gguf_smollm2.npz``: the ids of each case, one after the other, and the end tokens."""
    model = llama_cpp.Llama(str(locate("smollm2")), vocab_only=True, verbose=False)
    texts = nasty_texts(600, seed=9, more=SMOLLM2_CONTROL)
    asked = cases(texts, SMOLLM2_CONTROL)
    found = [model.tokenize(text.encode(), add_bos=True, special=parse) for text, parse in asked]
    ids, lengths = _flat(found)
    vocab = model._model.vocab
    ends = [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    about = {"peer": PEER, "texts": texts, "ends": ends}
    np.savez_compressed(HERE / "gguf_smollm2.npz", about=_bytes(about), ids=ids, lengths=lengths)
    model.close()


if __name__ == "__main__":
    main()
