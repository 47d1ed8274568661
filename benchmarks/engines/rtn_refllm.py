"""Round to nearest with packing, and what the memory gives: bytes read a second of
processor time.
"""

from __future__ import annotations

import time

import numpy as np
from common import Channel

from refllm.formats.quantized_linear import quantize
from refllm.formats.uniform import Scheme


def main() -> None:
    channel = Channel()
    channel.send(engine="refllm")
    while (request := channel.receive()) is not None:
        weight = np.random.default_rng(0).standard_normal(
            (request["size"], request["size"]), dtype=np.float32
        )
        began = time.process_time()
        quantize(
            weight,
            Scheme(request["bits"], "half_integer", "group", request["group"]),
            scale_dtype="float16",
        )
        rounded = time.process_time() - began
        began = time.process_time()
        weight.sum()
        channel.send(
            rtn=weight.nbytes / rounded, memory=weight.nbytes / (time.process_time() - began)
        )


if __name__ == "__main__":
    main()
