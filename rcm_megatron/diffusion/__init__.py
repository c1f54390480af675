"""Mathematics of rCM distillation: no network, no rank, no configuration object.

Every function works on any tensor layout; times `t` arrive in a shape that broadcasts against the data
(`[b, 1, 1, 1, 1]` for videos `[b, c, t, h, w]`, `[1, b, 1]` for token shards `[s, b, p]`).
"""
