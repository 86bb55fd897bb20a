"""`seqfraud rules`."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from seqfraud.bundle import open_bundle
from seqfraud.commands import TrustedKeysOption, trusted_keys
from seqfraud.console import print_json
from seqfraud.errors import ConfigError, RequestError


def rules(
    action: Annotated[Literal["test"], typer.Argument(help="What to do.", metavar="test")],
    what: Annotated[str, typer.Argument(help="A condition, or a file that holds one.", metavar="EXPRESSION|FILE")],
    bundle: Annotated[Path, typer.Option(help="A bundle folder.")],
    state: Annotated[Path, typer.Option(help="A service's state folder; the service may be running.")],
    decision: Annotated[Literal["approve", "review", "decline"], typer.Option(help="What the rule says.")] = "review",
    last: Annotated[int, typer.Option(help="How many of the newest transactions.", min=1)] = 100_000,
    trusted: TrustedKeysOption = None,
    identifier_key: Annotated[
        Path | None, typer.Option("--identifier-key", help="File of the key that identifiers are hashed with.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what a rule would have hit among the newest transactions of a journal. Nothing is changed.

    Card numbers in the condition are found with --identifier-key only.

    Example: seqfraud rules test "amount > 500 && count_1h > 3" --bundle bundle --state state
    """
    from seqfraud.identifiers import Identifiers, read_key
    from serve.decoding import TransactionDecoder
    from serve.hits import rule_hits
    from serve.rulebook import RuleBook

    opened = open_bundle(bundle, trusted_keys(trusted))
    manifest = opened.manifest
    key = None if identifier_key is None else read_key(identifier_key)
    book = RuleBook(manifest, Identifiers(manifest.schema, manifest.identifiers, key))
    file = Path(what)
    try:
        text = file.read_text(encoding="utf-8").strip() if len(what) < 256 and file.is_file() else what
        expression = book.language.compile(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    except RequestError as error:
        raise ConfigError(str(error)) from error
    tested = rule_hits(
        state, TransactionDecoder(manifest), book.facts, manifest.serve.window, expression, decision, last,
        seconds=float("inf"), pause=lambda _: None,
    )  # fmt: skip
    if json:
        print_json(msgspec.to_builtins(tested))
        return
    print(tested.words)
    for words, hits in (
        ("hits", tested.hits),
        ("  labelled fraud", tested.fraud),
        ("  labelled honest", tested.honest),
        ("  without a label", tested.unknown),
        ("  approved then", tested.not_caught),
        ("    fraud among them", tested.fraud_not_caught),
        ("all fraud", tested.all_fraud),
    ):
        print(f"{words:22} {hits.transactions:>10,}  amount {hits.amount:,.2f}")
    print(f"{'decisions changed':22} {tested.changed:>10,}")
    print(f"{'could not be told':22} {tested.failed:>10,}")
