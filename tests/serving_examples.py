"""Small values for the figures of serving, in the shape that the experiments return."""

from __future__ import annotations

_SPREAD = {"mean": 0.01, "p50": 0.01, "p90": 0.02, "p99": 0.05, "max": 0.1}
_WAYS = ((None, "fcfs"), ("hash", "fcfs"), ("hash", "lpm"), ("radix", "fcfs"), ("radix", "lpm"))
_TREE = [
    {
        "tokens": 8,
        "locks": 1,
        "hits": 2,
        "used": 3,
        "children": [
            {"tokens": 4, "locks": 1, "hits": 1, "used": 3, "children": []},
            {"tokens": 2, "locks": 0, "hits": 0, "used": 1, "children": []},
        ],
    },
    {"tokens": 3, "locks": 0, "hits": 0, "used": 2, "children": []},
]
TRACE = {
    "occupancy": {
        "slots": 64,
        "time": [0.1, 0.2],
        "running": [1, 2],
        "waiting": [1, 0],
        "used": [9, 20],
        "allocated": [16, 32],
        "read": [8, 9],
        "written": [1, 2],
        "preempted": [0, 0],
    },
    "blocks": {
        "times": [0.1, 0.2],
        "owners": [[0, -1, -1, -1], [0, 1, -2, -3]],
        "requests": ["0", "1"],
    },
    "tree": _TREE,
}
PAGING = {
    "slots": 100,
    "policies": [
        {"policy": "Orca (Max)", "paper": 7.0, "batch": [6.9, 7.0], "utilisation": [0.2, 0.21]},
        {"policy": "paged", "paper": None, "batch": [30.0, 31.0], "utilisation": [0.94, 0.95]},
    ],
    "blocks": [
        {"block": 1, "batch": [31.0], "utilisation": [0.99]},
        {"block": 16, "batch": [30], "utilisation": [0.9]},
    ],
}
BATCHING = {
    "useful": [
        {"batch": 1, "exact": 1.0, "counted": [1.0]},
        {"batch": 4, "exact": 0.5, "counted": [0.48, 0.52]},
    ],
    "chunks": [
        {"budget": 128, "itl": _SPREAD, "ttft": _SPREAD, "throughput": 9.0},
        {"budget": None, "itl": _SPREAD, "ttft": _SPREAD, "throughput": 9.0},
    ],
    "goodput": {
        "rates": [1, 2],
        "limits": {"ttft": 1.0, "tpot": 0.05, "e2el": 9.0},
        "lines": {
            "static": {"met": [0.5, 0.1], "capacity": 0.0},
            "paged": {"met": [1.0, 0.9], "capacity": 2.0},
        },
    },
    "swapping": [{"block": 16, "recompute": {"duration": 1.0}, "swap": {"duration": 2.0}}],
}
UNPADDING = {
    "requests": 8,
    "slots": 100,
    "rows": [
        {"run": "static", "processor": [4.0, 5.0], "batch": 2.0, "steps": 90},
        {"run": "paged", "processor": [1.0, 1.2], "batch": 9.0, "steps": 9},
    ],
    "factors": {
        "processor": {
            "padding": [2.0, 1.9, 2.1],
            "kernel": [0.9, 0.8, 1.0],
            "batch": [2.0, 1.9, 2.1],
            "all three": [4.0, 3.9, 4.1],
        }
    },
}
PREFIXES = {
    "programs": {
        name: [
            {
                "cache": cache,
                "order": order,
                "memory": memory,
                "hit": 0.5 if cache else 0.0,
                "best": 0.8,
                "speedup, processor": [1.5, 1.4, 1.6],
                "formula": 1.4,
            }
            for memory in (1, 2)
            for cache, order in _WAYS
        ]
        for name in ("chat", "tree of thought", "unique")
    },
    "inside": {"hash": [0.01], "radix": [0.01]},
}
SERVING = {
    "paging": PAGING,
    "batching": BATCHING,
    "unpadding": UNPADDING,
    "prefixes": PREFIXES,
    "serving_occupancy": TRACE,
    "serving_blocks": TRACE,
    "serving_tree": TRACE,
}
