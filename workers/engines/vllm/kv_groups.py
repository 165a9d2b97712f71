"""How far the layers of a model look back, and which tokens may therefore come from elsewhere: arithmetic, no vLLM.

Layers that look back equally far are one KV group; vLLM allocates their blocks together and takes those back that lie before
the window or attention chunk. Two facts of its scheduler decide what decode asks for where not every layer keeps all:

- After a load of the whole prompt the last token runs again, but the blocks were reserved for the token after it. The oldest
  key of that token's window can then lie in a block that does not exist, and the answer is wrong without any error.
- A prefix hit of m tokens needs the window before m, which a load of n tokens brings only for m = n, and m is whole blocks.

So decode asks for whole blocks that end before the last prompt token, and computes the last 1 to B tokens itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ....transport.layout import KvGroup, KvLayout


@dataclass(frozen=True, slots=True)
class KvGroups:
    """The KV groups of one engine, in vLLM's order."""

    groups: tuple[KvGroup, ...]
    block_tokens: tuple[int, ...]  # of each group

    @classmethod
    def of(cls, layout: KvLayout) -> KvGroups:
        return cls(layout.groups, layout.shape.block_tokens)

    @property
    def is_plain(self) -> bool:
        """One group that keeps the whole prefix: KV of any leading part of a prompt can be used."""
        return len(self.groups) == 1 and self.groups[0].kind == "full"

    @property
    def step_tokens(self) -> int:
        """Whole blocks in every group end at multiples of this."""
        return math.lcm(*self.block_tokens)

    def wanted_tokens(self, prompt_tokens: int, step_tokens: int = 0) -> int:
        """How many leading tokens of a prompt decode wants from elsewhere; `step_tokens`: of another engine, if not 0."""
        if self.is_plain:
            return prompt_tokens
        step = step_tokens or self.step_tokens
        return (prompt_tokens - 1) // step * step

    def first_kept_token(self, group: int, tokens: int) -> int:
        """What this group still needs when so many tokens are computed: earlier blocks may be gone."""
        kind, span_tokens = self.groups[group].kind, self.groups[group].span_tokens
        match kind:
            case "window":
                return max(0, tokens - span_tokens + 1)
            case "chunk":
                return tokens // span_tokens * span_tokens
        return 0

    @property
    def told_group(self) -> int:
        """The group whose KV events stand for the prefix cache: one that keeps whole prefixes, where there is one."""
        return next((index for index, group in enumerate(self.groups) if group.kind == "full"), 0)
