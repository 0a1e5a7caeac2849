"""raysparse: train large models with most of their weights absent.

raysparse plan      configs/pretrain/spdf_gpt3_xl.yaml          what a run will be: layers, nnz, FLOPs, memory, bytes
raysparse pretrain  configs/debug.yaml --local                  train in this process, breakpoint() works
raysparse pretrain  configs/quickstart.yaml run.workers=2       train on Ray (RAY_ADDRESS, else a local one)
raysparse finetune  configs/finetune/docstrings.yaml model.path=runs/quickstart
raysparse prune     runs/quickstart sparsity.target=0.75 data.train.type=python_stdlib    at once: SparseGPT, Wanda, magnitude
raysparse evaluate  configs/finetune/docstrings.yaml model.path=runs/docstrings
raysparse zeroshot  configs/zeroshot/lambada.yaml model.path=runs/quickstart    without training: perplexity, LAMBADA, choices
raysparse score     --task e2e --outputs FILE --references FILE any system's outputs, by the task's official scores
raysparse export    run=runs/quickstart to=models/quickstart    any checkpoint -> a Hugging Face folder
raysparse export    run=runs/quickstart to=models/packed format=packed dtype=int8
raysparse generate  model=models/packed prompt="Once upon"      text, tokens/s, and the bytes of weights that a token reads
raysparse gradual   configs/gradual/docstrings.yaml             pruned and fine-tuned level by level, down to 90 %
raysparse recover   configs/recover/docstrings.yaml             pruned, then tuned from the data, by KL and by SquareHead: what comes back?
raysparse compare   configs/compare/quickstart.yaml             dense against sparse, pre-training to task score
raysparse compare   configs/compare/mst_demo.yaml               dense, static, RigL, MST: loss, density, churn, FLOPs
raysparse tune      tuning/spaces/docstrings.yaml               how sparse may it be for my task? a search on Ray Tune
raysparse masks     runs/quickstart                             what became of its masks, while it trains and after
raysparse report    runs/tune-demo                              of a search: which sparsity to take, and what it rests on
raysparse analyze   overlap runs/rigl runs/set                  tables and pictures of models, topologies and runs
raysparse doctor                                                which kernels run on this machine, right and how fast
raysparse doctor    --cluster                                   whether the nodes of a Ray cluster are alike, and share their storage
raysparse submit    pretrain configs/quickstart.yaml run.folder=/shared/runs data.cache_dir=/shared/cache    on a Ray cluster, as a job
raysparse jobs      logs tiny --follow                          the jobs of a cluster: list, status, stop, logs
raysparse tensorboard quickstart                                the curves of a run, or of several
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from cluster.cli import VERBS as ON_CLUSTER
from cluster.cli import add as add_cluster_verbs
from raysparse.config import Config, ConfigError, load, merge, parse_override, read_yaml

HELP = {
    "plan": ("show what a run will be, and train nothing", "Prints the resolved config, every sparse layer with its exact number of "
             "live weights (nnz), the phases and the density over time, counted FLOPs, and the estimated memory and communication of "
             "a rank."),
    "pretrain": ("pre-train, dense or with masks, static or evolving", "Tokenizes the data once (cached), then trains on Ray Train "
                 "workers. The same command again goes on from the last checkpoint. The run folder ends with summary.json and export/, "
                 "a Hugging Face model."),
    "prune": ("prune a trained model at once", "By SparseGPT, Wanda or magnitude (method.type), on some text or pairs of a task, block by "
              "block, each on what the pruned blocks before it give. A folder or model.path names a run or a model in Hugging Face format. "
              "The run folder ends with export/, a model with its masks: finetune model.path=RUN sparsity.masks=keep goes on from it."),
    "finetune": ("fine-tune a pre-trained model on a task, and score it", "model.path names a run or a Hugging Face folder. "
                 "sparsity.masks=lift revives the zeros (SPDF), keep leaves them dead. --grid runs every combination of the config's grid "
                 "and scores the one that is best on the validation split."),
    "evaluate": ("score a model on a task", "Every worker answers its share of the examples; predictions.jsonl keeps the answers."),
    "zeroshot": ("ask a model what it was not trained for", "Perplexity of a text, the last word of a passage (LAMBADA), multiple choice, "
                 "classification by a prompt with or without solved examples. Scores are those of EleutherAI's lm-evaluation-harness "
                 "(docs/zeroshot.md); predictions.jsonl keeps the log-probabilities."),
    "export": ("turn a run's checkpoint into a Hugging Face folder, or a packed one", "run=FOLDER to=FOLDER [step=N]. Zeros are kept; "
               "AutoModelForCausalLM.from_pretrained loads the result. format=packed dtype=float32|bfloat16|int8 stores live weights "
               "alone, for raysparse generate; then run=FOLDER may also be a model in Hugging Face format."),
    "generate": ("go on from a prompt", "model=FOLDER prompt=TEXT, on the CPU. FOLDER is a run, a model in Hugging Face format or a packed "
                 "one. Live weights alone are read (weights=packed), as float32, bfloat16 or int8, and with them the time of a token. "
                 "Prints the text, tokens/s, the time of the prompt, and the bytes of weights that a token reads."),
    "tune": ("search sparsity and fine-tuning settings for a task, on Ray Tune", "Pre-trains once for every combination of pretrain.space, "
             "fine-tunes each as algorithm and scheduler choose, and ends with report.html: the table sparsity x task, the Pareto front of "
             "score against FLOPs, and how sparse the model may be. --resume goes on with a search that was interrupted; the models of the "
             "first level are shared by all searches of one run.folder. PATH.KEY: {choice: [...]}, {loguniform: [a, b]}, {uniform: [a, b]} "
             "or {randint: [a, b]} in a space; PATH.KEY is any key of `raysparse pretrain --keys` or `finetune --keys`."),
    "gradual": ("prune a trained model in stages, each fine-tuned with its mask kept", "Levels are SquareHead's eight, 50 to 90 %, unless "
                "told otherwise. All stages run in one worker group; the same command goes on. Ends with a table of losses and scores."),
    "recover": ("prune a dense model of a task to several levels, fine-tune each in several ways, compare", "The teacher is "
                "trained first. `ways` names the ways: from the data alone, by KL, by SquareHead (arXiv:2310.06927). Every stage is a run; "
                "the same command goes on. Ends with a table over levels and seeds, and report.html."),
    "compare": ("pre-train a dense twin and sparse models, fine-tune all, compare", "Runs all stages in one worker group and ends with a "
                "table and report.html. `methods` names the pre-trainings, one of them dense; without finetune they are all."),
}  # fmt: skip


MASKS_HELP = (
    "show what became of the masks of a run, or compare two sets of masks",
    """Of a run: version, phase, sparsity of every layer against the plan, and the last updates; live from its manager where it
