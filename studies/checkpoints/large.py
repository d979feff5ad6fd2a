# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A sharded mixture-of-experts checkpoint of any size, without weights: to test and time the audit."""

from __future__ import annotations

import base64
import math
import struct

from .scales import MODELOPT
from .skeleton import Skeleton


def mixture_skeleton(layers: int, experts: int, width: int, shards: int, amax: float = 12.0) -> Skeleton:
    """A sound skeleton in ModelOpt's convention with an index: attention, and experts' three linears.

    Every linear is [width, width], NVFP4: half a byte per weight, a byte per block of 16, two scales.
    """
    linears = [
        f"model.layers.{i}.{name}"
        for i in range(layers)
        for name in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.experts.{e}.{p}_proj" for e in range(experts) for p in ("gate", "up", "down")),
        )
    ]
    scale = base64.b64encode(struct.pack("<f", MODELOPT.stored(amax))).decode()
    per_shard = math.ceil(len(linears) / shards)
    headers: dict[str, dict] = {}
    weight_map: dict[str, str] = {}
    scales: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, at = {}, 0
        for linear in linears[shard * per_shard : (shard + 1) * per_shard]:
            for leaf, dtype, shape, size in (
                ("weight", "U8", [width, width // 2], width * width // 2),
                ("weight_scale", "F8_E4M3", [width, width // 16], width * width // 16),
                ("weight_scale_2", "F32", [], 4),
                ("input_scale", "F32", [], 4),
            ):
                name = f"{linear}.{leaf}"
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
                weight_map[name] = file
                at += size
            scales |= dict.fromkeys((f"{linear}.weight_scale_2", f"{linear}.input_scale"), scale)
        headers[file] = header
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    index = {"metadata": {}, "weight_map": weight_map}
    files = {"config.json": config, "model.safetensors.index.json": index}
    return {"json": files, "headers": headers, "scales": scales}
