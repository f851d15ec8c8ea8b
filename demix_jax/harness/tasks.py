"""`demix lm-eval`: tasks of lm-evaluation-harness on a run, as its table and as JSON."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from demix_jax.checkpoint.run_dir import load_run
from demix_jax.data.sources.base import one_line
from demix_jax.errors import DemixError, suggest
from demix_jax.files import check_output, open_whole
from demix_jax.harness.settings import Settings


def evaluate_tasks(workdir: Path, settings: Settings, output: Path | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run on tasks; prints the harness's tables.

    Args:
      workdir: folder of the run.
      settings: tasks and mixture.
      output: JSON file of the results, or None.

    Returns:
      The results of `lm_eval.simple_evaluate`, without samples.

    Raises:
      DemixError: the package lm-eval is not installed, an unknown task, one whose data cannot be
        had, an option that it asks for and that there is not, and what `MixtureLM` raises.
    """
    settings.validate()
    if output:
        check_output(output)
    if importlib.util.find_spec("lm_eval") is None:
        raise DemixError(
            "`demix lm-eval` needs the package lm-eval, which is not installed; "
            "pip install 'demix_jax[lm-eval]' (PyTorch comes with it)"
        )
    load_run(workdir).latest()  # its errors before the imports, which take seconds
    import lm_eval
    from lm_eval.utils import handle_non_serializable, make_table

    from demix_jax.harness.adapter import MixtureLM

    model = MixtureLM(workdir, settings)
    manager = _task_manager(settings)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=_names(manager, settings.tasks),
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_size,
        limit=settings.limit,
        task_manager=manager,
        log_samples=False,
    )
    if output:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        with open_whole(output) as file:
            file.write(f"{text}\n".encode())
    for column in ("results", "groups"):
        if results.get(column):
            print(make_table(results, column))
    for kind, count in model.outgrown.items():
        if count:
            what = "slid" if kind == "generate_until" else "lost their beginning"
            print(
                f"warning: {count} {kind} requests outgrew the context of {model.max_length} "
                f"tokens and {what}",
                file=sys.stderr,
            )
    if output:
        print(f"results: {output}")
    return results


def _task_manager(settings: Settings) -> Any:
    """Returns the harness's tasks and those of a folder; errors of loading become a DemixError."""
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            except Exception as error:  # of the task's YAML, of its code, or of its data's host
                names = ", ".join(map(str, task_list))
                raise DemixError(f"cannot load {names}: {one_line(error)}") from error

    folder = settings.include_path
    if folder and not Path(folder).is_dir():
        raise DemixError(f"--include_path {folder} is no folder; name one with task files (.yaml)")
    return Manager(include_path=folder or None)


def _names(manager: Any, tasks: tuple[str, ...]) -> list[str]:
    """Returns the names that patterns stand for."""
    found: list[str] = []
    for task in tasks:
        matches = manager.match_tasks([task])
        if not matches:
            raise DemixError(
                f"unknown task {task!r}{suggest(task, manager.all_tasks)}; `lm-eval ls tasks` "
                "lists the harness's, --include_path adds a folder"
            )
        found += [name for name in matches if name not in found]
    return found
