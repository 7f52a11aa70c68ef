"""Work of a row. FLOPs: two products of 2*s*s*d each forward, five backward; causal counts half. Bytes: K and V once."""
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def flops(row, which):
    forward = 4.0 * row.b * row.hq * row.sq * row.s * row.d * (0.5 if row.causal else 1.0)
    return forward if which == "forward" else 2.5 * forward


def kv_bytes(row):
    return 2 * row.b * row.hk * row.s * row.d * BYTES[row.dtype]
