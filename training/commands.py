"""`seqfraud simulate`, `init`, `train`, `evaluate`, `decide`, `importance` and `baselines`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from seqfraud.console import bar, figure, print_cleaning, print_json
from training.importance import REPEATS
from training.loop import Progress
from training.resume import Epoch

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DataOption = Annotated[Path | None, typer.Option(help="CSV or Parquet instead of the configuration's data.path.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def simulate(
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    users: Annotated[int, typer.Option(help="Number of users.")] = 2000,
    days: Annotated[int, typer.Option(help="Number of days.")] = 120,
    seed: Annotated[int, typer.Option(help="Same seed, same transactions.")] = 7,
    drift: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND@DATE[:FACTOR[:FRAUD_KIND]]",
            help="A change from a date on, may be given several times: inflation@2025-04-01:1.2 multiplies amounts, "
            "new_pattern@2025-04-01 begins a kind of fraud not seen before, fraud_rate@2025-04-01:3:test_burst makes "
            "one kind more frequent.",
        ),
    ] = None,
    fraud_share: Annotated[
        float, typer.Option(help="Share of the transactions that are fraud, about, without drifts.")
    ] = 0.0085,
    json: JsonOption = False,
) -> None:
    """Make transactions with fraud that depends on history, merchant compromises and plain large amounts.

    The first day is 2025-01-01.

    Example: seqfraud simulate --out transactions.parquet --users 2000 --days 120 --drift new_pattern@2025-04-01
    """
    from training.simulate import Simulation, parse_drift, simulate_to

    drifts = tuple(parse_drift(text) for text in drift or ())
    settings = Simulation(users=users, days=days, seed=seed, drift=drifts, fraud_share=fraud_share)
    out.parent.mkdir(parents=True, exist_ok=True)
    with bar("simulating", None) as progress:
        summary = simulate_to(settings, out, lambda done, of: progress.show(done, f"simulating /{of}"))
    if json:
        print_json({name: str(value) if name in ("first", "last") else value for name, value in vars(summary).items()})
        return
    print(f"{summary.rows:,} transactions of {summary.users:,} users, {summary.frauds:,} frauds: {out}")


def init(
    data: Annotated[Path, typer.Argument(help="CSV or Parquet, a file or a folder.", metavar="DATA")],
    out: Annotated[Path, typer.Option(help="Configuration to write.", metavar="CONFIG.toml")],
    user: Annotated[str | None, typer.Option(help="The user's column, where it is known.")] = None,
    time: Annotated[str | None, typer.Option(help="The time's column, where it is known.")] = None,
    label: Annotated[str | None, typer.Option(help="The label's column, where it is known.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there already.")] = False,
    check: Annotated[bool, typer.Option(help="Read the whole file as training would.")] = True,
    json: JsonOption = False,
) -> None:
    """Look at a file and write a commented configuration that trains as it stands; asks nothing, explains each guess.

    Example: seqfraud init transactions.parquet --out transactions.toml
    """
    from training.proposal import Given, as_plain, write_config

    with bar(f"looking at {data.name}", None) as progress:
        proposal, checked = write_config(
            data, out, Given(user, time, label), force=force, read_all=check, progress=progress.advance
        )
    refusal = [] if checked is None or checked.refusal is None else [f"training refuses the file: {checked.refusal}"]
    for note in (*proposal.notes, *refusal):
        print(f"note: {note}", file=sys.stderr)
    if json:
        print_json(as_plain(proposal, checked, out))
        return
    width = max(len(choice.column) for choice in proposal.choices)
    for choice in proposal.choices:
        print(f"{choice.column:{width}}  {choice.role:14}  {choice.why}")
    for name, (rows, frauds) in ({} if checked is None else checked.parts).items():
        print(f"{name:10}  {rows:>12,} transactions  {frauds:>8,} frauds")
    print(f"written: {out}; next: seqfraud train {out}")


def train(
    config: Annotated[Path, typer.Argument(help="A configuration.", metavar="CONFIG.toml")],
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME of the configuration.")] = None,
    device: DeviceOption = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted training in that folder.")
    ] = False,
    select: Annotated[
        bool,
        typer.Option("--select", help="Drop inputs that the validation days do not need; trains up to five models."),
    ] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's event files.")] = None,
    json: JsonOption = False,
) -> None:
    """Train, calibrate, choose thresholds on the validation days, evaluate on the test days.

    Example: seqfraud train configs/simulator.toml --data transactions.parquet --out runs/demo
    """
    from training.run import train_run
    from training.tensorboard import logged

    folder = out if out is not None else Path("runs") / config.stem

    def say(words: str) -> None:
        if not json:
            print(words, file=sys.stderr)

    with epochs_bar(quiet=json) as shown, logged(tensorboard, shown) as progress:
        metrics = train_run(config, data, folder, device, progress, resume, select, say)
    if json:
        print_json(metrics)
        return
    print_cleaning(metrics["cleaning"])
    print_figures(metrics)
    if select:
        chosen = metrics["selection"]
        print(f"kept: {', '.join(chosen['kept'])}; dropped: {', '.join(chosen['dropped']) or 'nothing'}")
    print_saved(metrics)
    print(f"best epoch {metrics['best_epoch']} of {len(metrics['epochs'])}; run folder: {folder}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    data: DataOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Figures of a run on its own or on other data; nothing is fitted.

    Example: seqfraud evaluate runs/demo --data later.parquet
    """
    from seqfraud.nn.checkpoint import load_run
    from training.run import evaluate_run

    metrics = evaluate_run(load_run(run), data, device)
    if json:
        print_json(metrics)
    else:
        print_figures(metrics)
        print_saved(metrics)


