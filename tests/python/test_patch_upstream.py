"""The patcher for upstream's sources, on trees that have the constructs of each version."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import upstream_tree

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
PATCHES = ROOT / "patches"
sys.path.insert(0, str(SCRIPTS))

import _patches as patches  # noqa: E402
import msvc_lint  # noqa: E402
import patch_upstream  # noqa: E402
from _msvc_lint.rules import RULES  # noqa: E402

SCAN = "csrc/selective_scan/"
FORWARD, BACKWARD = (f"{SCAN}selective_scan_{way}_kernel.cuh" for way in ("fwd", "bwd"))
EVERY = pytest.mark.parametrize(("project", "version"), upstream_tree.RELEASES)
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def patch(monkeypatch, capfd):
    """Runs the script: its status, what it printed, and its complaints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["patch_upstream.py", *map(str, arguments)])
        status = patch_upstream.main()
        return (status, *capfd.readouterr())

    return run


def everything(root):
    """{name: bytes} of all files below a folder."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".git" not in path.relative_to(root).parts
    }


def edit(root, name, old, new, count=1):
    """Replaces a text that is there that often."""
    path = root / name
    content = path.read_bytes()
    assert content.count(old.encode()) == count
    path.write_bytes(content.replace(old.encode(), new.encode()))


def findings(root):
    """{rule: findings} of msvc_lint in the tree's C++ sources."""
    _, found = msvc_lint.lint([root / "csrc"], RULES, None)
    return {rule: len(places) for rule, places in found.items()}


def sources(files):
    return {name: content for name, content in files.items() if name.startswith("csrc/")}


@EVERY
def test_every_version_is_clean_for_cl_afterwards(tmp_path, patch, project, version):
    root = upstream_tree.tree(tmp_path, project, version)
    at = upstream_tree.numbers(version)
    lit = {"restrict-in-host-header", "min-max-macro"}
    if project == "mamba":
        lit |= {"constexpr-in-lambda", "math-constant"}
        lit |= {"missing-typename", "missing-return"} if at <= (2, 0, 4) else set()
        lit |= {"directive-in-macro-arguments"} if at >= (2, 2) else set()
    else:
        lit |= {"missing-typename"} if at < (1, 4) else set()
        lit |= {"alternative-token"} if (1, 2) <= at < (1, 6, 1) else set()
        lit |= {"directive-in-macro-arguments"} if (1, 4) <= at < (1, 6, 1) else set()
    assert findings(root).keys() == lit

    status, printed, _ = patch(root)
    assert status == 0 and f"{project} {version}" in printed
    assert findings(root) == {}
    assert not re.search(
        rb"cub::(LaneId|CTA_SYNC)|c10::optional|AT_ERROR",
        b"".join(
            content for name, content in everything(root).items() if not name.endswith(".orig")
        ),
    )


@needs_compiler
@EVERY
def test_what_comes_out_compiles(tmp_path, patch, project, version):
    root = upstream_tree.tree(tmp_path / "tree", project, version)
    stubs = upstream_tree.stubs(tmp_path / "stubs")
    assert patch(root)[0] == 0
    folder = root / ("csrc/selective_scan" if project == "mamba" else "csrc")
    headers = "".join(
        f'#include "{path.name}"\n'
        for path in sorted(folder.iterdir())
        if path.suffix in {".h", ".cuh", ".cu", ".cpp"}
    )
    use = "template struct BlockReverseScan<float, 32>;\nvoid f(ParamsBase& p) { bwd_dispatch(p); }"
    use = "float a[4];\nfloat b = ThreadReverseScanInclusive(a, a);\n" + use
    if project == "mamba":
        use = use if upstream_tree.numbers(version) <= (2, 0, 4) else use.split("\n", 2)[2]
    whole = tmp_path / "whole.cpp"
    whole.write_text(headers + (use if project == "mamba" else ""))
    for defines in ((), ("-DUSE_ROCM",)):
        command = ["g++", "-std=c++17", "-fsyntax-only", "-Werror=return-type", *defines]
        command += ["-I", stubs, "-I", folder, whole]
        compiled = subprocess.run(command, capture_output=True, text=True)
        assert compiled.returncode == 0, compiled.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reverse_scan.cuh", "LaneId|CTA_SYNC|changes meaning|no return"),
        ("selective_scan.cpp", "optional"),
    ],
)
def test_what_goes_in_does_not(tmp_path, name, message):
    root = upstream_tree.tree(tmp_path / "tree", "mamba", "1.0.0")
    stubs = upstream_tree.stubs(tmp_path / "stubs")
    command = ["g++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-I", stubs, root / SCAN / name]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode != 0 and re.search(message, compiled.stderr)