trains on Ray, else from topology.jsonl. Of a checkpoint, an exported model or a masks file: the live weights (nnz) of
every layer, counted.

examples:
  raysparse masks runs/mst
  raysparse masks --diff runs/mst/checkpoints/step_00001000 runs/mst""",
)
"""Short and long help of `raysparse masks`."""


ANALYZE_HELP = (
    "tables and pictures of models, topologies and finished runs",
    """distance PRETRAINED FINETUNED [...]  what fine-tuning moved: 1 - cos of each weight before and after, by layer and module
weights MODEL                        nnz, density and magnitudes of the live weights of every matrix
overlap A B                          weights that two topologies share, beside what chance would give
finetuning RUN [...]                 sparse models fine-tuned with masks lifted and kept, against the dense model
difficulty RUN [...]                 what sparsity costs each task, by sparsity and model size

A MODEL is a finished run or a folder in Hugging Face format; a topology also a checkpoint or a masks file; a RUN is the folder of a
finished run, its pre-training run beside it. Names are also looked for in runs/. Prints a table; writes WHAT.json, WHAT.md and
WHAT.svg into --out.

examples:
  raysparse analyze distance runs/dense runs/dense-dart runs/sparse runs/sparse-dart
  raysparse analyze finetuning runs/quickstart-* --out analysis --json""",
)
"""Short and long help of `raysparse analyze`."""


REPORT_HELP = (
    "say what a hyper-parameter search found: how sparse the model may be, and what that rests on",
    """Of each task: scores of every sparsity over the seeds of its best settings, the difference to dense, counted FLOPs and measured
