"""What stands at the top of the page: how much of the paper has been run, and what the records say, with intervals."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan

import numpy as np

from experiments.definitions.tuning_curves import FULL, SHORT
from experiments.reporting.cell_results import FAR, Pair, places
from experiments.reporting.curves import K
from experiments.reporting.layout import Table, format_interval, format_signed
from experiments.reporting.page import Page
from experiments.reporting.sentences import LEVEL
from experiments.reporting.statistics import MANY_SEEDS, mean_interval
from experiments.reporting.trials import best_by_place, best_of_curves

FEW = 6  # comparisons that are listed by themselves
DECIDED = "better", "worse"  # verdicts
BELOW_PAPER, FAR_SEEDS = "†", "‡"  # marks of comparisons
ENTRIES = (
    "Intervals are at 95 %; gains without a verdict are not decided. Brackets hold the paper's gain and, where our "
    "interval contains it and 0, the seeds of each row that would decide it (80 % power, uncorrected)."
)


@dataclass(frozen=True)
class Finding:
    title: str
    text: str  # may be empty
    comparisons: Sequence[str]  # sentences
    pages: Sequence[str]  # names of the pages that it is from
    tables: Sequence[Table] = ()  # of comparisons, if there are many


def coverage(pages: Sequence[Page]) -> str:
    """How many of the cells of the paper's tables have numbers of ours, in a sentence."""
    tables = [page for page in pages if page.name.startswith("table")]
    printed = [result for page in tables for result in page.cell_results if result.cell.paper is not None]
    filled = [result for result in printed if result.records]
    full = sum(result.epochs == result.cell.epochs[0] for result in filled)
    runs = {record.name for page in pages for result in page.cell_results for record in result.records}
    tried = {record.name for page in pages for result in page.cell_results for _, record in result.tried}
    return (
        f"{len(filled)} of the {len(printed)} cells of the paper's tables, those that fail included, have a result of "
        f"ours: {full} at the paper's number of epochs, {len(filled) - full} at a shorter budget. The page shows "
        f"{len(runs)} final runs and {len(tried)} runs that try hyperparameters."
    )


def findings(pages: Sequence[Page]) -> list[Finding]:
    """What the records say on the paper's claims; a claim without records is left out."""
    by_name = {page.name: page for page in pages}
    found = [_with_and_without([page for page in pages if page.name.startswith("table")])]
    for name, say in (("horizon", _horizon), ("tuning_curves", _tuning), ("figure1", _attenuated)):
        if name in by_name:
            found.append(say(by_name[name]))
    return [finding for finding in found if finding is not None]


def verdict(low: float, high: float) -> str:
    """What an interval of a gain says."""
    return "better" if low > 0 else "worse" if high < 0 else "not decided"


def verdict_of(pair: Pair) -> str:
    """What the interval of a comparison says, if its p-value is still small after Holm's correction over its table."""
    said = verdict(*pair.gain.interval())
    return "not decided after Holm's correction" if said != "not decided" and pair.adjusted >= LEVEL else said


def _with_and_without(tables: Sequence[Page]) -> Finding | None:
    """The comparisons of the headline metric in all tables, in percent; those of the same runs under the names of
    several tables are counted once, by the name in the largest table that has a number of the paper for them.
    """
    measured: dict[Hashable, tuple[Page, Pair]] = {}
    verdicts: dict[tuple[str, str, str], list[tuple[Hashable, str]]] = {}  # by rival, panel and column
    for page in sorted(tables, key=lambda page: len(page.pairs)):
        if page.experiment is None or page.experiment.measures[0].key != "headline":
            continue
        for pair in page.pairs:
            if isnan(pair.gain.p):
                continue
            verdicts.setdefault((pair.rival, pair.panel, pair.column), []).append((pair.key, verdict_of(pair)))
            if pair.key not in measured or not isnan(pair.paper):
                measured.pop(pair.key, None)  # also in the order of that table
                measured[pair.key] = page, pair
    if not measured:
        return None
    found = sorted(measured.values(), key=lambda entry: -len(entry[0].pairs))  # in the order of the largest table
    pairs = [pair for _, pair in found]
    text = ""
    if len(pairs) > FEW:
        said = [verdict_of(pair) for pair in pairs]
        better, worse, undecided = (said.count(each) for each in ("better", "worse", "not decided"))
        text = (
            f"Of {len(pairs)} comparisons, LAWN is better in {better}, worse in {worse}, and "
            f"{len(pairs) - better - worse} are not decided after Holm's correction ({undecided} without it)."
        )
        text += f"{_against_all_bases(verdicts)} {ENTRIES}{_legend(pairs)}"
    shown = tuple(dict.fromkeys(page.name for page, _ in found))
    title = "Is LAWN better than what it is compared with, both tuned?"
    if not text:
        return Finding(title, text, [_sentence(pair) for pair in pairs], shown)
    return Finding(title, text, [], shown, _tables(pairs))


