"""Checks every source file: clang-format and msvc_lint.py for C++ and CUDA, ruff for Python.

python scripts/lint.py
python scripts/lint.py --fix            # changes what can be changed mechanically
"""

import argparse
import subprocess
import sys

import _bootstrap as bootstrap

CLANG_FORMAT = "clang-format==23.1.5"
RUFF = "ruff==0.17.6"
LIBCLANG = "libclang==18.1.1"
CPP_FOLDERS = ("csrc", "tests")
CPP_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
PYTHON_FOLDERS = ("python", "scripts", "tests")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fix", action="store_true", help="rewrite the files instead of complaining"
    )
    options = parser.parse_args()

    with bootstrap.leg("linters"):
        python = bootstrap.environment_python()
        bootstrap.pip_install(python, CLANG_FORMAT, RUFF, LIBCLANG)
    tools = python.parent
    files = [
        path
        for folder in CPP_FOLDERS
        for path in sorted((bootstrap.ROOT / folder).rglob("*"))
        if path.suffix in CPP_SUFFIXES
    ]
    how = ["-i"] if options.fix else ["--dry-run", "--Werror"]
    commands = {
        "clang-format": [tools / "clang-format", *how, *files],
        "msvc_lint": [python, bootstrap.ROOT / "scripts" / "msvc_lint.py"],
        "ruff check": [
            tools / "ruff",
            "check",
            *(["--fix"] if options.fix else []),
            *PYTHON_FOLDERS,
        ],
        "ruff format": [
            tools / "ruff",
            "format",
            *([] if options.fix else ["--check"]),
            *PYTHON_FOLDERS,
        ],
    }
    failed = []
    for name, command in commands.items():
        with bootstrap.leg(name):
            if subprocess.run(command, cwd=bootstrap.ROOT).returncode:
                failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}; python scripts/lint.py --fix mends what it can")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
