"""DeepCABAC on ranks; run by a Python that has `nncodec`, which needs an older numpy.

Reads a `.npz` of int32 tensors of signed levels, writes to stdout JSON: bytes by its best
settings (tables and block headers not counted, in its favour), the settings, and seconds to
encode and decode with them, on one core.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from nncodec.extensions import deepCABAC
from nncodec.nnc_core.hdsp.hdsp_tool import HDSP_OPTS_OFF

# Length of the unary part, search of the best rates, profile, skipping of empty rows.
SETTINGS = ((10, 1, 0, 0), (4, 1, 0, 0), (16, 1, 0, 0), (32, 1, 0, 0), (10, 1, 1, 1))


def encode(tensors: Sequence[Any], settings: tuple[int, int, int, int]) -> Any:
    """Return the bit stream of tensors as uint8."""
    unary, search, profile, skip = settings
    encoder = deepCABAC.Encoder()
    for tensor in tensors:
        empty = np.array([skip and not np.any(row) for row in tensor], np.int32)
        encoder.initCtxModels(unary, search)
        encoder.encodeLayer(tensor, 0, 0, profile, 0, skip, empty, *HDSP_OPTS_OFF(), 0, 0)
    return encoder.finish()


def decode(stream: Any, tensors: Sequence[Any], settings: tuple[int, int, int, int]) -> None:
    """Decode, and compare with what was encoded."""
    unary, _, profile, _ = settings
    decoder = deepCABAC.Decoder()
    decoder.setStream(stream)
    for tensor in tensors:
        found = np.zeros_like(tensor)
        decoder.initCtxModels(unary)
        decoder.decodeLayer(found, 0, 0, profile, 0, *HDSP_OPTS_OFF(), 0, 0)
        if not np.array_equal(found, tensor):
            raise SystemExit("DeepCABAC decoded something else")


def main() -> None:
    """Answer for the file named on the command line."""
    with np.load(sys.argv[1]) as file:
        tensors = [np.ascontiguousarray(file[f"t{i}"]) for i in range(len(file.files))]
    sizes = {settings: len(encode(tensors, settings)) for settings in SETTINGS}
    best = min(sizes, key=lambda settings: sizes[settings])
    timed = best if best[3] == 0 else SETTINGS[0]  # skipped rows are not decoded by this call
    begin = time.perf_counter()
    stream = encode(tensors, timed)
    middle = time.perf_counter()
    decode(stream, tensors, timed)
    end = time.perf_counter()
    print(
        json.dumps(
            {
                "bytes": sizes[best],
                "settings": best,
                "encode_s": middle - begin,
                "decode_s": end - middle,
            }
        )
    )


if __name__ == "__main__":
    main()
