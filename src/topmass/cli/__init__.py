"""Command line: one thin file per command, imported when the command runs."""

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from topmass.cli._recipe import apply_recipe
from topmass.errors import TopmassError

__all__ = ["app", "main"]


def _version() -> str:
    from topmass import __version__

    return __version__


app = App(
    name="topmass",
    help="How much dense attention does a long-context model need? Audit it, distil an indexer, evaluate, report.",
    version=_version,
    default_parameter=Parameter(negative=(), consume_multiple=True),
    config=(apply_recipe,),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.command("topmass.cli.audit:audit", name="audit", help="Measure what an oracle's support keeps, layer by layer.")
app.command("topmass.cli.eval:evaluate", name="eval", help="Score selectors on long-context tasks, paired with dense.")
app.command("topmass.cli.distill:distill", name="distill", help="Train an indexer that predicts the attention mass.")
bench = App(name="bench", help="Time kernels beside dense attention, after checking that they are right.")
bench.command("topmass.cli.bench:kernels", name="kernels", help="Time one layer: dense kernels, and ours by stage.")
bench.command("topmass.cli.bench:ttft", name="ttft", help="Time the first token: dense, sparse, and the floor.")
bench.command("topmass.cli.bench_serve:serve", name="serve", help="Ask vLLM: dense, sparse, and the floor.")
app.command(bench)
app.command("topmass.cli.frontier:frontier", name="frontier", help="Join scores and times; recommend a configuration.")
app.command("topmass.cli.report:report", name="report", help="Render runs as Markdown and self-contained HTML.")
app.command("topmass.cli.demo:demo", name="demo", help="Audit, evaluate and report the bundled model on this machine.")
app.command("topmass.cli.doctor:doctor", name="doctor", help="Versions, devices, and each kernel backend.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Errors that a user can mend end in one line and code 2, Ctrl-C in one line and code 130; anything else is a bug of
    ours, with its traceback and code 1.
    """
    try:
        return app(sys.argv[1:] if argv is None else argv, exit_on_error=False, print_error=False) or 0
    except (TopmassError, CycloptsError) as error:
        return _say("error: " + " ".join(str(error).split()), error, 2)
    except KeyboardInterrupt as error:
        return _say("interrupted", error, 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _say(text: str, error: BaseException, code: int) -> int:
    notes = getattr(error, "__notes__", [])
    line = "; ".join([text.rstrip("."), *notes]).rstrip(".")
    print(f"topmass: {line}{'' if line.endswith('?') else '.'}", file=sys.stderr)
    return code
