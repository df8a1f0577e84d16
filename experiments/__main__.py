"""The paper's tables and figures, and simulations: what they need, running it, and reporting on it.

python -m experiments plan table4 --only dataset=movielens100k
python -m experiments run table4 --devices cuda:0,cuda:1 --budget 2h
python -m experiments report
python -m experiments serve table4 --short
"""

import argparse
import gc
import shlex
import sys
from pathlib import Path

import pandas as pd

from experiments.execution.executor import JobResult
from experiments.execution.options import add_options, make_executor, port, positive, seconds, seed_count
from experiments.execution.overview import Row, plan_rows, status_rows
from experiments.execution.runner import MAX_VECTORIZED, run
from experiments.planning.estimate import RuntimeEstimate, duration
from experiments.planning.study import SELECTIONS, SETTABLE, Study
from experiments.record import Record
from experiments.records import Store
from experiments.reporting import report
from experiments.reporting.page import Page
from experiments.reporting.simulations import FOLDER, simulation_page
from experiments.selection import EXPERIMENTS, SIMULATIONS, check_name, chosen_simulations, chosen_studies
from experiments.serve import LOOPBACK, ResultsServer
from lawn.composition import compose_many
from lawn.errors import ConfigError, UserError
from lawn.files import is_writable
from lawn.output import echo, echo_error, open_closed_streams
from lawn.task import dataset_reader
from lawn.train import Stopped
from lawn.train.signals import raise_on_signal

OF_RESULTS = ("runs", "tuning", FOLDER, "index.html")


def main(arguments: list[str] | None = None) -> int:
    open_closed_streams()
    given = _parser().parse_args(arguments)
    try:
        with raise_on_signal():  # the pool stops its runs, each with a checkpoint
            return int(given.action(given))
    except (UserError, OSError) as error:
        return echo_error(error)
    except KeyboardInterrupt:
        echo("stopped; run the same command again to resume", sys.stderr)
        return Stopped.exit_code


def plan(given: argparse.Namespace) -> int:
    """Print the cells, the state of their runs and the estimated time."""
    store = Store(given.results)
    rows, total, each = plan_rows(chosen_studies(given), store, RuntimeEstimate(store, given.hardware))
    for simulation in chosen_simulations(given):
        left = simulation.seconds_left(given.results, given.short)
        each += [left] if left else []
        total += 1
        row = {"cell": simulation.name, "epochs": "", "tuning": "", "seeds": f"{int(not left)}/1"}
        rows.append({**row, "time": duration(left)})
    echo(pd.DataFrame(rows).to_string(index=False))
    known = [value for value in each if value is not None]
    unknown = len(each) - len(known)
    time = (
        "an unknown time" if unknown and not known else f"{'at least' if unknown else 'about'} {duration(sum(known))}"
    )
    echo(
        f"\n{len(rows)} cells, {total} runs, {total - len(each)} done; the remaining runs take {time} "
        "if run sequentially (estimated from recorded runs"
        + (f" on {given.hardware})" if given.hardware else ")")
        + (f"; {unknown} runs have no similar record" if unknown else "")
    )
    if known and max(given.num_devices, given.devices_per_node) > 1:
        hours = sum(known) / 3600
        echo(
            f"{hours:.1f} device hours: at least {duration(sum(known) / given.num_devices)} on {given.num_devices} "
            f"devices; {hours / given.devices_per_node:.1f} node hours of {given.devices_per_node} devices a node"
        )
    return 0


def status(given: argparse.Namespace) -> int:
    """Print the runs of each cell that are done, running and failed; of a simulation, which is not known to run."""
    store = Store(given.results)
    rows = status_rows(chosen_studies(given), store, RuntimeEstimate(store))
    for simulation in chosen_simulations(given):
        left = simulation.seconds_left(given.results, given.short)
        rows.append({"cell": simulation.name, "done": f"{int(not left)}/1", "time left": duration(left)})
    echo(pd.DataFrame(rows).fillna("").to_string(index=False))
    return 0


