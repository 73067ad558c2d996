"""The GPU code inside a library, read out of the file: so it is known where nothing can be loaded.

nvcc puts fat binaries into a section of the library. Each has a header of 16 bytes, then its entries; the
fields used here are those that CUDA 11 to 13 write (tests compare with nvcc's own output).
"""

import mmap
import re
import struct

_MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # what it is, its version, the header's size
_PTX, _SASS = 1, 2
_ARCHITECTURE = 28  # where an entry says it


def architectures(path):
    """(numbers of the machine code, numbers of the PTX) in a file, as ([75, 80, 90], [90]); sorted."""
    found = {_SASS: set(), _PTX: set()}
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            return [], []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for match in re.finditer(re.escape(_MAGIC), data):
                for kind, architecture in _entries(data, match.start()):
                    found.get(kind, set()).add(architecture)
    return sorted(found[_SASS]), sorted(found[_PTX])


def _entries(data, at):
    """(kind, architecture) of each entry of the fat binary that begins at a byte."""
    if at + 16 > len(data):
        return
    (size,) = struct.unpack_from("<Q", data, at + 8)
    at += 16
    end = min(at + size, len(data))
    while at + _ARCHITECTURE + 4 <= end:
        kind, header, payload = struct.unpack_from("<HxxIQ", data, at)
        yield kind, struct.unpack_from("<I", data, at + _ARCHITECTURE)[0]
        if header + payload == 0:
            return
        at += header + payload


def runs_on(capability, sass, ptx):
    """Whether a GPU of compute capability (major, minor) finds code that it can run.

    Machine code runs on its own major from its minor on; PTX is translated for anything from its number on.
    """
    number = 10 * capability[0] + capability[1]
    same_major = (one for one in sass if one // 10 == capability[0])
    return any(one <= number for one in (*same_major, *ptx))
