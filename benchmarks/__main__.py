"""python -m benchmarks [run | accuracy | plot | table | page]: writes rows to benchmarks/results/, or reads them"""

import argparse
from pathlib import Path

from . import accuracy, cases, measure, providers, rows


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    running = commands.add_parser("run", help="check, and measure time and memory; the default")
    for each in (parser, running):
        each.add_argument("--case", nargs="+", choices=cases.BY_KEY, metavar="CASE", help="only these cases")
        each.add_argument("--provider", nargs="+", choices=providers.PROVIDERS, metavar="NAME", help="only these")
        each.add_argument("--seconds", type=float, default=1.0, help="how long to time each provider of a case")
        each.add_argument("--no-memory", action="store_true", help="do not measure memory")
        each.add_argument("--results", type=Path, default=rows.default_path(), help="the CSV to write")
    plotting = commands.add_parser("plot", help="draw every result file, or the given ones")
    plotting.add_argument("results", type=Path, nargs="*")
    tables = commands.add_parser("table", help="print the README's table")
    tables.add_argument("results", type=Path, nargs="*")
    tables.add_argument("--write", metavar="FILE", help="write it between the marks of this file instead")
    page = commands.add_parser("page", help="write the results page, docs/benchmarks.md")
    page.add_argument("results", type=Path, nargs="*")
    commands.add_parser("accuracy", help="measure the gradient's error against the temperature")
    memory = commands.add_parser("memory", help="one provider's memory for one case, in MiB")
    memory.add_argument("case", choices=cases.BY_KEY)
    memory.add_argument("provider", choices=providers.PROVIDERS)
    answer(parser.parse_args())


def answer(options):
    if options.command in (None, "run"):
        from .run import run

        run(options.results, options.case, options.provider, options.seconds, not options.no_memory)
    elif options.command == "plot":
        from .plot import draw, draw_accuracy, draw_headline

        paths = options.results or rows.files()
        for path in paths:
            print(draw(path))
        print(draw_accuracy())
        print(draw_headline(rows.newest(paths)))
    elif options.command == "table":
        from .table import markdown, write

        text = markdown(options.results or rows.files())
        write(options.write, text) if options.write else print(text)
    elif options.command == "page":
        from .table import page

        (rows.ROOT / "docs" / "benchmarks.md").write_text(page(options.results or rows.files()))
    elif options.command == "accuracy":
        accuracy.run()
    else:
        print(measure.peak_memory_here(options.case, options.provider))


if __name__ == "__main__":
    main()
