"""Reads the part of TOML that messages.toml is written in, for Python 3.10, which has no tomllib.

That part: [[tables]], comments on lines of their own, and `key = value` with a value that is a 'literal' string, a
"basic" one without backslashes, a multi-line literal string, or an array of the first two, also over several lines.
"""

import re

_STRING = r"""(?:'[^'\n]*'|"[^"\\\n]*")"""
_TABLE = re.compile(r"\[\[(\w+)\]\]$")
_PAIR = re.compile(
    rf"(\w+) = (?:'''\n?(?P<block>.*?)'''|(?P<string>{_STRING})|\[(?P<array>(?:\s*{_STRING},?)*)\s*\]) *\n",
    re.DOTALL,
)


def loads(text):
    """What tomllib.loads returns. ValueError where the text is more than that part of TOML."""
    result, table, at = {}, {}, 0
    while at < len(text):
        end = text.find("\n", at) + 1 or len(text)
        line = text[at:end].strip()
        if opened := _TABLE.match(line):
            table = {}
            result.setdefault(opened[1], []).append(table)
        elif line and not line.startswith("#"):
            pair = _PAIR.match(text, at)
            if not pair:
                number = text.count("\n", 0, at) + 1
                raise ValueError(f"line {number}: cannot read {line!r}")
            if pair["array"] is not None:
                table[pair[1]] = [string[1:-1] for string in re.findall(_STRING, pair["array"])]
            elif pair["string"] is not None:
                table[pair[1]] = pair["string"][1:-1]
            else:
                table[pair[1]] = pair["block"]
            end = pair.end()
        at = end
    return result
