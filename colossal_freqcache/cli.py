"""The command line, `colossal-freqcache ...` or `python -m colossal_freqcache ...`. Knows how to ask and how to print.

What a command does is a function of another module; here stand its options, its table and its files. Results go to
standard output, progress and complaints to standard error. What the user got wrong is one line there: exit code 2 for
the command line itself, 1 for what it names.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .frequency import IdFrequency
from .simulate import BATCH_SIZE, POLICIES, SIZES, Replay, Trace, draw, simulate, write_csv
from .synthetic import PRESETS

__all__ = ["main"]

PROGRAM, DISTRIBUTION = "colossal-freqcache", "colossal_freqcache"
WIDTH = 120  # of a table that is not printed on a terminal


class _OneLineErrors(click.Group):
    """A group of commands whose errors are one line on standard error, and never a traceback."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """As click's."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        try:
            sys.exit(super().main(*args, standalone_mode=False, **options) or 0)
        except click.Abort:
            self._fail("interrupted", 130)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else PROGRAM
            self._fail(f"{error.format_message()} ({where} --help lists the options)", error.exit_code)
        except click.ClickException as error:
            self._fail(error.format_message(), error.exit_code)
        except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
            self._fail(str(error) or type(error).__name__, 1)

    @staticmethod
    def _fail(message: str, code: int) -> None:
        click.echo(f"error: {' '.join(message.split())}", err=True)
        sys.exit(code)


class _List(click.ParamType):
    """Values of one kind, separated by commas."""

    def __init__(self, kind: Callable[[str], Any], name: str) -> None:
        self.kind, self.name = kind, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """[value] of "value,value"."""
        if not isinstance(value, str):
            return list(value)
        try:
            return [self.kind(part.strip()) for part in value.split(",") if part.strip()]
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


def _policy(name: str) -> str:
    known = (*POLICIES, "lookahead-0")
    if name not in known:
        raise ValueError(f"unknown policy {name!r}, choose some of {', '.join(known)}")
    return name


def _ratio(text: str) -> float:
    ratio = float(text)
    if not 0 < ratio <= 1:
        raise ValueError(f"{text} is no share in (0, 1]")
    return ratio


def _slots(text: str) -> int:
    slots = int(text)
    if slots < 1:
        raise ValueError(f"{text} is no number of slots, at least 1")
    return slots


