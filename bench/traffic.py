"""What a step sends: demix, a dense model, and experts chosen by a router (docs/benchmarks.md).

    python bench/traffic.py [--config configs/paper_1300m.py --experts 8 --vocabulary 50257]

Computed from definitions (`demix_jax/traffic.py`), not measured; `tests/test_collectives_step.py`
compares the compiled step with them. Every device count from 8 to 1,024, bytes a device and step.
"""

import argparse
import dataclasses
import runpy

from demix_jax.planning.traffic import communication_table, table_text


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/paper_1300m.py")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    given = parser.parse_args()
    config = runpy.run_path(given.config)["get_config"]()
    model = dataclasses.replace(config.model, vocab_size=given.vocabulary)
    tokens = config.train.batch_size * given.experts * model.context
    devices = [8 * 2**i for i in range(8)]
    print(f"{given.config}, {given.experts} experts, {tokens:,} tokens a step")
    print(table_text(communication_table(model, given.experts, tokens, devices)))


if __name__ == "__main__":
    main()
