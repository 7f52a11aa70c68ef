"""Work of a row. FLOPs: two products of 2*s*s*d each forward, five backward; causal counts half. Bytes: K and V once."""
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def _scores(sq, sk, causal, window):
    """Visible scores of one head of one sequence; half of all of a square causal one, as it is usually counted."""
    if window:
        full = max(0, sq - window)      # rows that see a whole window
        return full * window + (sq - full) * (sq - full) / 2
    return sq * sk * (0.5 if sq == sk else 1 - (sq / sk) / 2) if causal else float(sq * sk)


def flops(row, which):
    lengths, window = getattr(row, "lengths", ()), getattr(row, "window", 0)
    extents = [(n, n) for n in lengths] or [(row.sq, row.s)] * row.b
    scores = sum(_scores(sq, sk, row.causal, window) for sq, sk in extents)
    forward = 4.0 * row.hq * row.d * scores
    return forward if which == "forward" else 2.5 * forward


def kv_bytes(row):
    return 2 * row.b * row.hk * row.s * row.d * BYTES[row.dtype]