seconds end to end, and the recommendation: of the sparsities that lose at most the tolerance against dense, the one with the
fewest counted FLOPs, with its confidence. Settings are chosen on the validation split, scores are those of the test
split. The search may still be going on, or have been stopped: what has finished counts.

Writes into the search's folder, in the place of an earlier report:
  report.html    the page: answer, tables, Pareto plots, learning curves, what mattered, what did not work, how to reproduce
  report.md      the same without pictures
  results.csv    a row a trial
  tensorboard/   a sub-run a trial, for the HParams tab

examples:
  raysparse report runs/tune-demo
  raysparse report runs/tune-demo --tolerance 1.0 --json""",
)
"""Short and long help of `raysparse report`."""


DOCTOR_HELP = (
    "show which kernels run on this machine, whether sparse layers are right, and how fast",
    """Sparse layers on a CPU skip their zeros in native code, of which raysparse builds up to three kinds when it is installed: avx512
(with bfloat16), avx2 and baseline. Tells which is in use and why no other is, what is installed, and the outcome of a
self-test of a second: a sparse layer against its dense twin, and the measured gain.

The exit status is 0 where native kernels run and sparse layers are right, else 1; training works there too, but multiplies every zero.

--cluster looks at a Ray cluster from the inside, in some seconds: python, torch, ray and raysparse are the same on all nodes, the GPUs that
Ray gives away are there, bytes a second from node to node (measured), --folder is one folder that all nodes read and write, clocks,
/dev/shm. It says what to mend; the exit status is 1 where there is something. ADDRESS is as ray.init takes it (HEAD:6379); without it
RAY_ADDRESS, else the cluster of this machine.

examples:
  raysparse doctor
  raysparse doctor --cluster --folder /shared/runs
  RAYSPARSE_NATIVE=avx2 raysparse doctor          another build; off: none
  OMP_NUM_THREADS=1 raysparse doctor --json""",
)
"""Short and long help of `raysparse doctor`."""


SCORE_HELP = (
    "score any system's outputs against references, without a model",
    """Prints the scores of a task: those of its official scripts, to the digits that these print (docs/tasks.md tells which and what they
need). TASK is e2e, webnlg, dart, gsm8k, seq2seq, completion, docstrings, or a YAML file with a task section.

