"""The command line: the verbs, each imported with nothing heavy, and the front door for errors."""

import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import typer

from kvtune.cli.output import complain, envelope

ENDINGS = (
    "Exit codes: 0 ok, 1 unexpected, 2 usage, 3 gate failed, 4 damaged or another model's, "
    "5 unsupported, 6 out of memory or disk, 7 missing or offline, 130 interrupted (saved)."
)


def build() -> typer.Typer:
    """The application with all its verbs."""
    from kvtune.cli import (
        apply,
        bench,
        bench_basis,
        bench_codecs,
        bench_cskv,
        bench_endless,
        bench_latents,
        bench_lowrank,
        bench_pack,
        bench_prefill,
        bench_ragged,
        bench_search,
        bench_sharing,
        bench_tiers,
        bench_tokens,
        calibrate,
        doctor,
        fit,
        methods,
        pack,
        recipe,
        report,
        search,
        tune,
        unpack,
    )
    from kvtune.cli.verb import add

    app = typer.Typer(
        help=_welcome.__doc__,
        epilog=ENDINGS,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_welcome)
    add(app, tune.tune, "tune")
    add(app, calibrate.calibrate, "calibrate")
    add(app, search.search, "search")
    add(app, fit.fit, "fit")
    add(app, apply.apply, "apply")
    add(app, report.report, "report")
    add(app, pack.pack, "pack")
    add(app, unpack.unpack, "unpack")
    recipes = typer.Typer(help="Read, check, compare and import recipes; no model is loaded.")
    for name, work in recipe.VERBS.items():
        add(recipes, work, name, f"recipe.{name}")
    imports = typer.Typer(help="Make recipes of what other projects publish.")
    for name, work in recipe.IMPORTS.items():
        add(imports, work, name, "recipe.import")
    recipes.add_typer(imports, name="import", no_args_is_help=True)
    app.add_typer(recipes, name="recipe", no_args_is_help=True)
    add(app, methods.methods, "methods")
    benches = typer.Typer(help="Time kernels, decoding, trials and whole searches on this machine.")
    found = (
        bench,
        bench_search,
        bench_codecs,
        bench_lowrank,
        bench_cskv,
        bench_tiers,
        bench_latents,
        bench_ragged,
        bench_basis,
        bench_sharing,
        bench_pack,
        bench_prefill,
        bench_endless,
        bench_tokens,
    )
    for name, work in {name: work for own in found for name, work in own.VERBS.items()}.items():
        add(benches, work, name, f"bench.{name}")
    app.add_typer(benches, name="bench", no_args_is_help=True)
    add(app, doctor.doctor, "doctor")
    return app


@cache
def _command() -> Any:
    """The application as it is called; to make it takes longer than most of its verbs."""
    return typer.main.get_command(build())


def _version(wanted: bool) -> None:
    if wanted:
        from kvtune import __version__

        print(f"kvtune {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
]


def _welcome(version: Version = False) -> None:
    """Measured KV-cache compression for your model: calibrate, search and prove recipes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Decoding runs thousands of small operations: threads that spin at their ends cost a shared
    # machine far more (40 times, with one busy neighbour) than threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = _command()(args=words, prog_name="kvtune", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # nobody reads any more; the interpreter must not try to flush once again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _refused(error, words)
    return int(code or 0)


def _refused(error: Exception, words: Sequence[str]) -> int:
    """Says what is wrong with a command line before its verb began."""
    from kvtune.cli.faults import fault

    failed = fault(error)
    if "--json" in words:
        named = [word for word in words if not word.startswith("-")]
        verb = ".".join(named[: 2 if named[:1] in (["recipe"], ["bench"]) else 1]) or "kvtune"
        print(envelope(verb, {}, [], failed))
    else:
        complain(failed)
    return failed.exit_code
