"""The composition root: flags -> Config -> one role. The only place that reads the environment."""

import os
import sys

# Read when gRPC is imported. It would log every failed TLS handshake, beside our own error.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import typer

from csps import __version__
from csps.bench.cli import app as bench_app
from csps.cli.calibrate import calibrate as calibrate_command
from csps.cli.compare import compare as compare_command
from csps.cli.replay import replay as replay_command
from csps.cli.serve import serve as serve_command
from csps.cli.simulate import simulate as simulate_command
from csps.cli.submit import submit as submit_command
from csps.cli.terminal import print_error
from csps.cli.trace import app as trace_app
from csps.cli.worker import worker as worker_command
from csps.core.errors import CspsError

app = typer.Typer(
    name="csps",
    help="Serve language models whose prompts are long documents, split over many ranks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve_command)
app.command()(worker_command)
app.command()(submit_command)
app.command()(replay_command)
app.command()(simulate_command)
app.command()(calibrate_command)
app.command()(compare_command)
app.add_typer(trace_app, name="trace")
app.add_typer(bench_app, name="bench")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point: errors meant for the user are one line and status 1, not a traceback."""
    try:
        app()
    except CspsError as error:
        print_error(error)
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output has gone: say nothing more, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
