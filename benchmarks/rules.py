"""What rules and lists cost a transaction, in process; and what one evaluation costs with the libraries there are for it.

    python -m benchmarks.rules [--rounds 40] [--calls 50] [--entries 1000000]

Writes benchmarks/results/rules.json. A service of its own for each case, in turn in short rounds, each transaction new, in
microseconds of CPU of the thread that scores, the least of all rounds; ratios are to the service without rules. The
libraries are measured as far as they are installed:

    pip install --target PEERS rule-engine simpleeval cel-python common-expression-language
    PYTHONPATH=.:PEERS python -m benchmarks.rules
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.drawn import CARDS, drawn_bundle
from benchmarks.processes import write_result
from seqfraud.config import parse_config
from serve.desk import Desk
from serve.service import Service

START = 1_600_000_000_000
WHY = "a benchmark"
AT_ONCE = 10_000
VALUES = {"amount": 150.0, "hour": 3.0, "count_1h": 4.0, "country": "DE"}


def put_rules(desk: Desk, count: int, condition: str) -> None:
    """Rules that differ in one number."""
    for n in range(count):
        body = {"expression": condition.format(n=n), "decision": "review", "enabled": True, "why": WHY}
        desk.put_rule(f"r{n}", json.dumps(body).encode(), "benchmark")


def put_list(desk: Desk, entries: int) -> dict[str, Any]:
    """A block list of users that do not come; how long it takes to make."""
    desk.put_list("list", json.dumps({"kind": "block", "field": "user", "why": WHY}).encode(), "benchmark")
    began = time.perf_counter()
    for begin in range(0, entries, AT_ONCE):
        some = [{"value": f"blocked-{n}"} for n in range(begin, min(entries, begin + AT_ONCE))]
        desk.add_entries("list", json.dumps({"entries": some, "why": WHY}).encode(), "benchmark")
    return {"entries": entries, "seconds": round(time.perf_counter() - began, 2)}


PLAIN = "amount > 1e6 + {n} && merchant == 'm'"
WINDOW = "count_1h > 100 + {n} && total_24h > 1e9"
HIT = "amount > 0 && {n} >= 0"
CASES: dict[str, Callable[[Desk, int], Any]] = {
    "no rules": lambda desk, entries: None,
    "1 rule": lambda desk, entries: put_rules(desk, 1, PLAIN),
    "10 rules": lambda desk, entries: put_rules(desk, 10, PLAIN),
    "100 rules": lambda desk, entries: put_rules(desk, 100, PLAIN),
    "10 rules with windows": lambda desk, entries: put_rules(desk, 10, WINDOW),
    "100 rules with windows": lambda desk, entries: put_rules(desk, 100, WINDOW),
    "100 rules, all true": lambda desk, entries: put_rules(desk, 100, HIT),
    "list of 1": lambda desk, entries: put_list(desk, 1),
    "list of many": put_list,
}


def body(n: int) -> bytes:
    """The n-th request: a few users, a transaction a minute."""
    row = {"id": n, "user": f"u{n % 7}", "time": START + n * 60_000, "amount": 20.5, "kind": "food", "merchant": "m1"}
    return json.dumps({**row, "device": "d1"}).encode()


def scoring(rounds: int, calls: int, entries: int) -> dict[str, Any]:
    """Microseconds per transaction by case."""
    least = dict.fromkeys(CASES, float("inf"))
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        bundle = drawn_bundle(Path(folder) / "bundle", parse_config(CARDS, "CARDS"), (), 0, 2.5)
        services = {}
        for name, prepare in CASES.items():
            services[name] = opened.enter_context(Service(bundle, Path(folder) / name, snapshot_every=None))
            said = prepare(services[name].desk, entries)
            made |= {} if said is None else {name: said}
        for number in range(rounds):
            for name, service in services.items():
                sent = [body(number * calls + n) for n in range(calls)]
                began = time.thread_time()
                for one in sent:
                    service.score(one)
                least[name] = min(least[name], (time.thread_time() - began) / calls * 1e6)
    base = least["no rules"]
    return {
        "microseconds": {name: round(value, 1) for name, value in least.items()},
        "ratio": {name: round(value / base, 2) for name, value in least.items()},
        "lists": made,
    }


# ---- libraries


def _cel_expr() -> Callable[[str], Callable[[], Any]]:
    cel = importlib.import_module("cel_expr_python.cel")
    kinds = {name: cel.Type.STRING if isinstance(v, str) else cel.Type.DOUBLE for name, v in VALUES.items()}
    env = cel.NewEnv(variables=kinds)
    values = env.Activation(VALUES)

    def compiled(text: str) -> Callable[[], Any]:
        program = env.compile(text)
        return lambda: program.eval(values).value()

    return compiled


def _cel_rust() -> Callable[[str], Callable[[], Any]]:
    cel = importlib.import_module("cel")
    values = cel.Context(variables=VALUES)

    def compiled(text: str) -> Callable[[], Any]:
        program = cel.compile(text)
        return lambda: program.execute(values)

    return compiled


def _cel_python() -> Callable[[str], Callable[[], Any]]:
    celpy = importlib.import_module("celpy")
    env, values = celpy.Environment(), celpy.json_to_cel(VALUES)

    def compiled(text: str) -> Callable[[], Any]:
        program = env.program(env.compile(text))
        return lambda: program.evaluate(values)

    return compiled


def _rule_engine() -> Callable[[str], Callable[[], Any]]:
    engine = importlib.import_module("rule_engine")
    kinds = {
        name: engine.DataType.STRING if isinstance(v, str) else engine.DataType.FLOAT for name, v in VALUES.items()
    }
    context = engine.Context(type_resolver=engine.type_resolver_from_dict(kinds))

    def compiled(text: str) -> Callable[[], Any]:
        rule = engine.Rule(_words(text), context=context)
        return lambda: rule.matches(VALUES)

    return compiled


def _simpleeval() -> Callable[[str], Callable[[], Any]]:
    evaluator = importlib.import_module("simpleeval").SimpleEval(names=VALUES)

    def compiled(text: str) -> Callable[[], Any]:
        words = _words(text)
        parsed = evaluator.parse(words)
        return lambda: evaluator.eval(words, previously_parsed=parsed)

    return compiled


def _words(text: str) -> str:
    return text.replace("&&", "and").replace("||", "or")


LIBRARIES = {
    "cel-expr-python": _cel_expr,
    "common-expression-language": _cel_rust,
    "cel-python": _cel_python,
    "rule-engine": _rule_engine,
    "simpleeval": _simpleeval,
}
CONDITIONS = {
    "one comparison": "amount > 100.0",
    "five": 'amount > 100.0 && hour < 6.0 && count_1h >= 3.0 && (country == "FR" || country == "DE")',
}


def libraries(rounds: int) -> dict[str, Any]:
    """Microseconds per evaluation of a compiled condition, by library."""
    programs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, prepare in LIBRARIES.items():
        try:
            compiled = prepare()
        except ImportError:
            print(f"{name} is not installed")
            continue
        for words, text in CONDITIONS.items():
            programs[name, words] = compiled(text)
            assert bool(programs[name, words]()) is True
    least = dict.fromkeys(programs, float("inf"))
    for _ in range(rounds):
        for key, program in programs.items():
            began = time.thread_time()
            for _ in range(100):
                program()
            least[key] = min(least[key], (time.thread_time() - began) / 100 * 1e6)
    out: dict[str, Any] = {}
    for (name, words), value in least.items():
        out.setdefault(name, {})[words] = round(value, 1)
    return out


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--entries", type=int, default=1_000_000)
    options = parser.parse_args()
    evaluation = libraries(options.rounds)
    for name, figures in evaluation.items():
        print(f"{name:28}" + "  ".join(f"{words} {value:.1f} us" for words, value in figures.items()))
    result = scoring(options.rounds, options.calls, options.entries)
    for name, value in result["microseconds"].items():
        print(f"{name:24} {value:8.1f} us  {result['ratio'][name]:.2f}")
    print(json.dumps(result["lists"]))
    write_result("rules", {"evaluation_microseconds": evaluation, **result})


if __name__ == "__main__":
    sys.exit(main())
