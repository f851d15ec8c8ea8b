"""The house: imports run downward only, heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "demix_jax"
# From the ground up; a module imports only from floors below its own.
FLOORS = (
    {"errors", "__init__"},
    {"quantities"},
    {"config", "documents", "scan", "files", "store", "tokenfiles", "quiet", "hlo", "processes"}
    | {"hardware"},
    {"model", "mixing", "metrics", "changes", "corpus", "tokenizers"}
    | {"textfiles", "examples", "dedup"},
    {"params", "tables", "items", "sampling"}
    | {"prepared", "shards", "tfds_sources", "seqio_sources"},
    {"optim", "batches", "portable", "stopping", "domains", "runners"}
    | {"collectives", "replicas"},
    {"sharding", "placing"},
    {"score", "prepare", "checkpoint", "journal", "runs", "mixture", "traffic"} | {"exchanges"},
    {"loaded", "surgery", "step", "report_data", "footprint", "roofline"},
    {"states", "priors", "report_plots"},
    {"loop", "ahead"},
    {"cells", "editing", "plan"},
    {"train", "evaluate", "report", "score_texts", "verify", "materialize", "plan_report"},
    {"experts"},
    {"adapt"},
    {"verbs"},
    {"verbs_experts", "verbs_plan"},
    {"cli"},
    {"__main__"},
)
ONLY_IN = {
    "flax": {"model"},
    "matplotlib": {"report", "report_plots"},
    "orbax": {"items", "checkpoint"},
    "tensorstore": {"items"},
    "optax": {"optim", "checkpoint", "step", "states", "sharding"},
    "filelock": {"runs"},
    "grain": {"batches"},
    "safetensors": {"portable"},
    "seqio": {"seqio_sources"},
    "tensorflow": {"quiet"},
    "tensorflow_datasets": {"tfds_sources"},
    "fsspec": {"textfiles", "store"},
    "datasketch": {"dedup"},
    "apache_beam": {"runners"},
    "tensorboardX": {"journal"},
    "ml_collections": {"cli"},
    "absl": {"cli", "verbs", "verbs_experts", "verbs_plan"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of everything a module imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    parts = (name.split(".") for name in names)
    return {p[1] for p in parts if p[0] == "demix_jax" and len(p) > 1 and p[1] in modules}


def test_every_module_has_one_floor():
    placed = [name for floor in FLOORS for name in floor]
    assert sorted(placed) == sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_imports_run_downward():
    height = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    upward = [
        f"{path.stem} -> {name}"
        for path in PACKAGE.glob("*.py")
        for name in own(imports(path))
        if height[name] >= height[path.stem]
    ]
    assert not upward


def test_libraries_stay_in_their_rooms():
    strays = [
        f"{path.stem} imports {name}"
        for path in PACKAGE.glob("*.py")
        for name in imports(path)
        if path.stem not in ONLY_IN.get(name.split(".")[0], {path.stem})
    ]
    assert not strays


def test_training_and_evaluation_import_no_tensorflow():
    program = (
        "import sys, demix_jax.training.train, demix_jax.evaluation.evaluate, demix_jax.cli.main\n"
        "heavy = {'tensorflow', 'seqio', 'tensorflow_datasets', 'torch'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_and_functions_stay_small():
    for path in PACKAGE.glob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 470, f"{path.name} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{path.name}: {node.name} has {length} lines"
