"""The command serve."""

import argparse
import importlib.util
import sys
from typing import Annotated

from maxmap.arguments import Number, add_checkpoint
from maxmap.errors import UserError, printable
from maxmap.ranges import Range
from maxmap.serve.limits import Limits
from maxmap.serve.network import Network

_PACKAGES = ("starlette", "uvicorn")


def add_serve(command: argparse.ArgumentParser) -> None:
    """Fills the parser of `serve`."""
    add_checkpoint(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all of this machine (default: 127.0.0.1)"
    )
    command.add_argument(
        "--port", type=Number(serve_command, "port"), default=8000, help="0 for any that is free (default: 8000)"
    )
    command.add_argument(
        "--batch-sizes",
        type=Number(Network.__init__, "batch_sizes"),
        nargs="+",
        default=[1, 4, 16],
        metavar="N",
        help="images that are computed together; each size is compiled at the start (default: 1 4 16)",
    )
    most = Limits()
    command.add_argument(
        "--max-bytes",
        type=Number(Limits, "bytes"),
        default=most.bytes,
        help=f"of an image file (default: {most.bytes:,})",
    )
    command.add_argument(
        "--max-pixels", type=Number(Limits, "pixels"), default=most.pixels, help=f"(default: {most.pixels:,})"
    )
    command.add_argument(
        "--max-requests",
        type=Number(Limits, "requests"),
        default=most.requests,
        help=f"answered at a time; more are refused (default: {most.requests})",
    )
    command.add_argument(
        "--explain",
        action=argparse.BooleanOptionalAction,
        default=True,
        dest="explained",
        help="show where the network looked (default: yes; compiles the network once more)",
    )
    command.set_defaults(run=serve_command)


def serve_command(
    checkpoint: str,
    host: str,
    port: Annotated[int, Range(at_least=0, at_most=65535)],
    batch_sizes: list[int],
    max_bytes: int,
    max_pixels: int,
    max_requests: int,
    explained: bool,
) -> None:
    """Answers requests until Ctrl-C or SIGTERM."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"serve takes the package {package}: pip install {' '.join(_PACKAGES)}.")
    from maxmap.serve.app import make_app
    from maxmap.serve.server import listen, run

    with listen(host, port) as listening:  # first, because compiling takes long
        network = Network(checkpoint, tuple(batch_sizes))
        print("maxmap: compiling; requests wait until then.", file=sys.stderr, flush=True)
        network.compile(explained=explained)
        app = make_app(network, Limits(max_bytes, max_pixels, max_requests), explained=explained)
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{printable(shown)}:{listening.getsockname()[1]}/", flush=True)
        run(app, listening)
