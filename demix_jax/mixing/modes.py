"""The modes of mixing experts: one table, for evaluation, reports and the command line."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MixingMode:
    """One way to weigh the experts of a text whose domain is unknown.

    Attributes:
      name: name in flags, results and reports.
      prior: uniform, updating or cached.
      rule: bayes (`filter.filter_stream`), average (weights that stay at the prior) or released
        (`filter.released_code`).
      color: colour in plots, of those of Okabe and Ito, which colour-blind readers tell apart.
      marker: marker in plots.
      preference: rank among the modes that may stand for a run on a domain, 0 first; None for one
        that never does.
    """

    name: str
    prior: str
    rule: str
    color: str
    marker: str
    preference: int | None = None

    @property
    def takes_switch_rate(self) -> bool:
        """Returns True if the mode is evaluated at each switch rate and top k that is asked for."""
        return self.rule == "bayes"

    def prior_name(self, domain: str) -> str:
        """Returns the name of the prior for a text of `domain`, as in results."""
        return f"cached:{domain}" if self.prior == "cached" else self.prior


MODES = {
    mode.name: mode
    for mode in (  # in the order of tables
        MixingMode("uniform", "uniform", "bayes", "#0072B2", "o", preference=2),
        MixingMode("updating", "updating", "bayes", "#E69F00", "s", preference=1),
        MixingMode("cached", "cached", "bayes", "#009E73", "^", preference=0),
        MixingMode("average", "uniform", "average", "#CC79A7", "v", preference=3),
        MixingMode("released_uniform", "uniform", "released", "#0072B2", "o"),
        MixingMode("released_updating", "updating", "released", "#E69F00", "s"),
        MixingMode("released_cached", "cached", "released", "#009E73", "^"),
    )
}