@EVERY
def test_second_run_says_already_and_reverse_restores(tmp_path, patch, project, version):
    root = upstream_tree.tree(tmp_path, project, version)
    before = everything(root)
    assert patch(root, "--check")[0] == 1
    assert everything(root) == before
    assert patch(root)[0] == 0
    patched = everything(root)
    originals = {name for name in patched if name.endswith(".orig")}
    changed = {name for name in before if patched[name] != before[name]}
    assert originals == {f"{name}.orig" for name in changed}

    for options in ((), ("--check",)):
        status, printed, _ = patch(root, *options)
        assert status == 0 and "already" in printed and " patch " not in printed
    assert patch(root, "--diff")[:2] == (0, "")
    assert everything(root) == patched

    assert patch(root, "--reverse")[0] == 0
    assert everything(root) == before
    status, printed, _ = patch(root, "--reverse")
    assert status == 0 and "nothing to take back" in printed


@pytest.mark.parametrize(
    ("project", "version"), [("mamba", "1.0.0"), ("mamba", "2.3.0"), ("causal-conv1d", "1.6.0")]
)
def test_line_ends_stay(tmp_path, patch, project, version):
    unix = upstream_tree.tree(tmp_path / "unix", project, version)
    dos = upstream_tree.tree(tmp_path / "dos", project, version, end="\r\n")
    before = everything(dos)
    assert patch(unix)[0] == 0 and patch(dos)[0] == 0
    expected = {name: content.replace(b"\n", b"\r\n") for name, content in everything(unix).items()}
    assert everything(dos) == expected
    assert patch(dos, "--reverse")[0] == 0
    assert everything(dos) == before


def test_mixed_line_ends_strange_bytes_and_a_bom_stay(tmp_path, patch):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0", end="\r\n")
    path = root / FORWARD
    lines = path.read_bytes().split(b"\r\n")
    kept = b"// caf\xe9 \xff\xfe\x85\x00 by hand\n"  # no UTF-8, and LF among CRLF
    path.write_bytes(b"\xef\xbb\xbf" + kept + b"\r\n".join(lines[:-1]))  # and no end in the last
    before = everything(root)
    assert patch(root)[0] == 0
    after = path.read_bytes()
    assert after.startswith(b"\xef\xbb\xbf" + kept) and not after.endswith(b"\n")
    assert after.count(b"\n") - after.count(b"\r\n") == 1
    assert b"static constexpr int kNRows = 1;\r\n" in after
    assert patch(root, "--reverse")[0] == 0
    assert everything(root) == before


