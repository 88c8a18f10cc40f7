"""English-like text from a seed: words drawn as English uses them, in sentences.

It compresses about as well as real chat does, and no two messages of a chat are alike.
"""

from __future__ import annotations

import itertools
import random

MESSAGE_SIZE = 1_000
"""Bytes of one message."""

# The most frequent first, since the weight of a word follows from its rank.
_VOCABULARY = """
the of and to a in is that for it you was on with as be at this have from or by one had not but
what all were when we there can an your which their said if do will each about how up out them then
she many some so these would other into has more her two like him see time could no make than first
been its who now people my made over did down only way find use may water long little very after
words called just where most know get through back much before go good new write our used me man too
any day same right look think also around another came come work three word must because does part
even place well such here take why things help put years different away again off went old number
great tell men say small every found still between name should home big give air line set own under
read last never us left end along while might next sound below saw something thought both few those
always looked show large often together asked house world going want school important until form
food keep children feet land side without boy once animals life enough took four head above kind
began almost live page got earth need far hand high year mother light country father let night
picture being study second soon story since white ever paper hard near sentence better best across
during today however sure knew try told young sun thing whole hear example heard several change
answer room sea against top turned learn point city play toward five himself usually money seen car
morning order refund customer account question payment invoice delivery request report ticket
service system update problem reason message agent address number week office meeting plan price
"""
_WORDS = _VOCABULARY.split()
_CUMULATIVE = list(itertools.accumulate(1 / (rank + 2) for rank in range(len(_WORDS))))
_ENDINGS = ("." * 8) + "?!"


def make_text(size: int, *, seed: int) -> str:
    """Return `size` bytes of text; each seed has its own."""
    source = random.Random(seed)
    sentences: list[str] = []
    missing = size
    while missing > 0:
        sentences.append(_sentence(source))
        missing -= len(sentences[-1]) + 1
    return " ".join(sentences)[: size - 1] + "."


def make_messages(count: int, *, seed: int) -> list[str]:
    """Return distinct texts of `MESSAGE_SIZE` bytes."""
    messages = [make_text(MESSAGE_SIZE, seed=seed * 1_000_000 + number) for number in range(count)]
    assert len(set(messages)) == count
    return messages


def _sentence(source: random.Random) -> str:
    words = source.choices(_WORDS, cum_weights=_CUMULATIVE, k=source.randint(5, 18))
    if len(words) > 9:
        words[source.randint(3, 6)] += ","
    return " ".join(words).capitalize() + source.choice(_ENDINGS)