def _against_all_bases(verdicts: Mapping[tuple[str, str, str], Sequence[tuple[Hashable, str]]]) -> str:
    """In how many columns a row is better than each of the rows that it is compared with, where these are several.

    The same runs under several names, or in several tables, are one.
    """
    better: dict[str, list[bool]] = {}
    for (rival, _, _), said in verdicts.items():
        if len(dict(said)) > 1:
            better.setdefault(rival, []).append({verdict for _, verdict in said} == {"better"})
    return "".join(
        f" Where {rival} has several baselines of different runs, it is better than each in {sum(columns)} of "
        f"{len(columns)} column{'s' * (len(columns) > 1)}."
        for rival, columns in better.items()
    )


def _legend(pairs: Sequence[Pair]) -> str:
    """What the marks of the entries mean, as far as there are any."""
    decided = [pair for pair in pairs if verdict_of(pair) in DECIDED]
    below = sum(pair.loser[1] < 0 for pair in decided)
    said = (
        f" {BELOW_PAPER} In {below} of the {len(decided)} decided comparisons the losing side is below the paper's "
        "number and may be tuned less well; the pages say by how much."
    )
    far = f" {FAR_SEEDS} Seeds more than {FAR} points below the median of their row widen the interval."
    return said * (below > 0) + far * any(any(pair.far) for pair in pairs)


def _horizon(page: Page) -> Finding | None:
    """The gain after each number of epochs, of rows that were compared after several."""
    pairs = [pair for pair in page.pairs if not isnan(pair.gain.p)]
    times = Counter((pair.rival, pair.base, pair.panel) for pair in pairs)
    several = [pair for pair in pairs if times[pair.rival, pair.base, pair.panel] > 1]
    if not several:
        return None
    title = "How does the gain change with the number of epochs?"
    return Finding(title, _legend(several).strip(), [], (page.name,), _tables(several))


def _tuning(page: Page) -> Finding | None:
    """How much more the best of K random settings is expected to give with LAWN, over the grids of short schedules."""
    best = best_by_place(best_of_curves(list(page.cell_results)))
    dataset, _, short = SHORT.partition(", ")
    rows: list[dict[str, str]] = []
    for base, rival in page.experiment.pairs if page.experiment else ():
        at = {
            place: float(best[(*place, rival)].mean[K - 1] - best[(*place, base)].mean[K - 1])
            for place in places(page.cell_results)
            if {(*place, base), (*place, rival)} <= set(best)
        }
        gains = [gain for place, gain in at.items() if place[0] == SHORT]
        if len(gains) > 1:
            low, high = mean_interval(gains)
            mean = _interval_entry(verdict(low, high), float(np.mean(gains)), low, high)
            entry = {dataset: f"{rival} over {base}", f"mean over batch sizes, {short}": f"{mean}, n={len(gains)}"}
            whole = {column: f"{gain:+.2f}" for (panel, column), gain in at.items() if panel == FULL}
            rows.append(entry | whole)
    if not rows:
        return None
    text = (
        f"Gain in the expected best of {K} random settings, one seed each, on the validation split; divergence counts "
        "as 0. Single batch sizes have the paper's schedules."
    )
    columns = dict.fromkeys(column for row in rows for column in row)
    table = Table([*columns], [[row.get(column, "") for column in columns] for row in rows])
    title = "Does tuning E_free give more than tuning weight decay, in as many trials?"
    return Finding(title, text, [], (page.name,), [table])


def _attenuated(page: Page) -> Finding | None:
    """The gain at the last epoch, beside the best epoch of the free run."""
    known = [pair for pair in page.pairs if not isnan(pair.gain.p)]
    if not known:
        return None
    free, fixed = (
        next(result for result in page.cell_results if result.cell.row == row)
        for row in (known[0].base, known[0].rival)
    )
    best = np.mean([record.result["best"]["hr10"] for record in free.records])
    last = [float(np.mean([record.headline for record in result.records])) for result in (free, fixed)]
    what = page.title.partition(": ")[2]
    text = (
        f"{_capitalized(what)}, test HR@10 in %. On average the best epoch of {free.cell.row} gave {best:.2f}, "
        f"its last epoch {last[0]:.2f}, and that of {fixed.cell.row} {last[1]:.2f}."
    )
    return Finding("Do attenuated logits keep a network adaptive?", text, [_sentence(known[0])], (page.name,))