def test_only_the_constructs_change(tmp_path, patch):
    """The branches for complex A, the directives outside of macros, the rest of every line."""
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.2")
    before = sources(everything(root))
    assert patch(root)[0] == 0
    after = everything(root)
    marks = b"PATCH_IF|USE_ROCM|#else|#endif|static constexpr|kLog2e|algorithm|WarpReverseScan ="
    marks = re.compile(marks + rb"|__restrict |^\s*\)$")
    for name, content in before.items():
        old, new = content.splitlines(), after[name].splitlines()
        assert [line for line in new if line not in old and not marks.search(line)] == []
        gone = [line for line in old if line not in new]
        constructs = (
            rb"constexpr|M_LOG2E|WarpReverseScan|__restrict__|#(ifndef USE_ROCM|else|endif)"
        )
        assert [line for line in gone if not re.search(constructs, line)] == []
    for name in (FORWARD, BACKWARD):
        assert after[name].count(b"if (params.seqlen <= 128)") == 1
        assert b"#ifndef USE_ROCM\n        if (params.seqlen <= 128)" in after[name]
        assert b"const float A_real = params.A_real * scale, A_imag" in after[name]
    assert b"c10::complex<float>()" in after[f"{SCAN}selective_scan.cpp"]


def test_both_spellings_of_log2e_are_one_float():
    text = (PATCHES / "math-constant.toml").read_text()
    (literal,) = set(re.findall(r"1\.44\d+(?=f')", text))
    import math
    import struct

    def single(value):
        return struct.pack("f", value)

    assert single(float(literal)) == single(math.log2(math.e))


# Refusals: each leaves the tree as it was and names the file and the topic.


def refused(root, patch, *words, options=()):
    before = everything(root)
    for mode in (("--check",), ()):
        status, _, complaint = patch(root, *mode, *options)
        assert status == 2, complaint
        for word in (*words, "nothing was written"):
            assert word in complaint
    assert everything(root) == before


