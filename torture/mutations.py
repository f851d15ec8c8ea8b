"""Seeded mutations of files: of bytes, and of JSON by its structure."""

import copy
import json
import random
import struct
from typing import Any

_INTEGERS = (0, 1, -1, 127, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1)
_INTEGERS += (2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**18, 10**400)
_TEXTS = ("", ".", "..", "../../../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "~root", "C:\\x")
_TEXTS += ("\x1b[2J\x1b]0;x\x07", "\u202egnp.exe", "\ud800", "\x00", "a\nb", "x" * 5000, "shared")
_TEXTS += ("<script>alert(1)</script>", "$\\frac{", "%s%n", "file:///etc/passwd", "é\u0301\u200b")
_VALUES: tuple[Any, ...] = (None, True, False, 0.0, -0.0, 1e308, 5e-324, float("nan"))
_VALUES += (float("inf"), -float("inf"), [], {}, [[]], {"": None}, *_INTEGERS, *_TEXTS)
Path = tuple[Any, ...]


def mutate(data: bytes, rng: random.Random, *, structure: bool = True) -> bytes:
    """Returns data with one to eight changes, half of the time of the values that it spells."""
    if structure and rng.random() < 0.5:
        changed = mutate_json(data, rng)
        if changed is not None:
            return mutate_bytes(changed, rng, 1) if rng.random() < 0.1 else changed
    return mutate_bytes(data, rng, rng.choice((1, 1, 1, 2, 3, 8)))


def mutate_json(data: bytes, rng: random.Random) -> bytes | None:
    """Returns JSON, or lines of it, with changed values; None if it is no JSON."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        lines = data.split(b"\n")
        number = rng.randrange(len(lines))
        changed = mutate_json(lines[number], rng) if len(lines) > 1 else None
        if changed is None:
            return None
        return b"\n".join([*lines[:number], changed, *lines[number + 1 :]])
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _change(value, rng)
    if rng.random() < 0.02:
        depth = rng.choice((100, 990, 100_000))
        return b'{"x": ' * depth if rng.random() < 0.5 else b"[" * depth + b"]" * depth
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05 and ":" in text:  # a key that comes twice
        text = text[:-1] + "," + text[1:] if text.startswith("{") else text
    return text.encode(errors=rng.choice(("surrogatepass", "replace")))


def _change(value: Any, rng: random.Random) -> Any:
    """Returns a JSON value with one change at a random place of it."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    place = rng.choice(places)
    if not place:
        return rng.choice(_VALUES) if rng.random() < 0.1 else value
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    key, how = place[-1], rng.random()
    if how < 0.15:
        del parent[key]
    elif how < 0.25 and isinstance(parent, dict):
        parent[str(rng.choice((*_TEXTS, f"{key}x")))] = parent.pop(key)
    elif how < 0.35 and isinstance(parent, list):
        most = 1 if isinstance(parent[key], dict | list) else 1000  # or it would grow without end
        parent.extend([parent[key]] * rng.choice((1, 2, most)))
    elif how < 0.5:
        other = value
        for step in rng.choice(places):
            other = other[step]
        parent[key] = copy.deepcopy(other)
    elif how < 0.6 and isinstance(parent[key], int | float):
        factors = (-1, 2, 1000) if abs(parent[key]) > 1e300 else (-1, 2, 1000, 0.5)
        parent[key] = parent[key] * rng.choice(factors) + rng.choice((-1, 0, 1))
    else:
        parent[key] = copy.deepcopy(rng.choice(_VALUES))
    return value


def _places(value: Any, at: Path = ()) -> list[Path]:
    """Returns the keys that lead to every value inside a JSON value, at most 2,000."""
    found, ahead = [], [(value, at)]
    while ahead and len(found) < 2000:
        inner, place = ahead.pop()
        found.append(place)
        pairs = inner.items() if isinstance(inner, dict) else ()
        pairs = enumerate(inner) if isinstance(inner, list) else pairs
        ahead += [(below, (*place, key)) for key, below in pairs]
    return found


def mutate_bytes(data: bytes, rng: random.Random, changes: int) -> bytes:
    """Returns data after some changes of bytes: flipped, set, cut, inserted, copied, moved."""
    content = bytearray(data)
    for _ in range(changes):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 2, 4, 8, 64, 1024)))
        how = rng.randrange(8)
        if how == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(content):
            content[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif how == 2:
            del content[at:end]
        elif how == 3:
            content[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        elif how == 4:
            content[at:at] = content[at:end] * rng.choice((1, 2, 50))
        elif how == 5:
            form = rng.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
            packed = struct.pack(form, rng.choice(_INTEGERS) % (1 << 8 * struct.calcsize(form)))
            content[at : at + len(packed)] = packed
        elif how == 6:
            del content[at:]
        else:
            source = rng.randrange(len(content) + 1)
            content[at:end] = content[source : source + end - at]
    return bytes(content)
