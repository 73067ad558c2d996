"""What a cubin says about its kernels: names, machine code and launch bounds, read out of the ELF file."""

import re
import struct

_MAX_THREADS = 0x05  # the attribute of .nv.info that __launch_bounds__ leaves
_BUILTIN_TYPES = {
    "f": "f32",
    "d": "f64",
    "b": "bool",
    "i": "int",
    "j": "uint",
    "t": "ushort",
    "l": "i64",
}
_CLASS_TYPES = {"__half": "f16", "Half": "f16", "__nv_bfloat16": "bf16", "BFloat16": "bf16"}


def kernels(data):
    """{mangled name: (bytes of machine code, threads of __launch_bounds__ or 0)}."""
    sections = dict(_sections(data))
    prefix = ".nv.constant0."  # its parameters: what a kernel has and a device function has not
    found = {}
    for name in (
        section.removeprefix(prefix) for section in sections if section.startswith(prefix)
    ):
        found[name] = (len(sections[f".text.{name}"]), _threads(sections[f".nv.info.{name}"]))
    return found


def _sections(data):
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("expected a cubin, a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    text = headers[names][4]
    for name, kind, _, _, offset, length in headers:
        end = data.index(b"\0", text + name)
        no_bytes = kind == 8  # SHT_NOBITS: only a size
        yield data[text + name : end].decode(), b"" if no_bytes else data[offset : offset + length]


def _threads(info):
    at = 0
    while at + 4 <= len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != 4:  # the value stands in the record itself
            continue
        if attribute == _MAX_THREADS:
            x, y, z = struct.unpack_from("<III", info, at)
            return x * y * z
        at += value
    return 0


def compact(mangled):
    """_ZN..10scan_lanesI6__halfLi4EEEv.. -> scan_lanes<f16, 4>; what it cannot read stays as it is."""
    try:
        path, rest = _nested_name(mangled.removeprefix("_Z"))
        arguments = []
        if rest.startswith("I"):
            rest = rest[1:]
            while not rest.startswith("E"):
                argument, rest = _argument(rest)
                arguments.append(argument)
    except ValueError:
        return mangled
    return path[-1] + (f"<{', '.join(arguments)}>" if arguments else "")


def _nested_name(text):
    """N 3foo 3bar ... -> ([foo, bar], what follows)."""
    if not text.startswith("N"):
        raise ValueError(text)
    text, path = re.sub("^NS[0-9A-Z]*_", "N", text)[1:], []
    while match := re.match("[0-9]+", text):
        end = match.end() + int(match[0])
        path.append(text[match.end() : end])
        text = text[end:]
    if not path:
        raise ValueError(text)
    return path, text


def _argument(text):
    """One template argument -> (its text, what follows)."""
    if match := re.match("L(?:[a-z]|N.*?E)(n?)([0-9]+)E", text):
        value = ("-" if match[1] else "") + match[2]
        if text.startswith("Lb"):
            value = "true" if value == "1" else "false"
        return value, text[match.end() :]
    if text[0] in _BUILTIN_TYPES:
        return _BUILTIN_TYPES[text[0]], text[1:]
    nested = text.startswith("N")
    path, rest = _nested_name(text if nested else f"N{text}")
    return _CLASS_TYPES.get(path[-1], path[-1]), rest[1:] if nested else rest
