"""From an empty machine to a trained model: prepares .venv, builds and installs the wheels, trains.

python scripts/demo.py                  # on the CPU
python scripts/demo.py --device cuda    # what is unknown here goes to `python -m mamba_ssm demo`
"""

import argparse
import subprocess
import sys

import _bootstrap as bootstrap


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch", default=bootstrap.TORCH, help="version or specifier (default: %(default)s)"
    )
    parser.add_argument(
        "--preset", help="CMake preset (default: with CUDA if there is nvcc and a GPU)"
    )
    options, demo_arguments = parser.parse_known_args()

    with bootstrap.leg("torch and build tools"):
        python = bootstrap.environment_python()
        cuda = bootstrap.cuda_major()
        preset = options.preset or bootstrap.default_preset(cuda)
        bootstrap.install_torch(python, options.torch, cuda)
        bootstrap.install_build_tools(python)
        env = bootstrap.build_environment(python, preset)
    with bootstrap.leg("build the wheels"):
        bootstrap.configure(python, env, preset, "-DMAMBA_TESTS=OFF", "-DMAMBA_BENCH=OFF")
        bootstrap.build(env, preset, "--target", "wheel")
    with bootstrap.leg("install the wheels"):
        wheels = [bootstrap.newest(f"dist/{name}-*.whl") for name in ("mamba_ssm", "causal_conv1d")]
        bootstrap.pip_install(python, "--force-reinstall", "--no-deps", *wheels)
        bootstrap.pip_install(python, "tqdm", "matplotlib")
    command = [str(python), "-m", "mamba_ssm", "demo", *demo_arguments]
    print("\n$ " + subprocess.list2cmdline(command), flush=True)
    try:
        return subprocess.run(command).returncode
    except KeyboardInterrupt:  # the demo got it too, and has said how to go on
        return 130


if __name__ == "__main__":
    sys.exit(main())
