"""An independent Llama in float64 NumPy: the oracle. One sequence, no cache, no batch.

Written from the papers and Meta's description, one loop a head, sharing no code with the package.
Weights are the package's tree, [out, in]; rotary pairs are (i, i + H/2).
"""

import numpy as np


def logits(params, config, tokens) -> np.ndarray:
    """Return the logits [T, V] after each token."""
    w = _float64(params)
    x = w["embed"][np.asarray(tokens)]
    for i in range(config.num_layers):
        layer = w[f"layer_{i}"]
        normed = _rms_norm(x, layer["attention_norm"], config.norm_eps)
        x = x + _attention(normed, layer["attention"], config)
        normed = _rms_norm(x, layer["ffn_norm"], config.norm_eps)
        ffn = layer["feed_forward"]
        gate = normed @ ffn["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ ffn["up"].T)) @ ffn["down"].T
    x = _rms_norm(x, w["final_norm"], config.norm_eps)
    head = w["embed"] if config.tie_embeddings else w["lm_head"]
    return x @ head.T


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(value) for name, value in tree.items()}
    return np.asarray(tree).astype(np.float64)


def _rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def _rotate(x, theta, factor):
    length, width = x.shape
    half = width // 2
    out = np.empty_like(x)
    for position in range(length):
        for i in range(half):
            angle = position / factor / theta ** (2 * i / width)
            a, b = x[position, i], x[position, i + half]
            out[position, i] = a * np.cos(angle) - b * np.sin(angle)
            out[position, i + half] = a * np.sin(angle) + b * np.cos(angle)
    return out


def _attention(x, w, config):
    length = x.shape[0]
    width = config.dim // config.num_heads
    group = config.num_heads // config.num_kv_heads
    q, k, v = x @ w["q"].T, x @ w["k"].T, x @ w["v"].T
    heads = []
    for head in range(config.num_heads):
        shared = head // group
        mine = slice(head * width, (head + 1) * width)
        theirs = slice(shared * width, (shared + 1) * width)
        queries = _rotate(q[:, mine], config.rope_theta, config.rope_factor)
        keys = _rotate(k[:, theirs], config.rope_theta, config.rope_factor)
        scores = queries @ keys.T / np.sqrt(width)
        scores[np.triu_indices(length, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads.append(weights / weights.sum(axis=-1, keepdims=True) @ v[:, theirs])
    return np.concatenate(heads, axis=1) @ w["o"].T
