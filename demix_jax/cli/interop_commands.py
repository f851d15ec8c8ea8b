"""The verbs that read and write models of other libraries: their flags and one call each."""

from pathlib import Path

from absl import flags

from demix_jax.cli.commands import Verb
from demix_jax.cli.settings_flags import define_path
from demix_jax.errors import DemixError


def _define_import() -> None:
    define_path("hf", "Hugging Face model: folder of config.json, safetensors, tokenizer.json.")
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


def _run_import() -> None:
    given = flags.FLAGS
    if not given.hf:
        raise DemixError("what is to be imported? name its folder: --hf FOLDER")
    from demix_jax.interop.import_model import import_model

    import_model(
        Path(given.hf),
        Path(given.workdir),
        variant=given.variant,
        experts=given.experts,
        document_token=given.document_token,
        context=given.context,
    )


VERBS = {
    "import": Verb(_define_import, _run_import, "make a run of a model you have", ("workdir",)),
}
