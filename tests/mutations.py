"""Damage to files, for tests and for `make stress`: bytes at random, JSON values of another type.

    for path, value, text in wrong_values(document): ...    # every place of a JSON document
    damaged = mutate(random.Random(0), data)                # bytes changed, cut or inserted
"""
import copy
import json
import random
import signal
from contextlib import contextmanager

from config import UserError

SECONDS = 20                            # for one small file, on a machine that others use as well
LONGEST = 400                           # characters of a sentence

# Of another type than nearly everything that a file says; 1e400 is Infinity to Python's json
VALUES = (None, True, -1, float("inf"), "x", [], {})


def list_places(value, path=(), most=4):
    """Yield the path of every place below a JSON value: of a list, or of a table as long as a
    vocabulary, the first `most`."""
    inner = []
    if isinstance(value, dict):
        inner = list(value.items())[:most if len(value) > 99 else None]
    elif isinstance(value, list):
        inner = list(enumerate(value))[:most]
    for key, below in inner:
        yield (*path, key)
        yield from list_places(below, (*path, key), most)


def replace_at(document, path, value):
    """Return a copy of a JSON document with another value at one place."""
    changed = copy.deepcopy(document)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


def as_text(document):
    """Return JSON in which a number that is too large is written as such, not as Infinity."""
    return json.dumps(document, indent=1).replace("Infinity", "1e400")


def wrong_values(document, most=4):
    """Yield (path, value, JSON text) for each of VALUES at every place of a document."""
    for path in list_places(document, most=most):
        for value in VALUES:
            yield path, value, as_text(replace_at(document, path, value))


def change_json(rng: random.Random, data: bytes) -> bytes:
    """Return a JSON document that is still JSON: one place has another value (of another type, a
    neighbour's, a number nearby), is gone, or has another name."""
    document = json.loads(data)
    places = list(list_places(document))
    path = rng.choice(places)
    changed = copy.deepcopy(document)
    at = changed
    for key in path[:-1]:
        at = at[key]
    old = at[path[-1]]
    how = rng.randrange(5)
    if how == 0:
        del at[path[-1]]
    elif how == 1 and isinstance(at, dict):
        at[rng.choice((f"{path[-1]}x", path[-1].upper(), ""))] = at.pop(path[-1])
    elif how == 2 and type(old) in (int, float):
        at[path[-1]] = rng.choice((old + 1, old - 1, old * 2, float(old), str(old), old * 10 ** 9))
    elif how == 3:
        other = document
        for key in rng.choice(places):
            other = other[key]
        at[path[-1]] = other
    else:
        at[path[-1]] = rng.choice((*VALUES, "", 2 ** 70, [[]], "9" * 40, False, 0, 1e-400))
    return as_text(changed).encode()


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Return bytes changed, cut, doubled, inserted or removed at a few random places, most of them
    near the front, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        reach = rng.choice((64, 2000, len(changed) or 1))
        at = rng.randrange(max(1, min(len(changed), reach)))
        how = rng.randrange(5)
        n = rng.choice((1, 1, 2, 9, 100))
        if how == 0:
            changed[at:at + n] = rng.randbytes(n)
        elif how == 1:
            del changed[at:at + n]
        elif how == 2:
            changed[at:at] = rng.choice((b"0", b"-", b'"', b"[", b"}", b"9" * 30, b"\x00", b"\xff",
                                         b"1e999", b"null", rng.randbytes(n)))
        elif how == 3:
            changed[at:at] = changed[at:at + n]
        else:
            changed = changed[:at]
    return bytes(changed)


def damage(rng: random.Random, kind) -> bytes:
    """Return the sound file's bytes, damaged: of JSON half the time as values, not as bytes."""
    structured = kind.file.suffix == ".json" and rng.random() < 0.5
    return (change_json if structured else mutate)(rng, kind.sound)


@contextmanager
def time_limit(seconds=SECONDS):
    """Raise TimeoutError inside the block once the time is over."""
    def expire(number, frame):
        raise TimeoutError(f"more than {seconds} seconds")
    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(kind, data: bytes) -> str:
    """Read damaged bytes as a file of that kind: "same", "library" or "refused".

    AssertionError for a value that is neither the sound file's nor the library's, for another
    exception than UserError, and for a long sentence. The sound file is put back.
    """
    kind.file.write_bytes(data)
    try:
        with time_limit():
            value = kind.read()
    except UserError as e:
        assert len(str(e)) <= LONGEST, f"{kind.name}: {len(str(e))} characters: {e}"
        assert "\n" not in str(e), f"{kind.name}: several lines: {e}"
        return "refused"
    except Exception as e:
        raise AssertionError(f"{kind.name}: {type(e).__name__}: {str(e)[:200]}") from e
    else:
        if kind.equal(value, kind.value):
            return "same"
        assert kind.is_right(value), f"{kind.name}: a wrong value: {str(value)[:200]}"
        return "library"
    finally:
        kind.file.write_bytes(kind.sound)
