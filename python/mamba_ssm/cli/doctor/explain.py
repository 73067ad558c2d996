"""Finds the first real error in a pasted log, and says what messages.toml knows about it."""

import re
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from mamba_ssm.cli.doctor import toml_subset as tomllib

KNOWLEDGE = Path(__file__).with_name("messages.toml")
KINDS = ("error", "context", "aftermath")  # which counts first
# what looks like an error, for logs with nothing that is known
_ERROR = re.compile(r"\b(?:fatal )?error\b[ :]|\w+(?:Error|Exception): ", re.IGNORECASE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass
class Finding:
    number: int  # of the line, from 1
    line: str
    message: dict  # of messages.toml


def knowledge():
    """The [[message]]s of messages.toml, each with its patterns compiled and what its topic adds."""
    document = tomllib.loads(KNOWLEDGE.read_text(encoding="utf-8"))
    topics = {topic["name"]: topic for topic in document["topic"]}
    messages = []
    for one in document["message"]:
        topic = topics[one["topic"]] if "topic" in one else {"advice": "", "checks": []}
        one = {"kind": "error", "advice": topic["advice"], **one}
        one["checks"] = [*one.get("checks", []), *topic["checks"]]
        one["patterns"] = [re.compile(pattern) for pattern in one["patterns"]]
        messages.append(one)
    return messages


def read(text_or_file):
    """The log: the text itself, or what is in the file of that name. PowerShell's `>` writes UTF-16."""
    try:
        data = Path(text_or_file).read_bytes()
    except (OSError, ValueError):  # no file, or no name of one
        return text_or_file
    return decode(data)


def decode(data):
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf16 else "utf-8-sig", "replace")


def find(text, messages):
    """Findings, the one to explain first; each message once, where it stands first."""
    found = {}
    for number, line in enumerate(_COLOURS.sub("", text).splitlines(), 1):
        for message in messages:
            if any(pattern.search(line) for pattern in message["patterns"]):
                found.setdefault(message["id"], Finding(number, line.strip(), message))
                break
    return sorted(found.values(), key=lambda one: (KINDS.index(one.message["kind"]), one.number))


def first_error(text):
    """(line number, line) of the first line that looks like an error, None without one."""
    for number, line in enumerate(_COLOURS.sub("", text).splitlines(), 1):
        if _ERROR.search(line):
            return number, line.strip()
    return None


def explanation(finding, rows, system):
    """What is said of a finding, as data.

    rows: doctor's table of this machine; system: "windows" or "linux", whose own cure is added.
    """
    message = finding.message
    cures = [message["cure"], message.get(system, ""), message["advice"]]
    return {
        "id": message["id"],
        "line": finding.number,
        "text": finding.line,
        "cause": _one_line(message["cause"]),
        "cure": [_one_line(cure) for cure in cures if cure],
        "machine": [row for row in rows if row.check in message["checks"]],
    }


def _one_line(prose):
    return " ".join(prose.split())
