"""The verbs that list, edit and hand on the experts of a run: their flags and one call each."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from absl import flags

from demix_jax.cli.commands import Verb
from demix_jax.cli.settings_flags import define_data_dir, define_path, define_paths
from demix_jax.errors import DemixError
from demix_jax.files import check_output


def _define_workdir() -> None:
    define_path("workdir", "Folder of the run.")


def _run_list() -> None:
    from demix_jax.experts.statement import list_experts

    print(list_experts(Path(flags.FLAGS.workdir)))


def _define_add() -> None:
    flags.DEFINE_list("name", None, "Names of the new experts.")
    flags.DEFINE_list(
        "from",
        None,
        "For each, an expert, a run (FOLDER or FOLDER:EXPERT) or a .safetensors file; "
        "or, for one, an average of experts: a=0.7,b=0.3.",
    )
    _define_workdir()


def _run_add() -> None:
    from demix_jax.experts.lifecycle import add_experts, merge_experts

    workdir, names = Path(flags.FLAGS.workdir), flags.FLAGS.name
    sources = flags.FLAGS["from"].value
    if len(names) == 1 and all("=" in source for source in sources):
        merge_experts(workdir, names[0], partial(parse_weights, sources))
    else:
        add_experts(workdir, names, sources)


def parse_weights(given: Sequence[str]) -> dict[str, float]:
    """Returns the weights of `a=0.7,b=0.3`; raises DemixError for another form."""
    pairs = [text.partition("=") for text in given]
    try:
        weights = {name: float(value) for name, _, value in pairs}
    except ValueError:
        raise DemixError(f"weights are a=0.7,b=0.3, not {','.join(given)!r}") from None
    if len(weights) < len(pairs):
        raise DemixError(f"weights {','.join(given)!r} name an expert twice")
    return weights


def _define_merge() -> None:
    flags.DEFINE_list("weights", None, "posterior, uniform, or numbers: a=0.7,b=0.3.")
    flags.DEFINE_string("to", None, "Name of the merged expert.")
    flags.DEFINE_string("domain", "", "With posterior: domain whose cached prior is taken.")
    define_data_dir("prepared data; default: that of the run")
    _define_workdir()


def _run_merge() -> None:
    from demix_jax.experts.lifecycle import merge_experts, posterior_weights, uniform_weights

    given = flags.FLAGS
    workdir = Path(given.workdir)
    if given.weights == ["posterior"]:
        if not given.domain:
            raise DemixError("--weights posterior needs --domain, whose posterior is meant")
        weights = partial(posterior_weights, workdir, given.domain, given.data_dir or "")
    elif given.weights == ["uniform"]:
        weights = partial(uniform_weights, workdir)
    else:
        weights = partial(parse_weights, given.weights)
    merge_experts(workdir, given.to, weights)


def _define_remove() -> None:
    flags.DEFINE_list("name", None, "Experts to remove.")
    flags.DEFINE_bool("purge_history", False, "Delete older steps that have them.")
    flags.DEFINE_bool("scan", True, "Search every remaining file for their tensors.")
    _define_workdir()


def _run_remove() -> None:
    from demix_jax.experts.lifecycle import remove_experts

    given = flags.FLAGS
    remove_experts(
        Path(given.workdir), given.name, purge_history=given.purge_history, scan=given.scan
    )


def _define_rename() -> None:
    flags.DEFINE_list("name", None, "Experts to rename.")
    flags.DEFINE_list("to", None, "Their new names, in the same order.")
    _define_workdir()


def _run_rename() -> None:
    from demix_jax.experts.lifecycle import rename_experts

    old, new = flags.FLAGS.name, flags.FLAGS.to
    if len(old) != len(new):
        raise DemixError(f"{len(old)} names and {len(new)} new names; give one for each")
    if len(set(old)) < len(old):
        raise DemixError(f"--name {','.join(old)} names an expert twice")
    rename_experts(Path(flags.FLAGS.workdir), dict(zip(old, new, strict=True)))


def _define_export() -> None:
    flags.DEFINE_list("name", None, "Experts to export.")
    define_path("output", "A .safetensors file, or a folder for one file per expert.")
    flags.DEFINE_bool("optimizer", True, "Export the optimizer state too, if there is one.")
    flags.DEFINE_bool("overwrite", False, "Replace files that exist.")
    _define_workdir()


def _run_export() -> None:
    from demix_jax.experts.lifecycle import export_experts

    given = flags.FLAGS
    output = Path(given.output)
    check_output(output, folder=not (len(given.name) == 1 and output.suffix == ".safetensors"))
    export_experts(
        Path(given.workdir),
        given.name,
        output,
        optimizer=given.optimizer,
        overwrite=given.overwrite,
    )


def _define_import() -> None:
    define_paths("input", "Exported .safetensors files.")
    flags.DEFINE_list("name", [], "Names in this run; default: their own.")
    _define_workdir()


def _run_import() -> None:
    from demix_jax.experts.lifecycle import import_experts

    given = flags.FLAGS
    import_experts(Path(given.workdir), [Path(file) for file in given.input], given.name)


def _define_widen() -> None:
    flags.DEFINE_string("to", None, "Row of model.expert_owns: what each expert will own.")
    _define_workdir()


def _run_widen() -> None:
    from demix_jax.experts.widen import widen_experts

    widen_experts(Path(flags.FLAGS.workdir), flags.FLAGS.to)


def _run_verify() -> None:
    from demix_jax.experts.verify import verify

    verify(Path(flags.FLAGS.workdir))


def _define_materialize() -> None:
    flags.DEFINE_list("expert", [], "Experts to keep; one for a dense run; default: all.")
    define_path("out", "Folder of the new run.", written="folder")
    flags.DEFINE_enum("variant", "dense", ["dense", "demix"], "Variant of the new run.")
    flags.DEFINE_string(
        "expert_owns", "", "Wider model.expert_owns of the new run; default: as is."
    )
    _define_workdir()


def _run_materialize() -> None:
    from demix_jax.experts.materialize import materialize

    given = flags.FLAGS
    materialize(
        Path(given.workdir),
        given.expert,
        Path(given.out),
        variant=given.variant,
        expert_owns=given.expert_owns,
    )


_RUN = ("workdir",)
VERBS = {
    "experts list": Verb(_define_workdir, _run_list, "list the experts of a run", _RUN),
    "experts add": Verb(_define_add, _run_add, "copy or average experts", (*_RUN, "name", "from")),
    "experts remove": Verb(
        _define_remove, _run_remove, "remove experts, with a receipt and a search", (*_RUN, "name")
    ),
    "experts rename": Verb(
        _define_rename, _run_rename, "give experts other names", (*_RUN, "name", "to")
    ),
    "experts merge": Verb(
        _define_merge, _run_merge, "average experts into one", (*_RUN, "weights", "to")
    ),
    "experts export": Verb(
        _define_export, _run_export, "write experts as safetensors", (*_RUN, "name", "output")
    ),
    "experts import": Verb(
        _define_import, _run_import, "read experts from safetensors", (*_RUN, "input")
    ),
    "experts widen": Verb(
        _define_widen, _run_widen, "let experts own more, exactly", (*_RUN, "to")
    ),
    "experts verify": Verb(_define_workdir, _run_verify, "check hashes and removals", _RUN),
    "materialize": Verb(
        _define_materialize, _run_materialize, "make one expert a dense run", (*_RUN, "out")
    ),
}