Outputs: a text file with one output a line, or JSON lines with "hypothesis" (predictions.jsonl of an evaluation).
References: a text file with one a line, or with a block of lines for each output and blank lines between (as E2E's script takes
them), or several text files of which line k belongs to output k (as WebNLG's takes them, a blank line is no reference), or a table with
"references", or the task's own data (test.jsonl). Files may be .gz or .zst.

examples:
  raysparse score --task e2e --outputs baseline.txt --references devset.txt
  raysparse score --task webnlg --outputs hypothesis.txt --references reference0.txt reference1.txt reference2.txt
  raysparse score --task dart --outputs runs/dart/predictions.jsonl --references runs/dart/predictions.jsonl --json
  raysparse score --task seq2seq --metrics chrf ter --outputs out.txt --references right.txt""",
)
"""Short and long help of `raysparse score`."""


EXAMPLES = {
    "plan": "configs/pretrain/spdf_gpt3_xl.yaml run.workers=64 sparsity.target=0.5",
    "pretrain": "configs/quickstart.yaml run.workers=2 sparsity.target=0.75",
    "finetune": "configs/finetune/docstrings.yaml model.path=runs/tiny sparsity.masks=keep",
    "prune": "configs/prune/text.yaml model.path=runs/tiny sparsity.target=0.75 method.damping=0.1",
    "evaluate": "configs/evaluate/docstrings.yaml model.path=runs/docstrings run.workers=2",
    "zeroshot": "configs/zeroshot/lambada.yaml model.path=runs/tiny task.files=data/lambada.jsonl",
    "export": "run=runs/tiny to=models/tiny",
    "generate": "model=models/tiny prompt=Once max_new_tokens=20 dtype=bfloat16 temperature=0.8",
    "tune": "tuning/spaces/docstrings.yaml run.name=search algorithm.type=random",
    "gradual": "configs/gradual/docstrings.yaml model.path=runs/tiny levels=[0.5,0.75]",
    "recover": "configs/recover/docstrings.yaml levels=[0.75] seeds=[0,1] run.name=two-seeds",
    "compare": "configs/compare/quickstart.yaml sparsity=0.5 run.name=half",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status: 0 done, 1 the run failed, 2 the user can mend it."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unknown option {' '.join(unknown)}; `raysparse {args.verb} --help` lists them")
    if rest and args.verb in ("doctor", "score"):
        parser.error(f"`raysparse {args.verb}` takes no words, got {' '.join(rest)}")
    args.words = [*getattr(args, "words", ()), *rest]  # overrides after an option
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        if args.verb == "masks":
            return _masks(args)
        if args.verb == "doctor":
            return _doctor(args)
        if args.verb == "score":
            return _score(args)
        if args.verb == "analyze":
            return _analyze(args)
        if args.verb == "report":
            return _report(args)
        if args.verb in ON_CLUSTER:
            return ON_CLUSTER[args.verb](args, parser)
        if args.verb == "generate":
            args.words = [_literal(word) if word.startswith("prompt=") else word for word in args.words]
        elif args.verb == "prune":
            args.words = [f"model.path={word}" if Path(word).is_dir() else word for word in args.words]
        elif getattr(args, "format", None):
            args.words.append(f"format={args.format}")
        files = [word for word in args.words if "=" not in word or (word[:7] != "prompt=" and Path(word).is_file())]
        overrides = [word for word in args.words if word not in files]
        if args.keys:
            print(_keys(_config_type(args.verb, files, overrides)))
            return 0
        return _run(args, files, overrides)
    except ConfigError as error:
        print(f"raysparse: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"raysparse: {str(error) or 'interrupted. The same command goes on from the last checkpoint.'}", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace, files: list[str], overrides: list[str]) -> int:
    from raysparse.train.error import Left, TrainingError
    from raysparse.train.process import torchrun_rank

    kind = _config_type(args.verb, files, overrides)
    rank, workers = torchrun_rank() or (0, 1)
    if hasattr(args, "local") and (args.local or torchrun_rank()):
        args.local, overrides = True, [*overrides, f"run.workers={workers}"]
    config = load(kind, files, overrides)
    try:
        if rank > 0:
            return _assist(config, args)
        facts, text = _verb(args.verb)(config, args)
    except TrainingError as error:
        print(f"raysparse: {error}", file=sys.stderr)
        return 1
    except Left as error:
        if rank == 0:
            print(f"raysparse: {error}", file=sys.stderr)
        return 143  # as of a process that SIGTERM has ended: whoever sent it sees that the run is not finished
    print(json.dumps(facts, indent=1) if args.json else text)
    return 0


def _verb(verb: str) -> Callable[[Any, argparse.Namespace], tuple[dict[str, Any], str]]:
    found = {"plan": _plan, "export": _export, "generate": _generate, "tune": _tune}
    return found.get(verb, _stages if verb in ("compare", "gradual", "recover") else _train)


def _plan(config: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from raysparse.recipes import plan

    facts = plan.plan(config)
    return facts, plan.show(facts, config)


def _train(config: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from raysparse import recipes

    if getattr(args, "grid", False):
        return _grid(config, args)
    recipe = recipes.MODULES[args.verb]
    if args.dry_run:
        facts = recipe.dry_run(config)
        return facts, f"{config.to_yaml()}\nThe config is sound. Nothing was started."
    job = recipe.open_run(config)
    (summary,) = carry_out([job], config.run, args.local)
    return summary, recipes.text(summary, job)


def _grid(config: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from raysparse.recipes import grid

    if args.dry_run:
        return grid.dry_run(config), f"{config.to_yaml()}\nAll points of the grid are sound. Nothing was started."
    return grid.grid(config, lambda jobs: carry_out(jobs, config.run, args.local))


def _export(config: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from raysparse.recipes import export

    facts = export.dry_run(config) if args.dry_run else export.export(config)
    return facts, "\n".join(f"{key:<12} {value}" for key, value in facts.items())


def _generate(config: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from raysparse.recipes import generate

    if args.dry_run:
        return generate.dry_run(config), f"{config.to_yaml()}\nThe config is sound. Nothing was started."
    facts = generate.generate(config)
    return facts, generate.show(facts)


def _stages(config: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from raysparse.recipes import GROUPS

    module = GROUPS[args.verb]
    if args.dry_run:
        return module.dry_run(config), f"{config.to_yaml()}\nThe config is sound. Nothing was started."
    return getattr(module, args.verb)(config, lambda jobs: carry_out(jobs, config.run, args.local))


def _tune(config: Any, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tuning import search

    return search.dry_run(config) if args.dry_run else search.search(config, args.resume)


def _literal(prompt: str) -> str:
    """The override ``prompt=TEXT``, quoted so that YAML takes it as it stands."""
    return f"prompt={json.dumps(prompt.removeprefix('prompt='), ensure_ascii=False)}"


def _masks(args: argparse.Namespace) -> int:
    """Nothing is trained, so nothing is configured; Ray is asked only where the run has a manager on it."""
    from raysparse.recipes import masks
    from raysparse.runtime.live import ask

    if len(args.words) != (2 if args.diff else 1):
        raise ConfigError(
            f"Expected one PATH, or two with --diff. Got {len(args.words)}{' with --diff' if args.diff else ''}. "
            "Example: raysparse masks --diff runs/a runs/b"
        )
    found = [masks.find(word, Path("runs")) for word in args.words]
    if args.diff:
        facts, text = masks.diff(*found), masks.show_diff
    elif masks.has_history(found[0]):
        try:
            view, seconds = ask(found[0])
            source = {"source": "live", "seconds": seconds}
        except ConnectionError as error:
            view, source = masks.recorded(found[0]), {"source": "disk", "why": str(error)}
        facts, text = source | view, masks.show_view
    else:
        facts, text = masks.count(*found), masks.show_count
    print(json.dumps(facts, indent=1) if args.json else text(facts))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    if args.cluster is not None:
        from cluster import doctor

        facts = doctor.examine(args.cluster or None, args.folder)
    else:
        from raysparse.recipes import doctor

        facts = doctor.examine()
    print(json.dumps(facts, indent=1) if args.json else doctor.show(facts))
    return 0 if facts["well"] else 1


def _analyze(args: argparse.Namespace) -> int:
    from raysparse.recipes import analyze

    found = analyze.analyze(args.what, args.words)
    files = found.write(Path(args.out))
    print(json.dumps(found.facts, indent=1) if args.json else found.terminal())
    print(f"written: {', '.join(map(str, files))}", file=sys.stderr)
    return 0


def _report(args: argparse.Namespace) -> int:
    from raysparse.report.search_page import read_report

    if len(args.words) != 1:
        raise ConfigError(f"Expected one SEARCH_DIR. Got {len(args.words)}. Example: raysparse report runs/tune-demo")
    report = read_report(args.words[0], args.tolerance)
    report.write()
    print(json.dumps(report.facts, indent=1) if args.json else report.terminal())
    print(f"written: {', '.join(map(str, report.files.values()))}", file=sys.stderr)
    return 0


def _score(args: argparse.Namespace) -> int:
    from raysparse.recipes import score

    facts = score.score(args.task, args.outputs, args.references, args.metrics)
    print(json.dumps(facts, indent=1) if args.json else score.show(facts))
    return 0


def carry_out(jobs: list[Any], run: Any, local: bool) -> list[dict[str, Any]]:
    """In this very process, or on Ray."""
    from raysparse.train.metrics import Console

    console = Console()
    if not local:
        from raysparse.runtime.launch import launch

        return launch(jobs, run, console)
    from raysparse.runtime.local import run_here

    return run_here(jobs, run, console)


def _assist(config: Any, args: argparse.Namespace) -> int:
    """A rank of torchrun that is not the first: it takes part in what rank 0 starts, and says nothing."""
    from raysparse.runtime.local import assist
    from raysparse.train.metrics import Console

    if getattr(args, "local", False) and not args.dry_run:
        assist(config.run, Console())
    return 0


def _config_type(verb: str, files: list[str], overrides: list[str]) -> type[Config]:
    """The verb's config; `plan` takes pre-training configs."""
    from raysparse.recipes import CONFIGS

    if verb == "tune":
        from tuning.config import SearchConfig

        return SearchConfig
    if verb != "plan":
        return CONFIGS[verb]
    values: dict[str, Any] = {}
    for more in [*map(read_yaml, files), *map(parse_override, overrides)]:
        values = merge(values, more)
    if "task" in values or "stages" in values:
        raise ConfigError("Expected a pre-training config for `raysparse plan`. Got one of another verb. Use VERB --dry-run for it.")
    return CONFIGS["pretrain"]


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("raysparse", description=__doc__, formatter_class=form)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (short, text) in HELP.items():
        epilog = (
            f"example:\n  raysparse {verb} {EXAMPLES[verb]}\n"
            f"  raysparse {verb} --keys          every key, its default and what it does\n\n"
            "CONFIG files merge left to right, overrides after them; values are YAML. An override that names a `type`\n"
            "replaces the whole section: sparsity.distribution.type=er."
        )
        sub = verbs.add_parser(verb, help=short, description=f"{short}.\n\n{text}", epilog=epilog, formatter_class=form)
        sub.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="config files and overrides, in any order")
        sub.add_argument("--json", action="store_true", help="print the facts as JSON on stdout; all else goes to stderr")
        sub.add_argument("--keys", action="store_true", help="explain every key of the config and stop")
        sub.add_argument("--dry-run", action="store_true", help="check everything, print the resolved config, start nothing")
        if verb == "finetune":
            sub.add_argument("--grid", action="store_true", help="run every combination of `grid`, score the best on validation")
        if verb == "export":
            sub.add_argument("--format", choices=["huggingface", "packed"], help="the same as format=...")
        if verb == "tune":
            sub.add_argument("--resume", action="store_true", help="go on with a search that was begun; finished trials are not run again")
        if verb not in ("plan", "export", "generate", "tune"):
            sub.add_argument("--local", action="store_true", help="in this process, without Ray: breakpoint() works (torchrun implies it)")
    sub = verbs.add_parser("masks", help=MASKS_HELP[0], description=f"{MASKS_HELP[0]}.\n\n{MASKS_HELP[1]}", formatter_class=form)
    sub.add_argument("words", nargs="+", metavar="PATH", help="a run (folder, or name below runs/), checkpoint, exported model, masks file")
    sub.add_argument("--diff", action="store_true", help="compare two: how many weights live in A alone, in B alone, in both")
    sub.add_argument("--json", action="store_true", help="print the facts as JSON on stdout")
    sub = verbs.add_parser("analyze", help=ANALYZE_HELP[0], description=f"{ANALYZE_HELP[0]}.\n\n{ANALYZE_HELP[1]}", formatter_class=form)
    sub.add_argument("what", choices=["distance", "weights", "overlap", "finetuning", "difficulty"], metavar="WHAT", help="see above")
    sub.add_argument("words", nargs="+", metavar="PATH", help="models, topologies or runs")
    sub.add_argument("--out", default="analysis", metavar="FOLDER", help="where the files are written (default: analysis)")
    sub.add_argument("--json", action="store_true", help="print the facts as JSON on stdout")
    sub = verbs.add_parser("report", help=REPORT_HELP[0], description=f"{REPORT_HELP[0]}.\n\n{REPORT_HELP[1]}", formatter_class=form)
    sub.add_argument("words", nargs="+", metavar="SEARCH_DIR", help="the folder of a search")
    sub.add_argument("--tolerance", type=float, metavar="X", help="loss of score that you accept (default: the search's own)")
    sub.add_argument("--json", action="store_true", help="print the facts as JSON on stdout")
    sub = verbs.add_parser("doctor", help=DOCTOR_HELP[0], description=f"{DOCTOR_HELP[0]}.\n\n{DOCTOR_HELP[1]}", formatter_class=form)
    sub.add_argument("--cluster", nargs="?", const="", metavar="ADDRESS", help="look at the nodes of a Ray cluster instead; run it on one")
    sub.add_argument("--folder", metavar="FOLDER", help="with --cluster: see whether all nodes share this folder")
    sub.add_argument("--json", action="store_true", help="print the facts as JSON on stdout")
    sub = verbs.add_parser("score", help=SCORE_HELP[0], description=f"{SCORE_HELP[0]}.\n\n{SCORE_HELP[1]}", formatter_class=form)
    sub.add_argument("--task", required=True, metavar="TASK", help="name of a task, or a YAML file with a task section")
    sub.add_argument("--outputs", required=True, metavar="FILE", help="what the system said, in the order of the references")
    sub.add_argument("--references", required=True, nargs="+", metavar="FILE", help="what would be right")
    sub.add_argument("--metrics", nargs="+", default=(), metavar="NAME", help="these instead of the task's")
    sub.add_argument("--json", action="store_true", help="print the facts as JSON on stdout")
    add_cluster_verbs(verbs, form)
    return parser


def _keys(kind: type[Config], prefix: str = "") -> str:
    """Every dotted key with its default and docstring; of a section with a `type`, the keys of each type."""
    lines = []
    for name, field in kind.model_fields.items():
        default = "(required)" if field.is_required() else field.get_default(call_default_factory=True)
        sections = [inner for inner in _sections(field.annotation) if issubclass(inner, Config)]
        if name == "type" or not sections:
            lines.append(f"  {prefix}{name} = {default}")
            lines += [f"      {' '.join(field.description.split())}"] if field.description else []
        for inner in sections:
            chosen = f" (type: {inner.model_fields['type'].default})" if "type" in inner.model_fields and len(sections) > 1 else ""
            lines.append(f"\n{prefix}{name}{chosen}: {(inner.__doc__ or '').strip().splitlines()[0]}")
            lines.append(_keys(inner, f"{prefix}{name}."))
    return "\n".join(lines)


def _sections(annotation: Any) -> list[type]:
    """The classes in a type: of a union all of its members."""
    if get_origin(annotation) is None:
        return [annotation] if isinstance(annotation, type) else []
    return [found for inner in get_args(annotation) for found in _sections(inner)]


if __name__ == "__main__":
    sys.exit(main())
