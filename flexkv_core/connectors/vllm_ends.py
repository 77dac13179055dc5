"""What has ended, as vLLM's scheduler half says it to the worker halves, once a step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Ends:
    """What has ended since the last step, for the workers to tell vLLM.

    Attributes:
        loaded: requests whose load is complete. failed: whose load has failed, with its tag.
        saved: finished requests whose blocks may go.
        revoked: tags of transfers whose device blocks are about to be others': no copy of theirs may run any more.
    """

    loaded: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    revoked: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.loaded or self.failed or self.saved or self.revoked)


NOTHING = Ends()
"""What most steps have; not to be changed."""
