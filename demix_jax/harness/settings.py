"""Settings of `demix lm-eval`, in a module that imports no JAX: the command line reads them."""

import dataclasses

from demix_jax.errors import DemixError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Tasks and mixture; the flags of `demix lm-eval` derive from this class.

    Attributes:
      tasks: names of tasks or groups, or patterns such as arc_*.
      include_path: folder of further tasks, or "".
      expert: the one expert that is evaluated; "": all, mixed.
      prior: weights before the first token of every text: uniform, updating or cached:NAME.
      switch_rate: number in [0, 1]; not given: the cached prior's, else 0.
      top_k_experts: experts whose weights are kept at each token; 0: all.
      limit: documents of each task, or below 1 a share of them; not given: all.
      num_fewshot: examples in each context; not given: the task's own number.
      batch_size: texts read at once.
    """

    tasks: tuple[str, ...] = ()
    include_path: str = ""
    expert: str = ""
    prior: str = "uniform"
    switch_rate: float | None = None
    top_k_experts: int = 0
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int = 16

    def validate(self) -> None:
        """Raises DemixError for no tasks, or a number that is out of range."""
        if not self.tasks:
            raise DemixError("no tasks; name one or more, such as --tasks lambada_openai,piqa")
        whole = self.limit is None or self.limit < 1 or self.limit == int(self.limit)
        valid = {
            "limit": (
                self.limit is None or (self.limit > 0 and whole),
                "a whole number or a share",
            ),
            "num_fewshot": (self.num_fewshot is None or self.num_fewshot >= 0, "0 or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
        }
        for name, (fits, range_) in valid.items():
            if not fits:
                raise DemixError(f"{name} must be {range_}, not {getattr(self, name)}")
