"""Reports every CUDA kernel of a build: registers, stack, shared memory, machine code, compile time.

python scripts/kernel_report.py --preset linux-release-sm_90            # what is built already
python scripts/kernel_report.py --preset linux-release-sm_90 --check    # against csrc/kernels.csv
python scripts/kernel_report.py --preset linux-release-sm_90 --update   # accepts the changes
python scripts/kernel_report.py --arch 75 80 86 89 90 100 120           # builds each architecture
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import _bootstrap as bootstrap
import _cubin as cubin
import _pypi as pypi

TABLE = bootstrap.ROOT / "csrc" / "kernels.csv"
CUOBJDUMP_WHEEL = "nvidia-cuda-cuobjdump==13.5.37"  # reads what older toolkits compiled, too
OBJECTS = "csrc/CMakeFiles/mamba_native_cuda.dir"

# What one architecture may cost.
MOST_KERNELS = 149
MOST_KERNELS_PER_SOURCE = 20  # one .cu file is one operation, direction and dtype
MOST_SECONDS = 90  # of one core; reported only, because machines differ
# What may grow unnoticed: instructions move with every edit.
SASS_GROWTH = 1.10
SASS_NOISE = 512

WARPS_PER_MULTIPROCESSOR = {75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}


class Kernel(NamedTuple):
    """One kernel's row: sizes in bytes. Spills and indexed local arrays both live on the stack."""

    sm: int
    cuda: str
    source: str
    kernel: str
    threads: int  # of __launch_bounds__, 0 without
    registers: int
    stack: int
    shared: int  # static, with the 1 KiB that CUDA may reserve from sm_90 on
    sass: int

    def key(self):
        return self.sm, self.source, self.kernel

    def __str__(self):
        return f"sm_{self.sm} {self.source} {self.kernel}"


class Build(NamedTuple):
    folder: Path
    kernels: list
    cuda: str
    seconds: float  # wall-clock of the last compilation of each .cu, summed
    cached: bool  # ccache may have answered instead of nvcc
    library: int  # bytes of the op library, 0 where it is not built


