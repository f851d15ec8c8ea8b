"""Settings of an evaluation, in a module that imports no JAX: the command line reads them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """Texts and mixtures to evaluate; the flags of `demix evaluate` derive from this class.

    Attributes:
      domains: domains to read, prepared ones or NAME=PLACE as in data.sources; none named: those
        that each run was trained on.
      split: held-out text to read: train, valid or test.
      tokens: tokens per domain, rounded up to whole documents; 0: the whole split.
      batch_size: sequences scored at once; changes no result beyond rounding.
      modes: ways to predict: known (each expert alone), or a mixing mode.
      switch_rates: numbers in [0, 1]; dev: the one that reads the validation sequences of the
        domain's cached prior best.
      top_k: numbers of experts kept; 0: all.
      prior_sequences: validation sequences that a domain's cached prior is estimated on, the first
        of its split; a file that was estimated on another number is estimated anew.
      refresh_priors: new estimates of cached priors, also if a file exists.
      shard: part of the work, i/n: every n-th (run, domain) pair from the i-th on. Processes of a
        job divide all pairs among themselves instead, and process 0 collects the results.
    """

    domains: tuple[str, ...] = ()
    split: str = "test"
    tokens: int = 0
    batch_size: int = 16
    modes: tuple[str, ...] = ("known",)
    switch_rates: tuple[str, ...] = ("0", "dev")
    top_k: tuple[int, ...] = (0,)
    prior_sequences: int = 100  # as in the paper, section 5.2
    refresh_priors: bool = False
    shard: tuple[int, int] = (0, 1)
