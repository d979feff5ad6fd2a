# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Which token of a sequence holds a site's largest magnitude, and how far it stands above the rest."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch


class TokenAmaxes:
    """The largest token of each sequence at every site; ``count`` is a hook's callback.

    A token's amax is the largest magnitude of its vector. Sequences must arrive in order.
    """

    def __init__(self) -> None:
        self.parts: dict[str, list[torch.Tensor]] = {}

    def count(self, site: str, x: torch.Tensor) -> None:
        """Count a batch [sequences, tokens, width]."""
        amaxes = x.abs().amax(-1).float()  # [sequences, tokens]
        top, position = amaxes.max(1)
        rows = torch.arange(len(x), device=x.device)
        channel = x[rows, position].abs().argmax(-1)
        others = amaxes.index_put((rows, position), torch.tensor(-1.0, device=x.device))
        part = [top, position, channel, others.amax(1), amaxes.median(1).values, amaxes[:, 0]]
        self.parts.setdefault(site, []).append(torch.stack([v.double() for v in part]))

    def table(self, tokens: torch.Tensor, tokenizer) -> pd.DataFrame:
        """One row per site and sequence.

        Columns: site, sequence, amax, position, channel, next_amax (of the largest other token),
        median_amax (over tokens), first_amax (of position 0), token (its piece of the vocabulary).
        """
        tables = []
        columns = ["amax", "position", "channel", "next_amax", "median_amax", "first_amax"]
        for site, parts in self.parts.items():
            values = torch.cat(parts, dim=1).cpu().numpy()
            table = pd.DataFrame(dict(zip(columns, values, strict=True)))
            whole = {"position": np.int32, "channel": np.int32}
            table = table.astype(whole | {c: np.float32 for c in columns if c not in whole})
            ids = tokens[torch.arange(len(table)), torch.from_numpy(table.position.to_numpy()).long()]
            table.insert(0, "sequence", np.arange(len(table), dtype=np.int32))
            table.insert(0, "site", site)
            tables.append(table.assign(token=tokenizer.convert_ids_to_tokens(ids.tolist())))
        return pd.concat(tables, ignore_index=True)
