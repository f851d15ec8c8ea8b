"""The verb that predicts memory, traffic and time of a run: its flags and one call.

Heavy modules are imported by the call itself, so that `demix --help` answers at once.
"""

import os

from absl import flags

from demix_jax.cli.commands import Verb
from demix_jax.cli.settings_flags import define_path, given_path
from demix_jax.config.schema import Config
from demix_jax.errors import DemixError


def _define_plan() -> None:
    flags.DEFINE_integer("devices", 0, "Number of devices; or give --topology.")
    flags.DEFINE_string("topology", "", "TPU slice, such as v5p:4x4x4.")
    flags.DEFINE_string("hardware", "h100", "With --devices: h100, a100, v100, v4, v5e, v5p, v6e.")
    flags.DEFINE_integer(
        "experts", 0, "Number of domains; 0: those of the configuration.", lower_bound=0
    )
    flags.DEFINE_bool("compile", True, "Compile the step too, which takes a minute.")
    define_path("out", "File for the same numbers as JSON.", written="file")


def _run_plan(config: Config) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a plan takes no accelerator from others
    from demix_jax.files import write_json
    from demix_jax.planning.aot_compile import missing_compiler
    from demix_jax.planning.planner import out_of_memory_message, plan_phases
    from demix_jax.planning.tables import phases_json, phases_text

    given = flags.FLAGS
    phases = plan_phases(
        config,
        experts=given.experts,
        devices=given.devices,
        topology=given.topology,
        hardware=given.hardware,
        compiled=given.compile,
    )
    print(phases_text(phases))
    missing = missing_compiler(phases[0].plan.step.hardware.name, given.topology)
    if given.compile and missing:
        print(f"not compiled: {missing}")
    if out := given_path("out"):
        write_json(out, phases_json(phases))
    for phase in phases:
        if phase.plan.excess:
            where = f"{phase.name}: " if len(phases) > 1 else ""
            raise DemixError(where + out_of_memory_message(phase.plan))


VERBS = {"plan": Verb(_define_plan, _run_plan, "predict memory, traffic, time", ("config",), True)}
