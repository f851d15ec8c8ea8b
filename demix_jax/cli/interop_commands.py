"""The verbs that read and write models of other libraries: their flags and one call each."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from demix_jax.cli.commands import Verb
from demix_jax.cli.expert_commands import parse_weights
from demix_jax.cli.settings_flags import define_data_dir, define_path, given_path
from demix_jax.errors import DemixError


def _define_import() -> None:
    define_path("hf", "Hugging Face model: folder of config.json, safetensors, tokenizer.json.")
    define_path("fairseq", "Or: checkpoint of the released code, shared and rank files.")
    define_path("workdir", "Folder of the new run.", written="folder")
    flags.DEFINE_enum("variant", "dense", ["dense", "demix"], "Variant of the new run.")
    flags.DEFINE_list("experts", [], "With demix: names of experts, equal copies to begin with.")
    flags.DEFINE_string(
        "document_token",
        "",
        "Token that separates documents: bos, eos or a special token; default: bos, else eos.",
    )
    flags.DEFINE_integer(
        "context", 0, "Tokens per sequence; 0: all that the model takes.", lower_bound=0
    )

    define_path("tokenizer", "With --fairseq: tokenizer.json of GPT-2.")
    flags.DEFINE_integer("heads", 0, "With --fairseq: heads; 0: as it says.", lower_bound=0)


def _run_import() -> None:
    given = flags.FLAGS
    if bool(given.hf) == bool(given.fairseq):
        raise DemixError("what is to be imported? name one folder: --hf FOLDER, --fairseq FOLDER")
    if given.fairseq:
        from demix_jax.interop.import_fairseq import import_fairseq

        if not given.tokenizer:
            raise DemixError("--fairseq needs --tokenizer, the tokenizer.json of GPT-2")
        folder, workdir = Path(given.fairseq), Path(given.workdir)
        import_fairseq(folder, workdir, given.tokenizer, given.experts, heads=given.heads)
        return
    from demix_jax.interop.import_model import import_model

    import_model(
        Path(given.hf),
        Path(given.workdir),
        variant=given.variant,
        experts=given.experts,
        document_token=given.document_token,
        context=given.context,
    )


def _define_export() -> None:
    define_path("workdir", "Run whose newest checkpoint is exported.")
    flags.DEFINE_string("expert", "", "Expert to export; a dense run has none to name.")
    flags.DEFINE_list(
        "merge",
        [],
        "Experts to average: a=0.7,b=0.3 or posterior:DOMAIN; FOLDER:EXPERT of another run too.",
    )
    define_path("out", "Folder to write.", written="folder")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Type of numbers.")
    flags.DEFINE_integer("shard_mb", 5000, "Largest file of tensors, in MB.", lower_bound=1)
    define_path("results", "Folder that `demix evaluate` wrote, for the model card.")
    define_data_dir("prepared data, for posterior:DOMAIN; default: that of the run")


def _run_export() -> None:
    from demix_jax.interop.export_model import export_model

    given = flags.FLAGS
    workdir = Path(given.workdir)
    export_model(
        workdir,
        Path(given.out),
        expert=given.expert,
        weights=_merge_weights(workdir, given.merge, given.data_dir or ""),
        dtype=given.dtype,
        shard_bytes=given.shard_mb * 1_000_000,
        results=given_path("results"),
    )


def _merge_weights(workdir: Path, given: Sequence[str], data_dir: str) -> dict[str, float]:
    from demix_jax.experts.lifecycle import posterior_weights

    kind, colon, domain = ",".join(given).partition(":")
    if colon and kind == "posterior":
        return posterior_weights(workdir, domain, data_dir)
    return parse_weights(given)


VERBS = {
    "import": Verb(_define_import, _run_import, "make a run of a model you have", ("workdir",)),
    "export": Verb(
        _define_export, _run_export, "write a model folder for transformers", ("workdir", "out")
    ),
}
