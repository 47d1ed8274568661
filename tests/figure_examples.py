"""Small values for every registered figure, in the shape that the experiments return."""

from __future__ import annotations

from serving_examples import SERVING

CURVE = [
    {"tokens": 1000 * s, "loss": 5 - s / 100, "norm": 1.0, "held_out": 5.2 - s / 100}
    for s in (100, 200)
]
BLOCKS = {
    "types": [
        {
            "type": name,
            "numbers": 32,
            "bits": 4.5,
            "fields": [
                {"role": "step", "size": 2, "holds": "d"},
                {"role": "codes", "size": 16, "holds": "low: high"},
            ],
        }
        for name in ("a", "b")
    ]
}
SPECULATIVE = {
    "results": [
        {
            "task": t,
            "drafter": d,
            "temperature": h,
            "gamma": g,
            "alpha": 0.5,
            "length": 1.5 + 0.1 * g - 0.2 * h,
            "speedup": {"median": 1.2, "low": 1.1, "high": 1.3},
            "formula": 1.25,
            "flat": 1.4 + 0.1 * g,
        }
        for t, d in (("code", "model"), ("copy", "n-gram"))
        for h in (0.0, 1.0)
        for g in (1, 3)
    ],
    "batches": [
        {"batch": b, "fixed": {"median": 1.3 / b}, "adaptive": {"median": 1.0}} for b in (1, 4)
    ],
}
EXAMPLES = {
    "training_curve": {
        "runs": {
            "target": CURVE,
            "draft": [{k: v for k, v in r.items() if k != "held_out"} for r in CURVE],
        },
        "phases": [[150_000, "256 tokens"]],
        "bytes_per_token": 3.6,
    },
    "bits_by_position": {
        "lines": {"target": [[1, 1, 20, 3.0, 2.0], [2, 2, 20, 2.5, 1.5], [3, 4, 40, 2.0, 1.0]]}
    },
    "roofline": {
        "devices": [{"name": "a device", "peak_flops": 1e12, "peak_bandwidth": 1e10}],
        "points": [
            {"label": "left", "intensity": 1.0},
            {"label": "right", "intensity": 1e4, "flops_per_second": 5e11},
        ],
    },
    "decode_cost": {
        "title": "a step",
        "unit": "ms",
        "rows": [
            {"label": "batch 1", "parts": {"weights": 1.0}},
            {"label": "batch 2", "parts": {"KV": 2.0}},
        ],
    },
    "quantization": {
        "rows": [
            {
                "method": m,
                "bits": b,
                "group": g,
                "seed": s,
                "kl": [k, 0.9 * k, 1.2 * k],
                "bits per weight": b + 0.1,
            }
            for m, k in (("rtn", 0.2), ("gptq", 0.1))
            for b in (4, 8)
            for g in (0, 32)
            for s in (0, 1)
        ]
        + [
            {
                "method": "int8",
                "bits": 8,
                "group": 0,
                "seed": None,
                "kl": [0.1, 0.1, 0.1],
                "bits per weight": 8.1,
            }
        ],
    },
    "observers": {
        "tensor": "a tensor",
        "edges": [0.1, 1.0, 10.0],
        "density": [0.9, 0.0],
        "rows": [
            {"observer": n, "bits": b, "cut": c, "beyond": 0.1, "error": 0.1 / c}
            for b in (8, 4)
            for n, c in (("min-max", 9.0), ("MSE", 5.0))
        ],
    },
    "smoothquant": {
        "factor": 128.0,
        "rows": [
            {
                "outliers": o,
                "level": v,
                "alpha": a,
                "keep": k,
                "bits per byte": 1.1,
                "full precision": 1.0,
                "kl": [0.1, 0.05, 0.2],
            }
            for o in ("nothing", "MLP hidden", "norms")
            for v in ("O2", "O1")
            for k in (["o_proj", "down_proj"], ["down_proj"], [])
            for a in (None, 0.0, 0.5)
        ],
    },
    "salience": {
        "bits": 3,
        "factor": 8.0,
        "rows": [
            {"network": n, "by": by, "fraction": f, "seed": s, "kl": [0.1, 0.05, 0.2]}
            for n in ("as it is", "planted")
            for by in (None, "activation", "weight", "random")
            for f in (0.01, 0.1)
            for s in (0, 1)
        ],
    },
    "gguf_layouts": BLOCKS,
    "gguf_kquants": BLOCKS,
    "gguf_mixes": {
        "rows": [
            {"mix": "a", "base": 4.5, "model": 4.6, "article": None},
            {"mix": "b", "base": 5.5, "model": 5.7, "article": 5.5},
        ]
    },
    "speculative": SPECULATIVE,
    "speculative_batch": SPECULATIVE,
    "float_formats": {
        "data": {kind: {"int8": 0.1, "e4m3": 0.2, "e5m2": 0.3} for kind in ("normal", "outliers")},
        "lengths": [128, 256],
        "accumulator": {name: [1e-4, 2e-4] for name in "abc"},
        "growths": [1.0, 1.5],
        "delayed": [0.0, 0.2],
    },
    "fp8_training": {
        "steps": 320,
        "against float32": {
            "random weights": {
                m: {"0": 0.001, "1": -0.002} for m in ("nudged", "tile", "tensor", "E5M2 gradients")
            },
            "bundled weights": {
                m: {"0": 0.0001} for m in ("nudged", "tile", "tensor", "E5M2 gradients")
            },
        },
        "spread of seeds": {"random weights": 0.3, "bundled weights": 0.0},
        "gradient error": dict.fromkeys(("tile", "tensor", "E5M2 gradients"), 0.1),
        "powers": [0, 8, 16],
        "planted": {"tile": [0.001, 0.002, 0.003], "tensor": [0.001, 0.002, 0.5]},
    },
    "kv_quantization": {
        "factor": 8.0,
        "length": 64,
        "lengths": [32, 64],
        "memory": {"4 bits": [1.0, 0.5], "2 bits": [1.0, 0.4]},
        "rows": [
            {
                "network": network,
                "choice": choice,
                "bits": bits,
                "residual": r,
                "kl": [0.02 / bits, 0.01 / bits, 0.03 / bits],
                "kl by position": [0.0, 0.01, 0.02],
            }
            for network in ("as it is", "planted")
            for choice in ("KIVI", "keys by token", "values by channel")
            for bits in (2, 8)
            for r in (32, 128)
        ],
    },
    "kv_sparsity": {
        "rows": [
            {
                "task": task,
                "policy": policy,
                "held": float(b),
                "held at the end": b + 1.0,
                "mass": 1 - 1 / b,
                "kl": [1 / b, 0.9 / b, 1.2 / b],
            }
            for task in ("as it comes", "a far copy")
            for b in (64, 512)
            for policy in (
                "newest only",
                "at random",
                "StreamingLLM",
                "H2O",
                "TOVA",
                "SnapKV",
                "PyramidKV",
            )
        ],
    },
    "kv_memory": {
        "contexts": [10, 100],
        "lines": {"a": [1e9, 1e10]},
        "weights": {"w": 5e9},
        "marked": 100,
    },
    "structured_output": {
        "vocabulary": 1000,
        "walk": [{"token": "{ ", "legal": 3, "mass": 0.5}, {"token": "end", "legal": 1, "mass": 1}],
        "rows": [
            {"way": way, "schemas": 10, "valid": 4, "unfinished": 2, "tokens": 9, "jumped": 1}
            for way in ("none", "compact")
        ],
    },
    "language_programs": {
        "rows": [
            {
                "program": name,
                "shared": {"computed_tokens": 30, "forward_passes": 4},
                "naive": {"computed_tokens": 90, "forward_passes": 20},
            }
            for name in ("one", "two")
        ]
    },
    **SERVING,
}
