"""Names of a package that are imported when first asked for (PEP 562)."""

import importlib
import pkgutil


def attach(package, functions, submodules, optional=None):
    """Returns `__getattr__` and `__dir__` for a package's namespace.

    functions: name -> module that defines it; submodules: names below the package; optional: name -> "module:name"
    or "module:", None where that cannot be imported.
    """
    optional = optional or {}

    def __getattr__(name):
        if name in functions:
            value = getattr(importlib.import_module(functions[name]), name)
        elif name in submodules:
            value = importlib.import_module(f"{package}.{name}")
        elif name in optional:
            try:
                value = pkgutil.resolve_name(optional[name])
            except (AttributeError, ImportError):
                value = None
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return value

    def __dir__():
        return sorted({*functions, *submodules, *optional})

    return __getattr__, __dir__
