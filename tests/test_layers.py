"""The house: imports between packages run downward only, heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "demix_jax"
# From the ground up: each package with what it may import besides itself and the ground.
GROUND = {"errors", "files", "folder_lock", "metrics", "typed_files"}
MAY_IMPORT = {
    "config": set(),
    "mixing": set(),
    "model": {"config"},
    "data": {"config"},
    "parallel": {"config", "model"},
    "report": {"mixing"},
    "checkpoint": {"config", "model", "data", "parallel"},
    "training": {"config", "model", "data", "parallel", "checkpoint"},
    "evaluation": {"config", "model", "mixing", "data", "parallel", "report", "checkpoint"},
    "generation": {"config", "model", "mixing", "data", "checkpoint", "evaluation"},
    "harness": {"config", "model", "mixing", "data", "checkpoint", "evaluation", "generation"},
    "serving": {"config", "model", "data", "checkpoint", "evaluation", "generation"},
    "planning": {"config", "model", "data", "parallel", "training"},
    "experts": {"config", "model", "data", "parallel", "checkpoint", "training", "evaluation"},
    "interop": {"config", "model", "data", "report", "checkpoint", "experts"},
    "cli": {"config", "mixing", "parallel", "data", "report", "checkpoint"}
    | {"training", "evaluation", "planning", "experts", "generation", "harness", "serving"}
    | {"interop", "api"},
}
ONLY_IN = {
    "flax": {"model/modules", "model/transformer", "model/params"},
    "matplotlib": {"report/page", "report/plots"},
    "orbax": {"checkpoint/orbax_items", "checkpoint/checkpointer", "checkpoint/step_path"},
    "tensorstore": {"checkpoint/arrays", "checkpoint/orbax_items"},
    "optax": {"model/optimizer", "checkpoint/checkpointer", "parallel/layout"}
    | {"training/train_step"},
    "filelock": {"folder_lock"},
    "grain": {"data/loader"},
    "safetensors": {"experts/safetensors_io", "interop/export_model"},
    "pyarrow": {"data/sources/table_files"},
    "datasets": {"data/sources/hub_source"},
    "huggingface_hub": {"data/sources/hub_source"},
    "tokenizers": {"data/tokenizers", "interop/tokenizer_json", "interop/import_model"},
    "seqio": {"data/sources/seqio_source"},
    "tensorflow": {"data/sources/lazy_tf"},
    "tensorflow_datasets": {"data/sources/tfds_source"},
    "fsspec": {"data/sources/listing", "data/prepare/storage"},
    "lm_eval": {"harness/adapter", "harness/tasks"},
    "datasketch": {"data/prepare/dedup"},
    "apache_beam": {"data/prepare/runners"},
    "tensorboardX": {"checkpoint/metrics_log"},
    "starlette": {"serving/app"},
    "uvicorn": {"serving/server"},
    "ml_collections": {"cli/config_flag"},
    "absl": {"cli/main", "cli/commands", "cli/expert_commands", "cli/plan_command"}
    | {"cli/generate_command", "cli/interop_commands"}
    | {"cli/lm_eval_command", "cli/serve_command"}
    | {"cli/config_command", "cli/config_flag", "cli/settings_flags"},
}


def modules() -> dict[str, ast.Module]:
    """The library's files by their path without suffix, such as "data/sources/base"."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {str(p.relative_to(PACKAGE).with_suffix("")): ast.parse(p.read_text()) for p in paths}


def imports(tree: ast.Module) -> set[str]:
    """Dotted names of everything a module imports, at any depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_between_packages_run_downward():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert packages == set(MAY_IMPORT), "a new package needs a line in MAY_IMPORT"
    upward = set()
    for name, tree in modules().items():
        room, inside, _ = name.partition("/")
        if inside:
            allowed = MAY_IMPORT[room] | GROUND | {room, "__version__"}
        else:  # the front: __init__, __main__ and api
            allowed = packages | GROUND | {"api"}
        own = {found.split(".")[1] for found in imports(tree) if found.startswith("demix_jax.")}
        upward |= {f"{name} -> {other}" for other in own - allowed}
    assert not upward


def test_the_package_graph_has_no_circle():
    left = dict(MAY_IMPORT)
    while left:
        ready = [name for name, below in left.items() if not below & set(left)]
        assert ready, f"these import each other: {sorted(left)}"
        for name in ready:
            del left[name]


def test_libraries_stay_in_their_rooms():
    strays = [
        f"{name} imports {found}"
        for name, tree in modules().items()
        for found in imports(tree)
        if name not in ONLY_IN.get(found.split(".")[0], {name})
    ]
    assert not strays


@pytest.mark.slow
def test_training_and_evaluation_import_no_tensorflow():
    program = (
        "import sys, demix_jax.training.train, demix_jax.evaluation.evaluate, demix_jax.cli.main\n"
        "heavy = {'tensorflow', 'seqio', 'tensorflow_datasets', 'torch'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_and_functions_stay_small():
    for path in (*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "studies").glob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= 450, f"{path.name} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{path.name}: {node.name} has {length} lines"
