"""Draw a token as docs/sampler.md says, in NumPy.

Written from the page alone; it shares nothing with the package. All arithmetic is float32.
"""

import numpy as np

F32 = np.float32
WORD = 0xFFFFFFFF


def draw(
    logits, parameters: dict, seed: int, step: int, prompt=(), output=(), pieces: int | None = None
) -> int | None:
    """Return the token of one step, or None where nothing can be drawn.

    parameters has the names of section 5's vectors; a filter that is absent is off. pieces is V.
    """
    drawn = scores(logits, parameters, seed, step, prompt, output, pieces)
    return None if drawn is None else int(np.argmax(drawn))


@np.errstate(all="ignore")
def scores(
    logits, parameters: dict, seed: int, step: int, prompt=(), output=(), pieces: int | None = None
) -> np.ndarray | None:
    """Return that whose argmax is the token: float32[V], minus infinity where cut."""
    temperature = F32(parameters.get("temperature", 1))
    is_greedy = temperature < F32(1e-5)
    x = penalized(np.asarray(logits, F32)[:pieces], parameters, prompt, output)
    x = x if is_greedy else x / temperature
    if not np.isfinite(x.max()):  # NumPy's max is NaN where any element is
        return None
    return x if is_greedy else kept(x, parameters) + noise(seed, step, len(x))


@np.errstate(all="ignore")
def margins(
    logits, parameters: dict, seed: int, step: int, prompt=(), output=()
) -> tuple[float, float, float, float]:
    """Return how far the draw and its cuts by top-k, top-p and min-p are from another outcome.

    As docs/receipts.md defines them, for a row from which a token can be drawn.
    """
    drawn = np.sort(scores(logits, parameters, seed, step, prompt, output))[::-1]
    margin = drawn[0] - drawn[1] if len(drawn) > 1 else np.inf
    temperature = F32(parameters.get("temperature", 1))
    if temperature < F32(1e-5):
        return margin, np.inf, np.inf, np.inf
    x = penalized(np.asarray(logits, F32), parameters, prompt, output) / temperature
    order = np.lexsort((np.arange(len(x)), -x))
    top_k_margin = top_p_margin = min_p_margin = np.inf
    if (k := parameters.get("top_k")) is not None and k < len(x):
        if x[order[k]] > -np.inf:
            top_k_margin = x[order[k - 1]] - x[order[k]]
        x[order[k:]] = -np.inf
        order = order[:k]
    if (top_p := F32(parameters.get("top_p", 1))) < 1 and len(order) > 1:
        top_p_margin = np.abs(mass_before(x, order)[1:] - top_p).min()
    if (min_p := F32(parameters.get("min_p", 0))) > 0:
        x = penalized(np.asarray(logits, F32), parameters, prompt, output) / temperature
        quotients = np.exp(x - x.max())
        others = quotients[quotients < 1]
        min_p_margin = np.abs(others - min_p).min() if len(others) else np.inf
    return margin, top_k_margin, top_p_margin, min_p_margin


def log_probabilities(logits) -> np.ndarray:
    """Return the model's log-probabilities, float32[all ids]: before all filters."""
    x = np.asarray(logits, F32)
    m = x.max()
    return (x - m) - np.log(sum_by_halves(np.exp(x - m)))


# Section 1: filters


def penalized(x: np.ndarray, parameters: dict, prompt, output) -> np.ndarray:
    """Return the logits after bias and penalties."""
    b = np.zeros(len(x), F32)
    for token, bias in parameters.get("logit_bias", {}).items():
        b[int(token)] = bias
    if (allowed := parameters.get("allowed_tokens")) is not None:
        b[np.setdiff1d(np.arange(len(x)), allowed)] = -np.inf
    x = x + b
    occurrences = np.bincount(np.asarray(output, int), minlength=len(x))[: len(x)].astype(F32)
    in_output = occurrences > 0
    in_text = in_output | np.isin(np.arange(len(x)), prompt)
    r = F32(parameters.get("repetition_penalty", 1))
    if r >= 2.0**-126:
        x = np.where(in_text, np.where(x > 0, x / r, x * r), x)
    x = x - F32(parameters.get("frequency_penalty", 0)) * occurrences
    return np.where(in_output, x - F32(parameters.get("presence_penalty", 0)), x)


def kept(x: np.ndarray, parameters: dict) -> np.ndarray:
    """Return the logits after top-k, top-p and min-p: minus infinity where cut."""
    x, m = x.copy(), x.max()
    order = np.lexsort((np.arange(len(x)), -x))  # by falling logit, then by rising id
    if (k := parameters.get("top_k")) is not None and k < len(x):
        x[order[k:]] = -np.inf
        order = order[:k]
    if (top_p := F32(parameters.get("top_p", 1))) < 1:
        before = mass_before(x, order)
        if (over := np.flatnonzero(before > top_p)).size:
            x[order[over[0] :]] = -np.inf
    x[np.exp(x - m) < F32(parameters.get("min_p", 0))] = -np.inf
    return x


def mass_before(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the probability before each token of the order, float32[len(order)]."""
    weights = np.exp(x - x.max())
    up_to = sums_by_shifts(weights[order] / sum_by_halves(weights))
    return np.concatenate([np.zeros(1, F32), up_to[:-1]])


def sum_by_halves(values: np.ndarray) -> np.float32:
    """Return the sum of a list, added in the order that the page states."""
    size = 1
    while size < len(values):
        size *= 2
    values = np.concatenate([values, np.zeros(size - len(values), F32)])
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]


def sums_by_shifts(values: np.ndarray) -> np.ndarray:
    """Return the sum of the elements up to each, added in the order that the page states."""
    s, d = values.copy(), 1
    while d < len(s):
        s = np.concatenate([s[:d], s[d:] + s[:-d]])
        d *= 2
    return s


# Section 2: noise


def noise(seed: int, step: int, size: int) -> np.ndarray:
    """Return the Gumbel noise of tokens 0 to size - 1, float32[size]."""
    step_key = threefry((seed >> 32, seed & WORD), (0, step))
    a, b = threefry(step_key, (0, np.arange(size)))
    bits = (a ^ b).astype(F32) + F32(0.5)
    u = np.minimum(bits / F32(2.0**32), F32(1 - 2.0**-24))
    return -np.log(-np.log1p(-u))


def threefry(key, counter):
    """Map a counter of two 32-bit words by a key of two: Threefry-2x32, 20 rounds.

    Words are Python ints or int64 arrays.
    """
    keys = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA]
    a, b = (counter[0] + keys[0]) & WORD, (counter[1] + keys[1]) & WORD
    for block in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            a = (a + b) & WORD
            b = ((b << turn | b >> (32 - turn)) & WORD) ^ a
        a = (a + keys[(block + 1) % 3]) & WORD
        b = (b + keys[(block + 2) % 3] + block + 1) & WORD
    return a, b
