"""Conversion on a Dask cluster: a real one, of two processes on this machine, of which one
is killed on the way.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from conftest import oracle
from networks import random_tensors
from refllm.checkpoints.writer import save
from refllm.quant import to_gguf as convert_module
from refllm.quant.to_gguf import convert
from tiny_models import byte_tokenizer, tiny_config


@pytest.mark.oracle
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.filterwarnings("ignore")  # of a cluster that loses a worker on purpose
def test_a_cluster_whose_worker_is_killed_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    distributed = oracle("distributed", "pip install 'refllm[dask]'")
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2)
    save(
        tmp_path / "hf",
        config,
        random_tensors(config, 0, "float32"),
        byte_tokenizer(),
        dtype="float32",
    )
    convert(tmp_path / "hf", tmp_path / "a.gguf", "Q4_K_M", workers=1)
    monkeypatch.setattr(convert_module, "SLAB", 1 << 15)
    for attempt in range(3):
        try:
            _convert_and_kill(distributed, tmp_path)
            break
        except (
            ValueError
        ) as error:  # distributed's own: a result that is lost while it is handed over is taken
            if "unpack" not in str(error) or attempt == 2:  # for an exception, and unpacked as one
                raise
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def _convert_and_kill(distributed: Any, folder: Path) -> None:
    killed: list[int] = []
    settings = {
        "n_workers": 2,
        "threads_per_worker": 1,
        "processes": True,
        "dashboard_address": None,
    }
    with (
        distributed.LocalCluster(**settings, silence_logs=50) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = client.run(os.getpid)

        def progress(done: int, total: int) -> None:
            if done > total // 3 and not killed:
                killed.append(next(iter(pids.values())))
                os.kill(killed[0], signal.SIGKILL)

        convert(
            folder / "hf",
            folder / "b.gguf",
            "Q4_K_M",
            executor=client.get_executor(),
            progress=progress,
        )
        assert killed
        assert killed[0] not in client.run(os.getpid).values()
