"""Meta's layout of known weights; needs torch."""

import json
import pathlib

import numpy as np
import torch

from llama_jax.config import ModelConfig
from tests.helpers.sources import PARAMS_JSON, Weights, as_torch, meta_name


def meta_shards(weights: Weights, config: ModelConfig, count: int) -> list[dict]:
    """Return the state dict of each rank, as Meta's column- and row-parallel layers hold it."""
    ranks: list[dict] = [{} for _ in range(count)]
    for path, array in weights.items():
        if path.endswith(("/q", "/k")):
            rows = []  # of each head: first of the first half, first of the second half, ...
            for head in array.reshape(-1, config.head_dim, config.dim):
                for i in range(config.head_dim // 2):
                    rows += [head[i], head[i + config.head_dim // 2]]
            array = np.stack(rows)
        for rank in range(count):
            if array.ndim == 1:
                part = array
            elif path == "embed" or path.endswith(("/o", "/down")):
                width = array.shape[1] // count
                part = array[:, rank * width : (rank + 1) * width]
            else:
                height = array.shape[0] // count
                part = array[rank * height : (rank + 1) * height]
            ranks[rank][meta_name(path)] = as_torch(part)
    for rank in ranks:
        rank["rope.freqs"] = torch.ones(config.head_dim // 2)
    return ranks


def write_meta(folder: pathlib.Path, ranks: list[dict], **params) -> pathlib.Path:
    """Write a source; a setting of None in `params` leaves the key out."""
    folder.mkdir()
    values = {k: v for k, v in (PARAMS_JSON | params).items() if v is not None}
    (folder / "params.json").write_text(json.dumps(values))
    for i, rank in enumerate(ranks):
        torch.save(rank, folder / f"consolidated.{i:02}.pth")
    return folder