@pytest.mark.parametrize(
    ("project", "version", "name", "old", "new", "words"),
    [
        (
            *("mamba", "2.3.0", FORWARD),
            *(
                "    constexpr int kNRows = 1;",
                "    constexpr int kNRows = 1; constexpr int kNRows = 1;",
            ),
            ("constexpr-in-lambda", "2 matches", "expected 1"),
        ),
        (
            *("mamba", "1.2.0", f"{SCAN}static_switch.h"),
            *("CONST_NAME = false;", "CONST_NAME = false; constexpr bool CONST_NAME = true;"),
            ("constexpr-in-lambda", "3 matches", "expected 2"),
        ),
        (
            *("mamba", "2.2.4", BACKWARD),
            *("float kLog2e = M_LOG2E;", "double log2_of_e = M_LOG2E;"),
            ("math-constant", "M_LOG2E", "does not know"),
        ),
        (
            *("mamba", "2.2.4", FORWARD),
            *("#ifndef USE_ROCM\n                SET", "#ifdef __CUDACC__\n                SET"),
            ("directive-in-macro-arguments", "does not know"),
        ),
        (
            *("mamba", "2.3.0", f"{SCAN}reverse_scan.cuh"),
            *(
                "template <typename T, int LOGICAL>",
                "namespace scan {\ntemplate <typename T, int LOGICAL>",
            ),
            ("alias-of-its-own-name", "does not know"),
        ),
        (
            *("causal-conv1d", "1.5.2", "csrc/causal_conv1d.cpp"),
            *('"out");', '"out"); bool more = batch % 8 == 0 and true;'),
            ("alternative-token", "4 matches", "expected 3"),
        ),
        (
            *("mamba", "2.3.0", "setup.py"),
            *("\nsetup(", "\nimport setuptools\nsetuptools.setup("),
            ("setup-msvc-flags", "0 matches", "expected 1", "setup-threads"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_other_numbers_and_shapes_are_refused(
    tmp_path, patch, project, version, name, old, new, words
):
    root = upstream_tree.tree(tmp_path, project, version)
    edit(root, name, old, new)
    refused(root, patch, name, *words)


@pytest.mark.parametrize(("version", "status"), [("1.2.2", 2), ("1.5.2", 0), ("of my own", 2)])
def test_other_shapes_are_refused_in_the_versions_that_have_the_construct(
    tmp_path, patch, version, status
):
    """In others it is no part of what was promised."""
    root = upstream_tree.tree(tmp_path, "causal-conv1d", "1.5.2")
    edit(root, "causal_conv1d/__init__.py", "1.5.2", version)
    edit(root, "csrc/causal_conv1d_fwd.cu", "    (void) params;", "    Ktraits::BlockLoadT{smem};")
    found, _, complaint = patch(root, "--check")
    assert (2 if "missing-typename: csrc/causal_conv1d_fwd.cu" in complaint else 0) == status
    assert found == (status or 1)


def test_a_missing_file_is_refused(tmp_path, patch):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    (root / BACKWARD).unlink()
    refused(root, patch, "selective_scan_bwd_kernel.cuh is not there", "math-constant")


def test_a_tree_that_is_not_upstreams_is_refused(tmp_path, patch):
    refused(tmp_path, patch, "name the folder that holds setup.py")
    upstream_tree.write(tmp_path, {"setup.py": "", "mamba_ssm/__init__.py": ""})
    refused(tmp_path, patch, "no csrc/selective_scan", "sdist")
    assert "is no folder" in patch(tmp_path / "absent")[2]
    assert "name the folder" in patch(ROOT)[2]  # which has the layout, but no setup.py


def test_a_read_only_file_is_refused(tmp_path, patch):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    before = everything(root)
    (root / BACKWARD).chmod(0o444)
    status, _, complaint = patch(root)
    assert status == 2 and f"{BACKWARD} is read-only" in complaint
    assert everything(root) == before
    (root / BACKWARD).chmod(0o644)
    assert patch(root)[0] == 0


def test_a_write_that_fails_takes_the_others_back(tmp_path, patch, monkeypatch):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    before = everything(root)
    write_bytes, failed = Path.write_bytes, []

    def no_space(path, content):
        if path == root / "setup.py" and not failed:
            failed.append(write_bytes(path, content[:100]))
            raise OSError("No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", no_space)
    status, _, complaint = patch(root)
    assert failed and status == 2 and "No space left" in complaint
    assert everything(root) == before


def test_ctrl_c_takes_the_others_back(tmp_path, patch, monkeypatch):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    before = everything(root)
    write_bytes, calls = Path.write_bytes, []

    def interrupted(path, content):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch(root)
    assert everything(root) == before


def test_a_foreign_orig_is_not_overwritten(tmp_path, patch):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    (root / f"{FORWARD}.orig").write_text("someone's\n")
    before = everything(root)
    status, _, complaint = patch(root)
    assert status == 2 and f"{FORWARD}.orig exists" in complaint
    assert everything(root) == before


def test_reverse_does_not_lose_what_was_written_since(tmp_path, patch):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    assert patch(root)[0] == 0
    edit(root, BACKWARD, "float out = A_real", "float out = 2 * A_real")
    patched = everything(root)
    status, _, complaint = patch(root, "--reverse")
    assert status == 2 and BACKWARD in complaint and "changed since" in complaint
    assert everything(root) == patched


# What the hash of a file decides


@pytest.fixture
def own_patches(tmp_path):
    """A folder of patches with one topic, whose table of blobs is given."""

    def make(known, name="anchor.toml", **keys):
        folder = tmp_path / "patches"
        folder.mkdir(exist_ok=True)
        (folder / "blobs.toml").write_text("".join(f'{b} = "as in mamba v9"\n' for b in known))
        lines = [f'{key} = "x"' for key in patches.TOLD]
        lines += ['projects = ["mamba"]', 'files = ["csrc/**/static_switch.h"]']
        lines += [f"{key} = {value}" for key, value in keys.items()]
        (folder / name).write_text("\n".join(lines) + "\n")
        return ("--patches", folder)

    return make


CONSTANTS = {"anchor": "'(?<!static )constexpr bool'", "replace": "'static constexpr bool'"}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("number", "count", "status"), [(2, 9, 1), (3, 2, 2), (0, 2, 0)])
def test_a_known_blob_decides_the_number(tmp_path, patch, own_patches, end, number, count, status):
    root = upstream_tree.tree(tmp_path / "tree", "mamba", "2.3.0", end)
    content = (root / f"{SCAN}static_switch.h").read_bytes().replace(b"\r\n", b"\n")
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()[:7]
    known = f"{{ {blob} = {number} }}"
    options = own_patches([blob], **CONSTANTS, count=count, blobs=known)
    found, printed, complaint = patch(root, "--check", *options)
    assert found == status
    assert {0: "not in this version", 1: "patch 2x", 2: "as in mamba v9"}[
        status
    ] in printed + complaint
    assert "of no release known" not in printed + complaint


@needs_git
@pytest.mark.parametrize("options", [(), ("--git",)])
def test_a_patched_file_is_known_by_its_original(checkout, patch, own_patches, options):
    """Or the second run would take up what the release's number 0 told the first to leave alone."""
    name = f"{SCAN}static_switch.h"
    known = f"{{ {patches.blob_of((checkout / name).read_bytes())} = 0 }}"
    left = {"anchor": "'return'", "replace": "'throw'", "count": 2, "blobs": known}
    own_patches([], name="left.toml", **left)
    options = (*options, *own_patches([], **CONSTANTS, count=2))
    assert "patch 2x" in patch(checkout, *options)[1]
    status, printed, _ = patch(checkout, *options)
    assert status == 0 and re.search("left +not in this version", printed)


def test_an_unknown_blob_leaves_it_to_the_text_and_says_so(tmp_path, patch, own_patches):
    root = upstream_tree.tree(tmp_path / "tree", "mamba", "2.3.0")
    options = own_patches(["1234567"], **CONSTANTS, count=2, blobs="{ 1234567 = 3 }")
    status, printed, _ = patch(root, "--check", *options)
    assert status == 1 and "of no release known here" in printed and "static_switch.h" in printed


@needs_git
def test_blobs_are_gits(tmp_path):
    content = b"a\r\nb\n"
    (tmp_path / "a").write_bytes(content.replace(b"\r\n", b"\n"))
    command = ["git", "hash-object", "--no-filters", tmp_path / "a"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith(patches.blob_of(content))


# Forks that have done some of it


def test_a_fork_that_has_half_of_it(tmp_path, patch):
    whole = upstream_tree.tree(tmp_path / "whole", "mamba", "2.2.4")
    assert patch(whole)[0] == 0
    fork = upstream_tree.tree(tmp_path / "fork", "mamba", "2.2.4")
    edit(
        fork,
        f"{SCAN}static_switch.h",
        "constexpr bool CONST_NAME = true",
        "static constexpr bool CONST_NAME = true",
    )
    edit(fork, FORWARD, "M_LOG2E", "1.4426950408889634f")
    (fork / BACKWARD).write_bytes((whole / BACKWARD).read_bytes())
    before = everything(fork)
    status, printed, _ = patch(fork)
    assert status == 0 and re.search(r"math-constant +already 2x", printed)
    expected = {n: c for n, c in everything(whole).items() if not n.endswith(".orig")}
    assert {n: c for n, c in everything(fork).items() if not n.endswith(".orig")} == expected
    assert patch(fork, "--reverse")[0] == 0
    assert everything(fork) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "topic"),
    [
        (FORWARD, "constexpr int kNRows = 1", "static const int kNRows = 1", "constexpr-in-lambda"),
        (
            FORWARD,
            "constexpr int kNRows = 1",
            "constexpr static int kNRows = 1",
            "constexpr-in-lambda",
        ),
        (
            f"{SCAN}selective_scan_common.h",
            "#pragma once\n",
            "#pragma once\n#include <algorithm>\n",
            "algorithm-include",
        ),
        (
            f"{SCAN}reverse_scan.cuh",
            "WarpReverseScan = W",
            "WarpReverseScan = ::W",
            "alias-of-its-own-name",
        ),
        (
            "setup.py",
            "import os\n",
            "import os\nbare_metal_version = None\n",
            "setup-bare-metal-version",
        ),
    ],
)
def test_a_fork_with_its_own_words(tmp_path, patch, name, old, new, topic):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    edit(root, name, old, new)
    status, printed, _ = patch(root)
    assert status == 0 and re.search(rf"{topic} .*already", printed)
    assert new.encode() in (root / name).read_bytes()
    assert findings(root) == {}


def test_a_fork_that_does_without_the_construct(tmp_path, patch):
    """Launches doubled around the directive, and switches by generic lambdas."""
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    for name in (FORWARD, BACKWARD):
        text = (root / name).read_text()
        start, end = text.index("                #ifndef"), text.index("                #endif")
        text = (
            text[:start]
            + "                SET_SMEM(kernel, kSmemSize);\n"
            + text[end:].split("\n", 1)[1]
        )
        (root / name).write_text(text)
    (root / f"{SCAN}static_switch.h").write_text(
        "#pragma once\n#include <type_traits>\n"
        "#define BOOL_SWITCH(COND, NAME, ...) with_bool(COND, [&](auto NAME) { __VA_ARGS__(); })\n"
    )
    status, printed, _ = patch(root)
    assert status == 0 and re.search(r"directive-in-macro-arguments +not in this version", printed)
    assert findings(root) == {}


# --git


def git(root, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True)
    if arguments[0] == "init":
        git(root, "config", "core.autocrlf", "false")


@pytest.fixture
def checkout(tmp_path):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "as it came")
    return root


@needs_git
def test_git_keeps_the_originals(checkout, patch):
    before = everything(checkout)
    status, printed, _ = patch(checkout, "--git")
    assert status == 0 and "--reverse --git" in printed
    patched = everything(checkout)
    assert patched.keys() == before.keys() and patched != before
    assert "already" in patch(checkout, "--git")[1]
    assert everything(checkout) == patched
    assert patch(checkout, "--reverse", "--git")[0] == 0
    assert everything(checkout) == before


@needs_git
def test_git_keeps_crlf(tmp_path, patch):
    root = upstream_tree.tree(tmp_path, "causal-conv1d", "1.5.2", end="\r\n")
    (root / ".gitattributes").write_bytes(b"* text eol=crlf\n")
    before = everything(root)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "as it came")
    assert patch(root, "--git")[0] == 0
    assert patch(root, "--reverse", "--git")[0] == 0
    assert everything(root) == before


