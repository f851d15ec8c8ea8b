"""Settings of an adaptation, in a module that imports no JAX: the command line reads them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """Length and pace of an adaptation; the flags of `demix adapt` derive from this class.

    Attributes:
      steps: updates at most (the paper: 300 to 1,250 of 131,072 tokens).
      learning_rate: peak of the learning rate; 0: a tenth of the run's, as in the paper.
      warmup: share of all steps in which the learning rate rises.
      batch_size: sequences per domain and update; 0: the run's.
      validate_every: steps between validations; 0: a twentieth of all steps.
      patience: validations without improvement until an expert's training stops; its best
        parameters are kept, also those it began with. 0: never.
      checkpoint_every: steps between checkpoints; 0: as often as validations.
      seed: seed of the order of text.
    """

    steps: int = 1000
    learning_rate: float = 0.0
    warmup: float = 0.08
    batch_size: int = 0
    validate_every: int = 0
    patience: int = 3
    checkpoint_every: int = 0
    seed: int = 0
