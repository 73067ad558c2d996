"""Names of a package that are imported when first asked for (PEP 562)."""

import importlib


def attach(package, functions, submodules):
    """Returns `__getattr__` and `__dir__` for a package's namespace.

    functions: name -> module that defines it; submodules: names below the package.
    """

    def __getattr__(name):
        if name in functions:
            value = getattr(importlib.import_module(functions[name]), name)
        elif name in submodules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return value

    def __dir__():
        return sorted({*functions, *submodules})

    return __getattr__, __dir__