def execute(given: argparse.Namespace) -> int:
    """Run the missing runs, then write the pages."""
    store = Store(given.results)
    for folder in (given.results, store.runs, store.tuning):
        if not is_writable(folder):
            raise ConfigError(f"--results {folder}: cannot be written")
    chosen, simulations = chosen_studies(given), chosen_simulations(given)
    executor = make_executor(given, Path(compose_many(*given.set).checked.runs_dir))
    unreadable = _unreadable_datasets(chosen, store)
    to_run = [study for study in chosen if study.cell.value("dataset") not in unreadable]
    unsuccessful = run(to_run, store, executor, given.budget, given.vectorize) if to_run else []
    try:
        for simulation in simulations:
            if left := simulation.seconds_left(given.results, given.short):
                echo(f"{simulation.name}: takes about {duration(left)} on one core")
                simulation.execute(given.results, given.short, given.set)
        _write_pages(given)
    finally:
        failed = _report_failures(chosen, unsuccessful, store)
        for name, reason in unreadable.items():
            echo(f"failed: all runs of dataset={name}: {reason}", sys.stderr)
    return UserError.exit_code if failed or unreadable else 0


def _unreadable_datasets(studies: list[Study], store: Store) -> dict[str, str]:
    """The datasets that missing runs need and that cannot be read or downloaded, with the reason."""
    first_jobs = (next(iter(study.outstanding(store)), None) for study in studies if not study.problem)
    configs = {job.config.dataset.name: job.config for job in first_jobs if job is not None}
    reasons = {}
    for name, config in configs.items():
        try:
            dataset_reader(config)()
        except (UserError, OSError) as error:
            reasons[name] = str(error)
    return reasons


def _report_failures(studies: list[Study], unsuccessful: list[JobResult], store: Store) -> bool:
    """Print the runs that could not start, failed or diverged, with the reason; returns whether any failed."""
    failed = {shlex.join(study.cell.overrides): study.problem for study in studies if study.problem}
    for ended in unsuccessful:
        name = f"{ended.job.name} ({shlex.join(ended.job.overrides)})"
        if ended.diverged:
            echo(f"diverged: {name}{_where(store.read(ended.job.name))}", sys.stderr)
        else:
            failed[name] = str(ended.failure)
    for name, reason in failed.items():
        echo(f"failed: {name}: {reason}", sys.stderr)
    return bool(failed)


def _where(record: Record | None) -> str:
    """The update and layer at which a run diverged; empty for older records."""
    divergence = record and record.result.get("divergence")
    if not divergence:
        return ""
    largest = divergence["largest_gradient"]
    return f": at update {divergence['step']}" + (f", largest gradient in {largest['layer']}" if largest else "")


def write(given: argparse.Namespace) -> int:
    """Write the pages of the experiments named, or of all with the index, into a folder of results."""
    for name in given.names:
        check_name(name)
    if not given.results.is_dir():
        raise ConfigError(f"--results {given.results}: no such folder")
    files = {path.name for path in given.results.iterdir()}
    if files and files.isdisjoint([*OF_RESULTS, *(f"{name}.md" for name in (*EXPERIMENTS, *SIMULATIONS))]):
        raise ConfigError(f"--results {given.results}: holds other files, and none of {', '.join(OF_RESULTS)}")
    if any(path.is_dir() for path in (given.results / "runs").glob("*")):
        raise ConfigError(f"--results {given.results}: its runs has run directories, not files of records")
    _write_pages(given)
    return 0


def _write_pages(given: argparse.Namespace) -> None:
    """The project's own pages are renewed together, with the blocks of README.md, results/README.md and docs/."""
    own = given.results.resolve() == report.RESULTS and given.selection == "val"
    names = [*EXPERIMENTS, *SIMULATIONS] if own or not given.names else given.names
    pages = _pages(names, Store(given.results), given)
    for name, page in zip(names, pages, strict=True):
        report.write(page, given.results)
        if name in given.names:
            echo(f"{report.terminal(page)}\n\n{given.results / page.name}.md")
    if own or (not given.names and given.selection == "val"):
        report.write_index(pages, given.results)
        echo(str(given.results / "index.html"))
    if own:
        report.update_blocks(pages)