@needs_git
def test_git_wants_the_files_committed(checkout, patch):
    edit(checkout, FORWARD, "float out =", "float  out =")
    before = everything(checkout)
    status, _, complaint = patch(checkout, "--git")
    assert status == 2 and f"{FORWARD} has changes that are not committed" in complaint
    git(checkout, "rm", "-q", "--cached", "-f", FORWARD)
    git(checkout, "commit", "-q", "-m", "without it")
    status, _, complaint = patch(checkout, "--git")
    assert status == 2 and f"{FORWARD} is not in git's last commit" in complaint
    assert everything(checkout) == before


@needs_git
def test_git_says_where_there_is_none(tmp_path, patch, monkeypatch):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", os.fspath(tmp_path.parent))
    refused(root, patch, "--git: ", "git repository", options=("--git",))
    monkeypatch.setenv("PATH", "")
    refused(root, patch, "no git on PATH", options=("--git",))


@needs_git
def test_the_diff_is_one_that_git_applies(checkout, patch):
    path = checkout / "pyproject.toml"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    git(checkout, "commit", "-q", "-a", "-m", "a file without an end in its last line")
    before = everything(checkout)
    status, diff, _ = patch(checkout, "--diff")
    assert status == 0 and everything(checkout) == before
    subprocess.run(["git", "apply", "-"], cwd=checkout, input=diff, text=True, check=True)
    applied = everything(checkout)
    git(checkout, "checkout", "-q", ".")
    assert patch(checkout)[0] == 0
    assert {n: c for n, c in everything(checkout).items() if n in applied} == applied


