"""The page of `experiments.references`."""

import pandas as pd

from experiments.record import Record
from experiments.references import Settings, run
from experiments.reporting.layout import Entry, Panel, format_mean
from experiments.reporting.simulations import Simulation, SimulationContent
from experiments.reporting.statistics import mean_and_error

METRICS = {
    "hr10": "test HR@10, %",
    "ndcg10": "NDCG@10, %",
    "hr10_all": "HR@10 among all items, %",
    "ndcg10_all": "NDCG@10 among all items, %",
}
ROWS = {"popularity": "Popularity", "ials": "iALS"}


def show_record(record: Record) -> SimulationContent:
    values = {
        (key, metric): [repeat[metric] for repeat in repeats]
        for key, repeats in record.result["metrics"].items()
        for metric in METRICS
    }
    rows = [(title, [Entry(format_mean(values[key, metric], 2)) for metric in METRICS]) for key, title in ROWS.items()]
    frame = pd.DataFrame(
        {
            "row": ROWS[key],
            "measure": METRICS[metric],
            "n": len(numbers),
            "mean": mean_and_error(numbers)[0],
            "standard_error": mean_and_error(numbers)[1],
        }
        for (key, metric), numbers in values.items()
    )
    chosen, settings = record.result["chosen"], record.config
    tried = "; ".join(f"{p['alpha']:g}, {p['regularization']:g}: {p['hr10']:.2f}" for p in record.result["grid"])
    summary = [
        f"iALS has {settings['factors']} factors and {settings['iterations']} iterations. Weight and regularization, "
        f"and HR@10 on the validation split: {tried}. Chosen: {chosen['alpha']:g}, {chosen['regularization']:g}.",
    ]
    return SimulationContent([Panel("", list(METRICS.values()), rows)], summary, frame, None)


REFERENCES = Simulation(
    name="references",
    title="References: popularity and iALS on MovieLens-1M",
    settings=Settings(),
    short=Settings(factors=16, iterations=3, alphas=(4.0,), regularizations=(30.0,), seeds=1),
    run=run,
    show=show_record,
    measured="Mean (standard error, number of seeds) on the split and candidates of He et al. 2017.",
    notes=(
        "Popularity ranks items by their number of training interactions. iALS is implicit alternating least squares "
        "(Hu et al. 2008) of the package implicit (`pip install '.[references]'`).",
    ),
    seconds=(900.0, 10.0),
    needs_data=True,
)
