"""What the loaded library is: `native_info()` returns a JSON text."""

from mamba_ssm.native.loader import operation

native_info = operation("native_info", fake=lambda: "{}")
