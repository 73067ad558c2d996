"""The model that the demo must beat: it counts which byte followed the last few."""

import math
from collections import Counter


class WittenBell:
    """Order-k byte model with Witten-Bell back-off (Witten & Bell 1991, method C).

    After a context seen n times, with t distinct successors, a byte seen c times there has
        P(byte | context) = (c + t P(byte | context without its first byte)) / (n + t);
    below the empty context every byte has 1/256. A context never seen defers to the shorter one.
    """

    def __init__(self, text, order=2):
        self.order = order
        self._pairs = Counter()  # bytes of (context, successor)
        self._total = Counter()  # context -> n
        for length in range(order + 1):
            self._pairs.update(text[i : i + length + 1] for i in range(len(text) - length))
        for pair, count in self._pairs.items():
            self._total[pair[:-1]] += count
        self._distinct = Counter(pair[:-1] for pair in self._pairs)  # context -> t

    def probability(self, context, byte):
        """P(byte | the last `order` bytes of context)."""
        result = 1 / 256
        for length in range(min(self.order, len(context)) + 1):
            suffix = context[len(context) - length :]
            distinct = self._distinct[suffix]
            if distinct:
                count = self._pairs[suffix + bytes([byte])]
                result = (count + distinct * result) / (self._total[suffix] + distinct)
        return result

    def bits_per_byte(self, text, start):
        """Mean of -log2 P over text[start:]; the bytes before start serve as context only."""
        bits = 0.0
        for i in range(start, len(text)):
            bits -= math.log2(self.probability(text[max(0, i - self.order) : i], text[i]))
        return bits / (len(text) - start)