def _pages(names: list[str], store: Store, given: argparse.Namespace) -> list[Page]:
    with store.held():  # numbers that stand on several pages are the same
        return [
            simulation_page(SIMULATIONS[name], given.results)
            if name in SIMULATIONS
            else report.page_of(EXPERIMENTS[name], store, given.selection)
            for name in names
        ]


def serve(given: argparse.Namespace) -> int:
    """Serve the results page until it is interrupted."""
    if (given.only or given.set or given.short or given.seeds) and not given.names:
        raise ConfigError(
            "--only, --set, --short and --seeds choose runs whose state is shown: name their experiments, too"
        )
    chosen_simulations(given)  # refuses options that they do not have
    chosen = chosen_studies(given) if given.names else []
    shown, asked = Store(given.results), Store(given.results)  # of two threads

    def page(version: str) -> str:
        return report.index(_pages([*EXPERIMENTS, *SIMULATIONS], shown, given), given.results, version)

    def status() -> list[Row]:
        return status_rows(chosen, asked, RuntimeEstimate(asked))

    with ResultsServer(given.results, page, status).listen(given.port) as server:
        echo(f"http://{LOOPBACK}:{server.server_port}/ on this machine alone; Ctrl-C ends it")
        try:
            server.serve_forever()
        except (KeyboardInterrupt, Stopped):
            echo("ended", sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(required=True, metavar="plan|run|status|report|serve")
    known = ", ".join([*EXPERIMENTS, *SIMULATIONS])
    for name, action, names, text in (
        ("plan", plan, "+", "what would run, what is done, how long it takes"),
        ("run", execute, "+", "run what is missing, then report"),
        ("status", status, "+", "what is done, running and failed, and how long the rest takes"),
        ("report", write, "*", "write pages from the records; without names all of them, and the index"),
        ("serve", serve, "*", "show the results page in a browser on this machine, with the state of the named runs"),
    ):
        sub = actions.add_parser(name, help=text, description=text)
        sub.set_defaults(action=action, parser=sub)
        sub.add_argument("names", nargs=names, metavar="NAME", help=known)
        sub.add_argument("--results", type=Path, default=report.RESULTS, help="where pages and runs/ are")
        sub.add_argument("--selection", choices=SELECTIONS, default="val", help="split to choose hyperparameters on")
        if action is write:
            continue
        sub.add_argument(
            "--only", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="cells with these overrides"
        )
        sub.add_argument(
            "--short", action="store_true", help="the short budget of epochs, not the paper's; simulations: seconds"
        )
        sub.add_argument("--seeds", type=seed_count, metavar="N", help="runs that fill a cell (default: the table's)")
        sub.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help=f"for run.py: {', '.join(SETTABLE)}",
        )
        if action is plan:
            sub.add_argument("--hardware", default="", metavar="NAME", help="estimate from records on this GPU or CPU")
            sub.add_argument("--num-devices", type=positive, default=1, metavar="N", help="devices to run on")
            sub.add_argument("--devices-per-node", type=positive, default=1, metavar="N", help="for the node hours")
        if action is serve:
            sub.add_argument("--port", type=port, default=8000, metavar="N", help="default: 8000; 0: any that is free")
        if action is not execute:
            continue
        add_options(sub)
        sub.add_argument(
            "--vectorize",
            type=positive,
            default=MAX_VECTORIZED,
            metavar="N",
            help=f"runs of a small model to train as one batched model, at most (default: {MAX_VECTORIZED})",
        )
        sub.add_argument("--budget", type=seconds, metavar="TIME", help="stop after this time, e.g. 2h, 90m, 1h30m")
    return parser


if __name__ == "__main__":
    # Modules and records live to the end: searching them for reference cycles would be a quarter of a report's time.
    gc.freeze()
    gc.set_threshold(50_000)
    code = main()
    gc.freeze()
    sys.exit(code)