def _tables(pairs: Sequence[Pair]) -> list[Table]:
    """The gains in a table for each panel; the runs of one column have the same number of epochs."""
    tables = []
    for panel in dict.fromkeys(pair.panel for pair in pairs):
        here = [pair for pair in pairs if pair.panel == panel]
        gains = {_place(pair): _entry(pair) for pair in here}
        rows, columns = (list(dict.fromkeys(names)) for names in zip(*gains, strict=True))
        entries = [[row, *(gains.get((row, column), "") for column in columns)] for row in rows]
        tables.append(Table([panel, *columns], entries))
    return tables


def _place(pair: Pair) -> tuple[str, str]:
    """The row and the column of a comparison; what both of its rows end with, as the batch size, is of the column."""
    base, _, end = pair.base.rpartition(", ")
    rival = pair.rival.removesuffix(f", {end}")
    column = f"{pair.column}{_budget(pair)}"
    if rival == pair.rival:
        return f"{rival} over {pair.base}", column
    return f"{rival} over {base}", f"{end}, {column}"


def _entry(pair: Pair) -> str:
    """The verdict, the gain and its interval, and in brackets the paper's with the seeds that would decide it."""
    said = verdict_of(pair)
    mark = BELOW_PAPER * (said in DECIDED and pair.loser[1] < 0)
    needed = _needed_seeds(pair) if said == "not decided" else ""
    printed = "" if isnan(pair.paper) else f" [{', '.join(filter(None, (f'{pair.paper:+.2f}', needed)))}]"
    gain = _interval_entry(said, pair.gain.difference, *pair.gain.interval(), mark)
    return gain + FAR_SEEDS * any(pair.far) + printed


def _interval_entry(said: str, gain: float, low: float, high: float, mark: str = "") -> str:
    decided = f"{said}{mark}: " if said in DECIDED else ""
    return f"{decided}{gain:+.2f} ({low:+.2f} to {high:+.2f})"


def _sentence(pair: Pair) -> str:
    """The verdict and the comparison; of one that is not decided also what would decide it."""
    said = verdict_of(pair)
    where = f", {pair.place}" if pair.place else ""
    row, apart = pair.loser
    if said in DECIDED:
        more = f" But our {row} is {-apart:.2f} below the paper's: it may not be tuned as well." if apart < 0 else ""
    else:
        needed = _needed_seeds(pair)
        more = f" A true gain of {pair.gain.detectable():.2g} would be found with 80 % probability"
        more += f", the paper's with {needed}" if needed else ""
        more += (": the test users are too few" if needed.startswith("more") else "") + "."
    seeds = f"{pair.seeds[1]} and {pair.seeds[0]} seeds{_printed(pair)}"
    gain = f"{format_signed(pair.gain.difference)} (95 % interval {format_interval(pair.gain)}; {seeds})"
    return f"{_capitalized(said)}: {pair.rival} against {pair.base}{where}{_budget(pair)}: {gain}.{more}"


def _budget(pair: Pair) -> str:
    """The number of epochs, where it is not the paper's and the column does not tell it."""
    epochs = pair.epochs if pair.epochs != pair.paper_epochs else None
    return f" after {epochs} epochs" if epochs and not pair.column.endswith(" epochs") else ""


def _printed(pair: Pair) -> str:
    if isnan(pair.paper):
        return ""
    return f"; the paper {format_signed(pair.paper)}" + (f" after {pair.paper_epochs}" if _budget(pair) else "")


def _needed_seeds(pair: Pair) -> str:
    """How many seeds of each row would decide a gain as large as the paper's, to two digits; empty if it has none, if
    the interval does not hold it, or if a few seeds far from the others make the interval."""
    low, high = pair.gain.interval()
    if not pair.paper or not low <= pair.paper <= high or any(pair.far):
        return ""
    needed = pair.gain.seeds_needed(pair.paper)
    return f"{float(f'{needed:.2g}'):,.0f} seeds" if needed < inf else f"more than {MANY_SEEDS:,} seeds"


def _capitalized(said: str) -> str:
    return said[:1].upper() + said[1:]
