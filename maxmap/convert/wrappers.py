"""The part of a foreign state dict that is the model, without the prefixes that wrappers put before its keys."""

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maxmap.convert.dialects import CANONICAL_NAMING, Naming, detect_naming
from maxmap.errors import UserError, nearest, shortened

# Entries that a module computes from its own settings, and counters; nothing in them is learned.
DERIVED = re.compile(
    r"(.*\.)?(num_batches_tracked|n_averaged|bp_index|attention_bias_idxs)"
    r"|(.*\.)?(relative_position_index|relative_coords_table|relative_bias)"
)
_INNER = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # these may stand anywhere
_DEEPEST = 4  # parts of a prefix
_MOST_PATTERNS = 5  # that an error suggests


@dataclass(frozen=True)
class KeyMatch:
    """How the keys of a state dict name the entries of a model.

    Attributes:
      names: canonical names by key, without the `DERIVED` entries. A key outside of the prefix keeps its own name.
      prefix: that was taken off, for example "timm_model."; empty without a wrapper.
      naming: of the keys behind the prefix.
      fitting: number of the keys behind the prefix that the model has.
    """

    names: Mapping[str, str]
    prefix: str
    naming: Naming
    fitting: int

    def describe(self) -> str:
        """Returns a phrase for messages that says how well the keys fit."""
        under = f" under the prefix '{shortened(self.prefix)}'" if self.prefix else ""
        how = f"{self.naming.dialect} names{under}"
        return f"{self.fitting} of its {len(self.names)} entries have names of the model ({how})"

    def advice(self, faults: Iterable[str]) -> str:
        """Returns the end of an error message: how to leave out the entries beside the model that `faults` name."""
        left_over = [fault.removeprefix("left over: ") for fault in faults if fault.startswith("left over: ")]
        outside = [key for key in left_over if not (self.prefix and key.startswith(self.prefix))]
        fitting = self.names.keys() - set(left_over)
        taken = {start for key in fitting for start in _starts(key)}
        patterns = list(dict.fromkeys(_pattern(key, taken) for key in outside))
        if not patterns or len(patterns) > _MOST_PATTERNS or 2 * self.fitting < len(self.names) - len(outside):
            return ""
        options = " ".join(f"--ignore '{pattern}'" for pattern in patterns)
        return f", or leave out what is no part of the model: {options}"


def _starts(key: str) -> list[str]:
    """Returns what a key starts with up to each of its points, the shortest first."""
    return [key[: point.end()] for point in re.finditer(r"\.", key)]


def _pattern(key: str, taken: Collection[str]) -> str:
    """Returns the shortest shell pattern of a key that is no start in `taken`, else the key."""
    return next((f"{start}*" for start in _starts(key) if start not in taken), key)


def match_keys(keys: Iterable[str], wanted: Collection[str]) -> KeyMatch:
    """Finds the prefix under which most of a model's entries are.

    Args:
      keys: of the state dict.
      wanted: canonical names of the model's entries.

    Raises:
      UserError: two prefixes, of which neither begins with the other, fit equally well, as those of twins do.
    """
    inner = {key: _INNER.sub("", key) for key in keys if not DERIVED.fullmatch(key)}
    groups: dict[str, list[str]] = {"": list(inner)}
    for key, short in inner.items():
        parts = short.split(".")[: _DEEPEST + 1]
        for depth in range(1, len(parts)):
            groups.setdefault(f"{'.'.join(parts[:depth])}.", []).append(key)
    best = KeyMatch(dict(inner), "", CANONICAL_NAMING, 0)
    twin = ""
    for prefix, group in sorted(groups.items(), key=lambda item: (-len(item[1]), len(item[0]))):
        if len(group) < max(best.fitting, 1):
            break
        inside = {key: inner[key].removeprefix(prefix) for key in group}
        naming = detect_naming(inside.values())
        names = {key: naming.to_canonical(name) for key, name in inside.items()}
        fitting = len(set(names.values()) & set(wanted))
        if fitting > best.fitting or (not prefix and fitting == best.fitting):
            best, twin = KeyMatch({**inner, **names}, prefix, naming, fitting), ""
        elif fitting == best.fitting > len(wanted) / 2 and not prefix.startswith(best.prefix):
            twin = prefix
    if twin:
        raise UserError(
            f"the model's entries are there under the prefix '{shortened(best.prefix)}' and under '{shortened(twin)}': "
            f"leave one of them out, for example with --ignore '{shortened(twin)}*'."
        )
    return best


def leave_out(state_dict: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """Returns a state dict without the entries whose keys match a shell pattern.

    Raises:
      UserError: a pattern matches no key.
    """
    kept = dict(state_dict)
    for pattern in patterns:
        matching = fnmatch.filter(state_dict, pattern)
        if not matching:
            close = nearest(pattern, [key for key in state_dict if len(key) < 200])
            raise UserError(f"no entry matches the pattern '{pattern}'; the nearest are {shortened(close)}.")
        for key in matching:
            kept.pop(key, None)
    return kept