def parse_resource_usage(text):
    """cuobjdump --dump-resource-usage -> {mangled name: (registers, stack, static shared memory)}."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: (int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in re.findall(pattern, text)
    }


def parse_ninja_log(text):
    """Seconds that the last compilation of each .cu took, summed."""
    spent = {}
    for line in text.splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        if re.search(r"\.cu\.o(bj)?$", output):
            spent[output] = (int(end) - int(start)) / 1000
    return sum(spent.values())


def warps(kernel):
    """Warps that one multiprocessor holds, as far as registers decide."""
    most = WARPS_PER_MULTIPROCESSOR.get(kernel.sm, 64)
    registers_per_warp = -(-kernel.registers * 32 // 256) * 256
    held = min(65536 // max(registers_per_warp, 256) // 4 * 4, most)
    per_block = -(-kernel.threads // 32) or 1
    return held // per_block * per_block


def over_the_ceilings(kernels):
    """Sentences about kernels that there should not be."""
    found = []
    for sm in sorted({kernel.sm for kernel in kernels}):
        rows = [kernel for kernel in kernels if kernel.sm == sm]
        if len(rows) > MOST_KERNELS:
            found.append(f"sm_{sm} has {len(rows)} kernels, {MOST_KERNELS} at most")
        for source in sorted({kernel.source for kernel in rows}):
            count = sum(kernel.source == source for kernel in rows)
            if count > MOST_KERNELS_PER_SOURCE:
                found.append(
                    f"sm_{sm} {source} has {count} kernels, {MOST_KERNELS_PER_SOURCE} at most"
                )
        found += [
            f"{kernel} has {kernel.stack} bytes on the stack: it spills, or indexes a local array"
            for kernel in rows
            if kernel.stack
        ]
    return found


def changes(before, after):
    """Sentences about what got worse between two lists of kernels."""
    old = {kernel.key(): kernel for kernel in before}
    new = {kernel.key(): kernel for kernel in after}
    found = [f"{new[key]} is new" for key in new.keys() - old.keys()]
    found += [f"{old[key]} is gone" for key in old.keys() - new.keys()]
    for key in new.keys() & old.keys():
        was, now = old[key], new[key]
        if now.stack > was.stack:
            found.append(f"{now}: stack from {was.stack} to {now.stack} bytes")
        if now.cuda != was.cuda:
            continue  # another compiler's registers and instructions say nothing about our change
        if warps(now) < warps(was):
            found.append(
                f"{now}: registers from {was.registers} to {now.registers}, "
                f"warps per multiprocessor from {warps(was)} to {warps(now)}"
            )
        if now.sass > was.sass * SASS_GROWTH and now.sass > was.sass + SASS_NOISE:
            found.append(f"{now}: machine code from {was.sass} to {now.sass} bytes")
    return sorted(found)


def read_table(path=TABLE):
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if next(reader) != list(Kernel._fields):
            sys.exit(
                f"{path} has other columns than {', '.join(Kernel._fields)}: delete it, --update"
            )
        kinds = Kernel.__annotations__.values()
        return [
            Kernel(*(kind(cell) for kind, cell in zip(kinds, row, strict=True))) for row in reader
        ]


def write_table(kernels, path=TABLE):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Kernel._fields)
        writer.writerows(sorted(kernels, key=Kernel.key))


def cuobjdump(nvcc):
    """The toolkit's own, else PyPI's."""
    beside = shutil.which("cuobjdump", path=str(Path(nvcc).resolve().parent))
    found = beside or shutil.which("cuobjdump")
    if found:
        return found
    folder = bootstrap.ROOT / "build" / "tools" / "cuobjdump"
    pypi.unpack(folder, CUOBJDUMP_WHEEL)
    (found,) = (path for path in folder.glob("nvidia/*/bin/**/cuobjdump*") if path.is_file())
    found.chmod(0o755)
    return found


def read_object(tool, path, source, cuda):
    """The kernels of one object file, of every architecture in it."""
    with tempfile.TemporaryDirectory() as folder:
        extract = [tool, "--extract-elf", "all", path.resolve()]
        subprocess.run(extract, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for file in sorted(Path(folder).glob("*.cubin")):
            sm = int(re.search(r"\.sm_(\d+)", file.name)[1])
            usage = [tool, "--dump-resource-usage", file]
            text = subprocess.run(usage, check=True, capture_output=True, text=True).stdout
            resources = parse_resource_usage(text)
            for name, (sass, threads) in cubin.kernels(file.read_bytes()).items():
                registers, stack, shared = resources[name]
                numbers = (threads, registers, stack, shared, sass)
                yield Kernel(sm, cuda, source, cubin.compact(name), *numbers)


def read_build(folder):
    """What a build folder holds; it has been built already."""
    objects = sorted((folder / OBJECTS).rglob("*.cu.o*"))
    if not objects:
        sys.exit(
            f"No CUDA objects below {folder / OBJECTS}: build it first, with a preset that has "
            f"CUDA and the Ninja generator."
        )
    (language,) = folder.glob("CMakeFiles/*/CMakeCUDACompiler.cmake")
    text = language.read_text(encoding="utf-8")
    nvcc = re.search(r'CMAKE_CUDA_COMPILER "(.*)"', text)[1]
    cuda = re.search(r'CMAKE_CUDA_COMPILER_VERSION "(\d+\.\d+)', text)[1]
    cache = (folder / "CMakeCache.txt").read_text(encoding="utf-8")
    tool = cuobjdump(nvcc)
    kernels = []
    for path in objects:
        source = path.relative_to(folder / OBJECTS).as_posix().rpartition(".")[0]
        kernels += read_object(tool, path, source, cuda)
    libraries = folder.glob("csrc/torch/mamba_native_cu*.*")
    return Build(
        folder=folder,
        kernels=sorted(kernels, key=Kernel.key),
        cuda=cuda,
        seconds=parse_ninja_log((folder / ".ninja_log").read_text(encoding="utf-8")),
        cached=bool(re.search(r"^CMAKE_CUDA_COMPILER_LAUNCHER:\w+=.*ccache", cache, re.MULTILINE)),
        library=max(
            (path.stat().st_size for path in libraries if path.suffix != ".lib"), default=0
        ),
    )


def compile_architecture(python, env, architecture):
    """A fresh compilation into build/kernels, past any ccache, so that its seconds are true."""
    folder = bootstrap.ROOT / "build" / "kernels" / f"sm_{architecture}"
    preset = f"{'x64' if bootstrap.WINDOWS else 'linux'}-release-sm_{architecture}"
    options = ["-DMAMBA_CUDA=ON", "-DMAMBA_TESTS=OFF", "-DMAMBA_BENCH=OFF"]
    env = {key: value for key, value in env.items() if key != "CMAKE_CUDA_COMPILER_LAUNCHER"}
    shutil.rmtree(folder, ignore_errors=True)
    bootstrap.configure(python, env, preset, "-B", folder, *options)
    build = [bootstrap.tool("cmake", env), "--build", folder, "--target"]
    bootstrap.run([*build, "mamba_native_cuda", "-j1"], env=env)
    bootstrap.run([*build, "mamba_native_ops"], env=env)
    return folder


def describe(build, every_kernel):
    """The report as text."""
    lines = []
    architectures = sorted({kernel.sm for kernel in build.kernels})
    for sm in architectures:
        rows = [kernel for kernel in build.kernels if kernel.sm == sm]
        registers = [kernel.registers for kernel in rows]
        lines.append(
            f"sm_{sm}: {len(rows)} kernels, {min(registers)} to {max(registers)} registers, "
            f"{sum(kernel.stack > 0 for kernel in rows)} with a stack, "
            f"static shared memory up to {max(kernel.shared for kernel in rows)} bytes, "
            f"machine code {sum(kernel.sass for kernel in rows) / 1e6:.2f} MB"
        )
        if every_kernel:
            width = max(len(kernel.source) for kernel in rows)
            names = max(len(kernel.kernel) for kernel in rows)
            form = f"  {{:{width}}}  {{:{names}}}  {{:>7}}  {{:>9}}  {{:>5}}  {{:>6}}  {{:>6}}"
            lines.append(form.format(*Kernel._fields[2:]))
            lines += [form.format(*kernel[2:]) for kernel in rows]
    seconds = f"{build.seconds:.0f} s in nvcc"
    if build.cached:
        seconds += " (through ccache: no measure of the compiler)"
    elif build.seconds > MOST_SECONDS * len(architectures):
        seconds += f" (more than {MOST_SECONDS} s for each architecture)"
    library = f"op library {build.library / 1e6:.2f} MB" if build.library else "no op library"
    lines.append(f"{build.folder}: CUDA {build.cuda}, {seconds}, {library}")
    return "\n".join(lines)


def check(kernels, table):
    """Prints what is wrong; whether nothing is. Architectures that are not built are not compared."""
    built = {kernel.sm for kernel in kernels}
    table = [kernel for kernel in table if kernel.sm in built]
    if not table:
        sys.exit(f"{TABLE} has no rows of what is built here: add them with --update.")
    compared = {kernel.sm for kernel in table}
    changed = changes(table, [kernel for kernel in kernels if kernel.sm in compared])
    wrong = over_the_ceilings(kernels)
    for sentence in wrong + changed:
        print(f"kernel_report: {sentence}")
    if changed:
        print(
            f"{len(changed)} changes against {TABLE.relative_to(bootstrap.ROOT)}. If they are "
            f"meant, accept them by running this command with --update in place of --check."
        )
    if {kernel.cuda for kernel in table} != {kernel.cuda for kernel in kernels}:
        print("the table is another toolkit's: registers and machine code were not compared")
    return not wrong and not changed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", help="read build/PRESET")
    what.add_argument("--build", type=Path, metavar="FOLDER", help="read this build folder")
    what.add_argument(
        "--arch", type=int, nargs="+", metavar="NUMBER", help="compile these, alone and afresh"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="fail on changes against the table")
    how.add_argument("--update", action="store_true", help="write the table's rows")
    parser.add_argument("--summary", action="store_true", help="leave out the single kernels")
    parser.add_argument("--json", metavar="FILE", help="write everything there, machine-readable")
    options = parser.parse_args()

    if options.arch:
        python = bootstrap.environment_python()
        bootstrap.install_torch(python, bootstrap.TORCH, None)
        bootstrap.install_build_tools(python)
        env = bootstrap.build_environment(python)
        folders = [compile_architecture(python, env, number) for number in options.arch]
    else:
        folders = [options.build or bootstrap.ROOT / "build" / options.preset]
    builds = [read_build(folder) for folder in folders]
    kernels = [kernel for build in builds for kernel in build.kernels]

    if options.json:
        rows = [
            build._asdict()
            | {"folder": str(build.folder), "kernels": [k._asdict() for k in build.kernels]}
            for build in builds
        ]
        Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for build in builds:
        print(describe(build, every_kernel=not (options.summary or options.check)))
    if options.check:
        return 0 if check(kernels, read_table()) else 1
    if options.update:
        built = {kernel.sm for kernel in kernels}
        write_table([kernel for kernel in read_table() if kernel.sm not in built] + kernels)
        print(f"wrote {len(kernels)} rows to {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
