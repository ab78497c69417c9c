"""`hybrid bench`: measurements, printed as JSON."""

import typer

from bench.decode import decode, prefill
from bench.dispatch import dispatch
from bench.kernels import kernels

app = typer.Typer(no_args_is_help=True, help="Measure; every figure comes with the machine's own limit.")
app.command()(kernels)
app.command()(decode)
app.command()(prefill)
app.command()(dispatch)