def decide(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    data: DataOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Choose what a run decides again, by the [decision] of RUN/config.toml as it is now; nothing is trained.

    Edit that section first. The choice is made on the run's validation days; the report says what it is worth there and on
    the test days, and the next `seqfraud export` takes it along.

    Example: seqfraud decide runs/demo
    """
    from seqfraud.nn.checkpoint import load_run
    from training.run import decide_run

    metrics = decide_run(load_run(run, decided=False), data, device)
    if json:
        print_json({name: metrics[name] for name in ("thresholds", "decision", "choice", "worth")})
    else:
        print_worth(metrics)


def importance(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    data: DataOption = None,
    repeats: Annotated[int, typer.Option(min=2, help="Permutations of each input.")] = REPEATS,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Permute each input on the validation days: how far does the average precision fall? Then in the report too.

    Example: seqfraud importance runs/demo --repeats 20
    """
    from seqfraud.nn.checkpoint import load_run
    from training.run import importance_of_run

    trained = load_run(run)
    with bar("permuting", None) as progress:
        found = importance_of_run(
            trained, data, device, repeats, lambda done, of, name: progress.show(done, f"{name} /{of}")
        )
    if json:
        print_json(found.as_dict())
        return
    print(f"average precision {found.average_precision:.4f} on {found.rows:,} validation rows, {found.frauds:,} frauds")
    width = max(len(str(f.input)) for f in found.figures)
    print(f"{'permuted':{width}}{'fall':>10}{'deviation':>12}")
    for f in found.figures:
        print(f"{f.input!s:{width}}{f.mean:>10.4f}{f.deviation:>12.4f}")


def baselines(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Tune and measure models without a sequence on the rows of a run; its report then compares them.

    Those without history can then be exported: seqfraud export RUN --model logistic_regression.

    Example: seqfraud baselines runs/demo
    """
    from seqfraud.nn.checkpoint import load_run
    from training.baselines import FAMILIES, GRU, run_baselines

    trained = load_run(run)
    with bar("baselines", sum(len(family.trials()) for family in FAMILIES)) as progress:
        done = iter(range(1, 1000))
        result = run_baselines(trained, data, lambda words: progress.show(next(done), words))
    if json:
        print_json(result)
        return
    print(f"{'on the test days':22}{'average precision':>18}{'95 % interval':>18}{'ROC AUC':>9}{'recall at 1 % FPR':>19}"
          f"{'money caught':>14}{'seconds':>9}")  # fmt: skip
    rows = sorted(
        [(GRU, result[GRU]), *result["models"].items()], key=lambda row: -(row[1]["test"]["average_precision"] or 0)
    )
    for name, found in rows:
        test, interval = found["test"], found["interval"]
        between = f"{interval['low']:.3f} to {interval['high']:.3f}" if interval else "-"
        print(
            f"{name.replace('_', ' '):22}{figure(test['average_precision']):>18}{between:>18}"
            f"{figure(test['roc_auc']):>9}{figure(test['recall_at_1pct_fpr']):>19}{figure(test['money_caught']):>14}"
            f"{figure(found.get('seconds'), 0):>9}"
        )


@contextmanager
def epochs_bar(quiet: bool) -> Iterator[Progress]:
    """Progress of a fit: a bar on a terminal, a line per epoch otherwise."""
    with bar("training", 100) as shown:
        best: list[float] = []

        def progress(epoch: int, share: float, events: int, report: Epoch | None) -> None:
            if report is not None:
                if report.epoch == 1:  # --select fits more than one model
                    best.clear()
                best.append(report.validation_average_precision)
                if not quiet:
                    print(
                        f"epoch {report.epoch:2d}  loss {report.loss:.5f}  validation average precision "
                        f"{report.validation_average_precision:.4f}  {report.events_per_second:,.0f} events/s",
                        file=sys.stderr,
                    )
            figures = f"  best {max(best):.4f}" if best else ""
            shown.show(100 * share, f"epoch {epoch + 1}  {events:,} events{figures}")

        yield progress


def print_saved(metrics: dict[str, Any]) -> None:
    """What the policy saves on the test days, where there are some."""
    if "test" in metrics["worth"]:
        policies = metrics["worth"]["test"]["policies"]
        saved, without = policies["this policy"]["saved"], policies["no model"]["cost"]["estimate"]
        print(
            f"on the test days its decisions save {saved['estimate']:,.0f} of {without:,.0f} a day (95 %: {saved['low']:,.0f} to "
            f"{saved['high']:,.0f}), {policies['this policy']['alerts']:,.1f} alerts a day"
        )


def print_worth(metrics: dict[str, Any]) -> None:
    """What the policies are worth a day, on validation and test days."""
    print("decides by " + ", ".join(f"{name} {value}" for name, value in metrics["decision"].items()))
    for tried in metrics["choice"]["tried"]:
        chosen = "  chosen" if tried["chosen"] else ""
        print(f"  {tried['setting']:24}{tried['per_day']:>12,.2f} {metrics['choice']['measured']}{chosen}")
    for part in ("validation", "test"):
        if part not in metrics["worth"]:
            continue
        print(
            f"{part + ' days, a day':34}{'alerts':>9}{'declines':>10}{'fraud lost':>12}{'cost':>12}{'saved':>12}{'95 %':>24}"
        )
        for name, found in metrics["worth"][part]["policies"].items():
            saved = found["saved"]
            print(
                f"{name:34}{found['alerts']:>9,.1f}{found['declines']:>10,.1f}{found['fraud_lost']:>12,.0f}"
                f"{found['cost']['estimate']:>12,.0f}{saved['estimate']:>12,.0f}"
                f"{saved['low']:>14,.0f} to{saved['high']:>7,.0f}"
            )


def print_figures(metrics: dict[str, Any]) -> None:
    """The figures of validation and test side by side."""
    names = [
        "rows", "frauds", "average_precision", "roc_auc", "recall_at_1pct_fpr", "card_precision_at_100",
        "precision_at_budget", "money_caught", "calibration_slope", "precision", "recall",
    ]  # fmt: skip
    parts = [part for part in ("validation", "test") if part in metrics]
    print(f"{'':24}" + "".join(f"{part:>14}" for part in parts))
    for name in names:
        values = [metrics[part].get(name) for part in parts]
        print(f"{name:24}" + "".join(f"{v:>14,}" if isinstance(v, int) else f"{figure(v):>14}" for v in values))
