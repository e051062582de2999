"""The `vitopt` command: report, schema."""

import argparse
import json

from vitopt.recipe import Recipe, errors_as_lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="vitopt", description="Vision Transformers made smaller and measured.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write the tables, plots and page of a folder of runs")
    report.add_argument("folder", help="such as runs/digits")
    commands.add_parser("schema", help="print the JSON schema of a recipe, for editors")
    args = parser.parse_args()
    with errors_as_lines():
        if args.command == "report":
            from vitopt.report import write  # matplotlib and pandas take a second to import
            print(write(args.folder))
        else:
            print(json.dumps(Recipe.model_json_schema(), indent=2))


if __name__ == "__main__":
    main()