@click.group(cls=_OneLineErrors, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=DISTRIBUTION, prog_name=PROGRAM)
@click.pass_context
def main(context: click.Context) -> None:
    """A cache for embedding tables that are larger than the memory of the device: what to know before training."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command("simulate")
@click.argument("files", metavar="[TRACE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--column", "columns", multiple=True, help="Array or column to read; several: one table each.")
@click.option("--batch-size", type=click.IntRange(1), default=BATCH_SIZE, show_default=True, help="Samples of a batch.")
@click.option("--policies", type=_List(_policy, "NAMES"), default=",".join(POLICIES), show_default=True)
@click.option(
    "--ratios",
    type=_List(_ratio, "SHARES"),
    help=f"Cache sizes, as shares of the distinct rows.  [default: {','.join(map(str, SIZES))}]",
)
@click.option("--slots", type=_List(_slots, "NUMBERS"), help="Cache sizes, in rows; instead of --ratios.")
@click.option("--window", type=click.IntRange(1), default=64, show_default=True, help="lookahead: batches known ahead.")
@click.option(
    "--depth", type=click.IntRange(0), default=1, show_default=True, help="lookahead: batches admitted ahead."
)
@click.option("--warm", is_flag=True, help="Start with the most frequent rows resident.")
@click.option(
    "--counts",
    multiple=True,
    default=("none",),
    metavar="none|trace|FILE",
    help="What is known beforehand: nothing, the trace's own counts, or those of a file (one for each table).",
)
@click.option("--synthetic", "preset", metavar="PRESET", help=f"Instead of files: {', '.join(PRESETS)}.")
@click.option("--ids", "num_ids", type=click.IntRange(1), default=1_000_000, show_default=True, help="synthetic: ids.")
@click.option("--table", "tables", multiple=True, type=int, help="synthetic: only these tables of the preset, from 0.")
@click.option("--rows", "max_rows", type=click.IntRange(1), help="synthetic: larger tables get this many rows.")
@click.option("--drift", type=float, default=0.0, help="synthetic: share of ranks that change their id in 10^6 draws.")
@click.option("--burst", type=float, default=0.0, help="synthetic: chance that a draw repeats a recent id.")
@click.option("--seed", type=int, default=0, help="synthetic: another stream.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for simulate.csv, simulate.png.")
def _simulate(
    files: Sequence[Path],
    columns: Sequence[str],
    batch_size: int,
    policies: list[str],
    ratios: list[float] | None,
    slots: list[int] | None,
    window: int,
    depth: int,
    warm: bool,
    counts: Sequence[str],
    preset: str | None,
    out: Path | None,
    **drawn: Any,
) -> None:
    """Replay a trace of ids through the eviction policies and print what they miss, by cache size.

    TRACE: files with ids in the order of training, .npy, .npz, .parquet or .csv. An array (N, T) is T tables.
    """
    if bool(files) == (preset is not None):
        raise click.UsageError("give the files of a trace, or --synthetic PRESET" + ", not both" * bool(files))
    _refuse_ignored(
        ["columns"] if preset is not None else list(drawn), "files" if preset is not None else "--synthetic"
    )
    if ratios is not None and slots is not None:
        raise click.UsageError("--ratios and --slots both give the sizes: give one of them")
    if depth > window:
        raise click.UsageError(f"--depth {depth} is more than --window {window}, the batches whose ids are known")
    known = _known_counts(counts)
    if preset is not None:
        trace = Trace.synthetic(preset, batch_size=batch_size, **drawn)
    else:
        numbers_are_columns = all(path.suffix == ".csv" for path in files)
        names = [int(name) if numbers_are_columns and name.isdigit() else name for name in columns]
        trace = Trace.from_files(files, names, batch_size)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    sizes = slots or ratios or SIZES
    replays = simulate(trace, policies, sizes, window, depth, warm, known, progress=None)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(_table(trace, replays), _summary(trace), sep="\n", highlight=False, markup=False)
    if out is not None:
        write_csv(replays, out / "simulate.csv")
        draw(replays, out / "simulate.png", title=f"{trace.name}: {trace.num_ids:,} ids, batches of {batch_size:,}")
        click.echo(f"written: {out / 'simulate.csv'}, {out / 'simulate.png'}")


def _refuse_ignored(names: Sequence[str], wanted: str) -> None:
    """Raises UsageError for the first of these parameters that was given: it means nothing without `wanted`."""
    context = click.get_current_context()
    for parameter in context.command.params:
        is_given = context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        if parameter.name in names and is_given:
            raise click.UsageError(f"{parameter.opts[0]} is for {wanted} only")


def _known_counts(counts: Sequence[str]) -> Any:
    if len(counts) == 1 and counts[0] in ("none", "trace"):
        return None if counts[0] == "none" else "trace"
    return [IdFrequency.load(path) for path in counts]


def _summary(trace: Trace) -> str:
    return (
        f"{trace.num_ids:,} ids in {trace.num_batches:,} batches; {trace.num_rows:,} distinct rows; "
        f"{trace.num_uses:,} rows of batches, at most {trace.slots_needed():,} in one.\n"
        f"ids missed: of all ids. rows missed: of the distinct rows of each batch; this is what is fetched."
    )


def _table(trace: Trace, replays: Sequence[Replay]) -> Table:
    """A line for each Replay; the last column is its misses of rows over those of the optimum, if that was run."""
    table = Table(title=Text(trace.name))
    for name in ("slots", "of rows", "policy", "ids missed", "rows missed", "", "first uses", "evictions", "/ belady"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    optimum = {replay.num_slots: replay.misses_unique for replay in replays if replay.policy == "belady"}
    last = None
    for replay in replays:
        is_new_size, last = replay.num_slots != last, replay.num_slots
        if is_new_size:
            table.add_section()
        size = [f"{replay.num_slots:,}", f"{replay.share:.2%}"] if is_new_size else ["", ""]
        table.add_row(*size, replay.policy, *_cells(replay, optimum.get(replay.num_slots)))
    return table


def _cells(replay: Replay, optimum: int | None) -> list[str]:
    if replay.note:
        return ["does not fit", f"needs {replay.slots_needed:,}"]
    return [
        f"{replay.miss_ratio:.2%}",
        f"{replay.misses_unique:,}",
        f"{replay.miss_ratio_unique:.2%}",
        f"{replay.misses_first_touch:,}",
        f"{replay.evictions:,}",
        f"{replay.misses_unique / optimum:.3f}" if optimum else "",
    ]