# setup.py, run with a torch and a setuptools that only listen


class Extension:
    def __init__(self, name, sources, extra_compile_args):
        self.extra_compile_args = extra_compile_args


def run_setup(root, monkeypatch, cuda_home="/usr/local/cuda", platform="linux", **environment):
    given = {}
    for name, members in {
        "torch": {},
        "torch.utils": {},
        "torch.utils.cpp_extension": {
            "CUDA_HOME": cuda_home,
            "BuildExtension": object,
            "CUDAExtension": Extension,
        },
        "setuptools": {"find_packages": list, "setup": lambda **arguments: given.update(arguments)},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("NVCC_THREADS", "MAMBA_SKIP_CUDA_BUILD", "MAMBA_KEEP_CUDA_BUILD"):
        monkeypatch.setenv(name, environment.get(name, ""))
        if name not in environment:
            monkeypatch.delenv(name)
    exec(compile((root / "setup.py").read_text(), "setup.py", "exec"), {})
    return given


@EVERY
def test_setup_py_passes_what_the_topics_say(tmp_path, patch, monkeypatch, project, version):
    root = upstream_tree.tree(tmp_path, project, version)
    assert patch(root)[0] == 0
    linux = run_setup(root, monkeypatch, NVCC_THREADS="2")
    assert "bdist_wheel" not in linux["cmdclass"] and "build_ext" in linux["cmdclass"]
    flags = linux["ext_modules"][0].extra_compile_args
    own = ["-std=c++17"] if project == "mamba" else []
    assert flags["cxx"] == ["-O3", *own]
    assert flags["nvcc"] == ["-O3", *own, "--use_fast_math", "--threads", "2"]

    windows = run_setup(root, monkeypatch, platform="win32")
    flags = windows["ext_modules"][0].extra_compile_args
    assert not any(flag.startswith(("-std", "-O3", "-gencode")) for flag in flags["cxx"])
    assert {"/Zc:preprocessor", "/Zc:__cplusplus", "/utf-8", "-DNOMINMAX"} <= set(flags["cxx"])
    assert flags["nvcc"][:4] == ["-O3", "--use_fast_math", "--threads", "4"]
    assert {"-Xcompiler=/Zc:preprocessor", "-DUSE_CUDA", "-DNOMINMAX"} <= set(flags["nvcc"])


def test_setup_py_as_it_came(tmp_path, monkeypatch):
    """Without patches the same listeners see what the topics are about."""
    root = upstream_tree.tree(tmp_path, "mamba", "2.4.0")
    assert run_setup(root, monkeypatch)["ext_modules"] == []
    given = run_setup(root, monkeypatch, MAMBA_KEEP_CUDA_BUILD="TRUE")
    assert "bdist_wheel" in given["cmdclass"]
    assert "-gencode" in given["ext_modules"][0].extra_compile_args["nvcc"]
    with pytest.raises(NameError, match="bare_metal_version"):
        run_setup(root, monkeypatch, cuda_home=None, MAMBA_KEEP_CUDA_BUILD="TRUE")


def test_setup_py_without_cuda_comes_to_torchs_message(tmp_path, patch, monkeypatch):
    root = upstream_tree.tree(tmp_path, "mamba", "2.3.0")
    assert patch(root)[0] == 0
    assert len(run_setup(root, monkeypatch, cuda_home=None)["ext_modules"]) == 1


def test_setup_py_may_still_leave_the_extension_out(tmp_path, patch, monkeypatch):
    root = upstream_tree.tree(tmp_path, "mamba", "2.4.0")
    assert patch(root)[0] == 0
    assert len(run_setup(root, monkeypatch)["ext_modules"]) == 1
    without = run_setup(root, monkeypatch, MAMBA_KEEP_CUDA_BUILD="FALSE")
    assert without["ext_modules"] == [] and without["cmdclass"] == {}


@pytest.mark.parametrize("version", ["1.0.0", "2.2.4", "2.3.2"])
def test_triton_is_no_requirement_on_windows(tmp_path, patch, monkeypatch, version):
    root = upstream_tree.tree(tmp_path, "mamba", version)
    requirements = pytest.importorskip("packaging.requirements")
    assert patch(root)[0] == 0
    wanted = run_setup(root, monkeypatch)["install_requires"]
    if (root / "pyproject.toml").is_file():
        project = patches.parse_toml((root / "pyproject.toml").read_text())["project"]
        wanted = wanted + project["dependencies"]
    wanted = [requirements.Requirement(text) for text in wanted]

    def names(platform):
        environment = {"sys_platform": platform}
        return {w.name for w in wanted if w.marker is None or w.marker.evaluate(environment)}

    assert names("win32") == {"torch"}
    assert "triton" in names("linux")


# The data


def test_the_topics_are_complete():
    topics, blobs = patches.load(PATCHES)
    named = {blob for topic in topics for edit in topic.edits for blob in edit.blobs}
    assert named <= blobs.keys()
    for topic in topics:
        for text in (topic.title, topic.reason, topic.affects, topic.until):
            assert text and text.isascii()


def test_list_needs_no_tree(patch):
    status, printed, _ = patch("--list")
    assert status == 0
    for path in PATCHES.glob("*.toml"):
        assert (f"{path.stem}: " in printed) == (path.name != "blobs.toml")


def test_what_the_readme_explains_is_what_a_topic_may_have():
    rows = re.findall(r"^\| (`.*?) \|", (PATCHES / "README.md").read_text("utf-8"), re.MULTILINE)
    explained = [key for row in rows for key in re.findall(r"`([a-z]+)`", row)]
    assert set(explained) == patches.EDIT_KEYS | set(patches.TOLD)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"anchor": "'a'"}, "either anchor and replace, or place, insert and applied"),
        ({**CONSTANTS, "place": "'top'", "insert": "'x'", "applied": "'x'"}, "either anchor"),
        ({**CONSTANTS, "typo": 1}, "does not know typo"),
        ({**CONSTANTS, "lint": "'absent'"}, "msvc_lint has no rule absent"),
        ({"place": "'middle'", "insert": "'x'", "applied": "'x'"}, "place is one of top"),
        ({"anchor": "'('", "replace": "'x'"}, "anchor: missing )"),
        ({"anchor": "unquoted", "replace": "'x'"}, "line 7"),
    ],
)
def test_a_wrong_topic_is_named(tmp_path, patch, own_patches, keys, complaint):
    root = upstream_tree.tree(tmp_path / "tree", "mamba", "2.3.0")
    refused(
        root, patch, "wrong.toml", complaint, options=own_patches([], name="wrong.toml", **keys)
    )


def test_a_topic_that_would_apply_twice_is_refused(tmp_path, patch, own_patches):
    root = upstream_tree.tree(tmp_path / "tree", "mamba", "2.3.0")
    refused(
        root,
        patch,
        "second run",
        options=own_patches([], anchor="'once'", replace="'once once'", count="'any'"),
    )


def test_toml_without_tomllib(monkeypatch):
    """Python 3.10 has pip's copy of it."""
    pytest.importorskip("pip._vendor.tomli")
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    assert patches.parse_toml("a = 1") == {"a": 1}
    monkeypatch.setitem(sys.modules, "pip._vendor", None)
    monkeypatch.setitem(sys.modules, "pip._vendor.tomli", None)
    with pytest.raises(patches.PatchError, match="pip install tomli"):
        patches.parse_toml("a = 1")
