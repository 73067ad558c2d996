"""The command line: one module a command. Nothing here imports torch before a command runs."""

import argparse

from mamba_ssm._version import __version__
from mamba_ssm.cli import bench, demo, doctor, verify
from mamba_ssm.cli.errors import UsageError
from mamba_ssm.native.loader import NativeError

COMMANDS = {"demo": demo, "verify": verify, "bench": bench, "doctor": doctor}

DESCRIPTION = """\
Mamba's selective state spaces as native kernels for CPU and CUDA, without Triton.

start here:
  python -m mamba_ssm demo                  train a small language model on this CPU (3 minutes)
  python -m mamba_ssm demo --device cuda    the same on the GPU
  python -m mamba_ssm demo --arch mamba2    the same with Mamba-2 layers
  python -m mamba_ssm verify                do the layers compute what they should, here?
  python -m mamba_ssm bench --device cuda   how fast the kernels are, and how fast they could be
  python -m mamba_ssm bench --lengths       the layer against its length, with a picture
  python -m mamba_ssm doctor                something does not work? what is wrong here, and the cure
  python -m mamba_ssm COMMAND --help        what a command does and what it can be told
"""

EPILOG = """\
in your own code:
  from mamba_ssm import Mamba
  layer = Mamba(d_model=256)                # an nn.Module: (batch, length, 256) in and out
"""


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m mamba_ssm",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mamba_ssm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, details = module.__doc__.partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary.rstrip("."),
            description=f"{summary}\n\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def main(arguments=None):
    """Runs a command and returns its exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return COMMANDS[options.command].run(options)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        parser.exit(1, 'torch is not installed; install it with: pip install "torch>=2.10"\n')
    except NativeError as error:
        parser.exit(1, f"{error}\n")
    except UsageError as error:
        parser.exit(2, f"{error}\n")
