"""The command line behind run_pipeline.sh."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from flows.environment import prepare_environment
from flows.lock import LOCK_HELD, Held, PipelineLock

ROOT = Path(__file__).resolve().parent.parent
OK, FAILED, BAD_REQUEST, INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
examples
  ./run_pipeline.sh                          run what is stale, with the parameters in params.yaml
  ./run_pipeline.sh --dry-run                what would run, why, how long it took last time
  ./run_pipeline.sh --preset tiny            put presets/tiny.yaml into force, then run
  ./run_pipeline.sh --set distill.steps=600  change one knob; only what depends on it runs again
  ./run_pipeline.sh --stage distill          this stage only; its inputs must be there
  ./run_pipeline.sh --from distill           this stage and all that follow it
  ./run_pipeline.sh --models offline         teachers by name, tag or "all" (registry/teachers.yaml)
  ./run_pipeline.sh --takeover               ask the run that holds the lock to stop, then go on

stages
  prepare > profile (each) > extract (each) > distill > route > sft > toolformer > grpo > benchmark

A run that was stopped or killed goes on from its last checkpoint when it is started again.
--preset, --set, --models, --datasets and --sample-size change params.yaml and stay in force.

exit codes: 0 done, 1 a stage failed, 2 a wrong option or parameter, 75 another run holds the
lock, 130 stopped by a signal"""


def build_parser() -> argparse.ArgumentParser:
    """Describe every option."""
    parser = argparse.ArgumentParser(
        prog="./run_pipeline.sh",
        description="Turn a big teacher model into a small student, and measure it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to run").add_mutually_exclusive_group()
    what.add_argument("--stage", metavar="NAME", help="this stage only")
    what.add_argument("--from", dest="start", metavar="NAME", help="this stage and all that follow")
    what.add_argument("--status", action="store_true", help="what is done, stale, running")
    what.add_argument(
        "--reset", nargs="?", const="all", metavar="STAGE",
        help="delete results and unfinished work (of one stage); asks first; never deletes mlruns",
    )  # fmt: skip
    knobs = parser.add_argument_group("parameters (they change params.yaml)")
    knobs.add_argument("--preset", metavar="NAME", help="a whole params file from presets/")
    knobs.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="SECTION.KEY=VALUE"
    )
    knobs.add_argument("--models", metavar="A,B", help="teachers: names, a tag, or all")
    knobs.add_argument("--datasets", metavar="A,B", help="data sets: names, a tag, or all")
    knobs.add_argument("--sample-size", type=int, metavar="N", help="documents a data set at most")
    knobs.add_argument("--skip-non-llm", action="store_true", help="leave out other modalities")
    knobs.add_argument(
        "--use-unsloth", action="store_true", help="fine-tune with unsloth, on a GPU"
    )
    how = parser.add_argument_group("how to run")
    how.add_argument("--dry-run", action="store_true", help="print the plan and touch nothing")
    how.add_argument("--verbose", action="store_true", help="show the tools' own output")
    how.add_argument("--yes", action="store_true", help="do not ask before --reset deletes")
    lock = how.add_mutually_exclusive_group()
    lock.add_argument("--wait", action="store_true", help="wait while another run holds the lock")
    lock.add_argument("--takeover", action="store_true", help="ask that run to stop, then go on")
    return parser


def main(arguments: list[str]) -> int:
    """Do what the command line asks for; give an exit code."""
    options = build_parser().parse_args(arguments)
    os.chdir(ROOT)
    prepare_environment(ROOT, options.verbose)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves the lock in good order
    if options.use_unsloth and (missing := _missing_for_unsloth()):
        print(missing, file=sys.stderr)
        return BAD_REQUEST
    try:
        if options.status or options.dry_run:
            return _look(options)
        with PipelineLock(ROOT / ".pipeline.lock", _typed(arguments), _lock_mode(options)) as lock:
            if lock.previous:
                print(f"the run before this one was killed ({lock.previous.describe()}); going on")
            return _act(options)
    except Held as held:
        print(held, file=sys.stderr)
        return LOCK_HELD
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def _look(options: argparse.Namespace) -> int:
    """Answer without the lock and without changing anything."""
    from flows.status import show_status

    def look(console) -> int:
        if options.status:
            show_status(ROOT, console)
        else:
            from flows.run import dry_run

            dry_run(ROOT, _request(options), console)
        return OK

    return _report_errors(look)


def _act(options: argparse.Namespace) -> int:
    """Run, or reset, while holding the lock."""

    def act(console) -> int:
        if options.reset:
            from flows.reset import reset

            return OK if reset(ROOT, options.reset, options.yes, console) else BAD_REQUEST
        from flows.run import run_pipeline

        run_pipeline(ROOT, _request(options), console)
        return OK

    return _report_errors(act)


def _report_errors(work) -> int:
    """Turn what a person can act on into one line and an exit code."""
    from rich.console import Console

    from flows.plan import BrokenPipelineFile
    from flows.stage_process import StageFailed, StageStopped

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        return work(Console(width=None if sys.stdout.isatty() else 120))
    except StageStopped as stopped:
        errors.print(str(stopped), style="yellow", markup=False)
        return INTERRUPTED
    except (StageFailed, RuntimeError) as failure:
        errors.print(str(failure), style="red", markup=False)
        return FAILED
    except (ValueError, FileNotFoundError, BrokenPipelineFile) as mistake:
        errors.print(str(mistake), style="red", markup=False)
        return BAD_REQUEST


def _request(options: argparse.Namespace):
    from flows.run import Request
    from flows.settings import Changes

    changes = Changes(
        preset=options.preset,
        assignments=tuple(options.assignments),
        models=options.models,
        datasets=options.datasets,
        sample_size=options.sample_size,
        skip_non_llm=options.skip_non_llm,
        use_unsloth=options.use_unsloth,
    )
    return Request(options.stage, options.start, changes, options.verbose)


def _missing_for_unsloth() -> str:
    """Ask the one module that probes backends, in a process of its own: it imports torch."""
    command = [sys.executable, "-m", "modeling.backends", "--require", "unsloth"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode else ""


def _lock_mode(options: argparse.Namespace) -> str:
    return "takeover" if options.takeover else "wait" if options.wait else "refuse"


def _typed(arguments: list[str]) -> str:
    return shlex.join(["./run_pipeline.sh", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
