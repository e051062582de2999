"""The `vitopt` command: inspect, report, schema, sensitivity."""

import argparse
import json
from pathlib import Path

from vitopt import errors, recipe


def main() -> None:
    parser = argparse.ArgumentParser(prog="vitopt", description="Vision Transformers made smaller and measured.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write the tables, plots and page of a folder of runs")
    report.add_argument("folder", help="such as runs/digits")
    look = commands.add_parser("inspect", help="what a timm model is made of, what can be pruned and what that leaves")
    look.add_argument("model", help="a model name of timm, such as vit_small_patch16_224")
    look.add_argument("options", nargs="*", metavar="key=value",
                      help="arguments of the model, such as img_size=96, or of pruning, such as prune.ratio=0.4")
    commands.add_parser("schema", help="print the JSON schema of a recipe, for editors")
    cost = commands.add_parser("sensitivity", help="what each layer of a run costs in accuracy when it alone is cut")
    cost.add_argument("run", type=Path, help="a run folder, such as runs/digits/baseline")
    cost.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7], help="shares that are removed")
    cost.add_argument("--images", type=int, default=1024, help="at most so many validation images")
    cost.add_argument("--importance", default="taylor", help="how channels are ranked, such as l2")
    cost.add_argument("--max-loss", type=float, default=1.0, help="points a layer may cost, for the proposed ratios")
    args = parser.parse_args()
    with errors.errors_as_lines():
        if args.command == "report":
            from vitopt.report import write  # matplotlib and pandas take a second to import
            print(write(args.folder))
        elif args.command == "inspect":
            from vitopt.inspection import inspect  # so do torch and timm
            model, prune = recipe.sections(args.options)
            print(inspect(recipe.section(recipe.Model, {"name": args.model} | model, "model"),
                          recipe.section(recipe.Prune, prune, "prune") if prune else None))
        elif args.command == "sensitivity":
            from vitopt.sensitivity import measure
            for ratio in args.ratios:  # a recipe's own words for what is no ratio or importance
                recipe.section(recipe.Prune, {"ratio": ratio, "importance": args.importance}, "prune")
            print(measure(args.run, args.ratios, args.images, args.importance, args.max_loss))
        else:
            print(json.dumps(recipe.Recipe.model_json_schema(), indent=2))


if __name__ == "__main__":
    main()
