"""One new token, encoded and written, as a decode step does both."""


def write_token(codec, packed, x, pos):
    """`packed` [B, S, K, *] with the token x [B, K, H] at `pos` [B]."""
    return codec.write_token(packed, codec.encode_token(packed, x), pos)


def write_slot(codec, packed, x, slot):
    """`packed` [B, K, M, *] with the token x [B, K, H] in `slot` [B, P]."""
    return codec.write_slot(packed, codec.encode_token(packed, x), slot)


def append(home, codec, k, v, length):
    """A store, ring or working set with the token k, v [B, K, H] at position `length` [B]."""
    return home.append(codec, codec.encode_token(home.k, k), codec.encode_token(home.v, v), length)
