"""What TORCH_CUDA_ARCH_LIST comes to, as csrc/cmake/CudaArchitectures.cmake resolves it (a test compares them)."""

import re

OLDEST = 75
_WHEEL = (75, 80, 86, 89, 90, 100, 120)
_FAMILIES = {
    "wheel": _WHEEL,
    "common": _WHEEL,
    "turing": (75,),
    "ampere": (80, 86),
    "ampere+tegra": (87,),
    "ada": (89,),
    "hopper": (90,),
    "blackwell": (100, 103, 120, 121),
    "blackwell+tegra": (110,),
    **dict.fromkeys(
        ("kepler", "kepler+tesla", "maxwell", "maxwell+tegra", "pascal", "volta", "volta+tegra"), ()
    ),
}
_NUMBER = re.compile(r"(sm_|compute_)?(\d+)(?:\.(\d))?([af]?)(\+ptx|-real|-virtual)?")


def resolve(text, supported, native):
    """(sorted ["86-real", "120", ...] as CMake takes them, what is wrong or None).

    supported: the numbers that this nvcc builds; native: those of this machine's GPUs.
    """
    known = sorted(number for number in supported if number >= OLDEST)
    families = _FAMILIES | {
        "all": known,
        "all-major": [number for number in known if number % 10 == 0 or number == OLDEST],
        "native": [number for number in native if number in known],
    }
    result = set()
    for word in filter(None, re.split(r"[\"' \t,;]+", text.lower())):
        if number := _NUMBER.fullmatch(word):
            prefix, major, minor, letter, suffix = number.groups()
            value = int(major + (minor or ""))
            if value not in known:
                return (
                    [],
                    f"{word}: the kernels need {OLDEST} or newer, and this nvcc builds {known}",
                )
            ending = {"+ptx": "", None: "-real"}.get(suffix, suffix)
            result.add(f"{value}{letter}" + ("-virtual" if prefix == "compute_" else ending))
            continue
        name = word if word in families else word.removesuffix("+ptx")
        name = "native" if name == "auto" else name
        if name == "native" and not families["native"]:
            name = "wheel"
        if name not in families:
            return [], f"{word} is no architecture"
        built = [number for number in families[name] if number in known]
        result.update(f"{number}-real" for number in built)
        if built and (word.endswith("+ptx") or not re.fullmatch("native|.*tegra", name)):
            result.remove(f"{built[-1]}-real")  # with PTX of the newest
            result.add(str(built[-1]))
    result -= {f"{both}{half}" for both in result for half in ("-real", "-virtual")}
    if not result:
        return [], f"nothing of it is built by this nvcc, which builds {known}"
    return sorted(result, key=lambda one: (int(re.match(r"\d+", one)[0]), one)), None
