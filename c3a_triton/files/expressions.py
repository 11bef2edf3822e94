"""Regular expressions, which may come from a stranger's file: what they may cost is bounded.

They are matched by the `regex` package, which follows `re` here and can be stopped: all slow matches of one pattern
together get `TIME_LIMIT_S` of processor time, and all matches of a `Matching` `TOTAL_TIME_LIMIT_S`.
"""

import re
import time
import warnings
from functools import lru_cache

import regex

from c3a_triton.errors import ConfigError

from .values import shown

__all__ = [
    "TIME_LIMIT_S",
    "TOTAL_TIME_LIMIT_S",
    "Matching",
    "check_re_syntax",
    "check_sizes",
    "compile_pattern",
]

# Patterns come from strangers' files, and compiling one has no time limit. Together they may have so many characters,
# counted repetitions multiplied out, as `regex` does (about fifteen seconds and 300 MB at most), and be so many.
MAX_PATTERN_CHARACTERS = 2**20
MAX_PATTERNS = 4096

TIME_LIMIT_S = 1.0
TOTAL_TIME_LIMIT_S = 30.0
# Module names are short: a match that takes longer than this counts against the pattern's limit.
_SLOW_MATCH_S = 0.005

# A counted repetition's first number, and what stands before it where that is one character or one set of them.
_COUNTED = re.compile(r"([\w.\]])?\{(\d+)")


def _multiplied_out(pattern: str) -> int:
    """At least the characters of a pattern whose counted repetitions are written out: groups as if all were nested."""
    size, largest = len(pattern), 1
    for character, digits in _COUNTED.findall(pattern):
        count = max(int(digits[:9]), 1)
        if character:
            largest = max(largest, count)
        else:
            size = min(size * count, 2 * MAX_PATTERN_CHARACTERS)
    return size * largest


def check_sizes(patterns: list[str]) -> None:
    """Refuses patterns whose compilation would take too long or too much memory."""
    if len(patterns) > MAX_PATTERNS:
        raise ConfigError(
            f"block_size_pattern, modules_to_save and layers_pattern have {len(patterns)} patterns, more than "
            f"{MAX_PATTERNS}: write fewer, which match more names each"
        )
    total = 0
    for pattern in patterns:
        total += _multiplied_out(pattern)
        if total > MAX_PATTERN_CHARACTERS:
            raise ConfigError(
                f"the patterns up to {shown(pattern)} have more than {MAX_PATTERN_CHARACTERS} characters, counted "
                "repetitions multiplied out: write them shorter, without {n} after a group"
            )


def check_re_syntax(pattern: str) -> None:
    """Refuses, by a `ConfigError`, what `re`, with which PEFT matches, does not take in every supported Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Python 3.10 still takes what later versions refuse.
            warnings.simplefilter("error", DeprecationWarning)
            re.compile(pattern)
    except (re.error, ValueError, RecursionError, OverflowError, DeprecationWarning) as error:
        raise ConfigError(f"{shown(pattern)} is not a valid regular expression: {error}") from error


@lru_cache(maxsize=4 * MAX_PATTERNS)
def compile_pattern(pattern: str, form: str) -> "_Limited":
    """Compiles a user's regular expression, completed by `form`; a bad one is a `ConfigError` that names it.

    It has to be one for `re`: `regex` has more to offer, which PEFT would not read, and some of which (recursion) can
    fill the memory before any time limit is reached. The time that a pattern takes is counted wherever it is used.
    """
    check_re_syntax(pattern)
    try:
        return _Limited(pattern, regex.compile(form.replace("{}", pattern)))
    except (regex.error, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{shown(pattern)} is not a valid regular expression: {error}") from error


class _Limited:
    """A compiled pattern with a limit on the processor time that its slow matches may take together."""

    def __init__(self, pattern: str, compiled: "regex.Pattern[str]") -> None:
        self._pattern, self._compiled = pattern, compiled
        self._seconds_left = TIME_LIMIT_S

    def match(self, name: str, *, whole: bool) -> "regex.Match[str] | None":
        """As `re.fullmatch` for the `whole` name, otherwise as `re.match`."""
        match = self._compiled.fullmatch if whole else self._compiled.match
        if self._seconds_left > 0:
            start = time.thread_time()
            try:
                found = match(name, timeout=self._seconds_left)
            except (TimeoutError, MemoryError):
                self._seconds_left = 0.0
            else:
                seconds = time.thread_time() - start
                if seconds > _SLOW_MATCH_S:
                    self._seconds_left -= seconds
                return found
        raise ConfigError(
            f"the pattern {shown(self._pattern)} takes too long to match module names (more than {TIME_LIMIT_S} s, "
            f"at {name!r}): write it without nested repetitions"
        )


class Matching:
    """Matches for one configuration, whose many patterns may each be quick enough and together take too long.

    Whoever asks about many names shares one, and what is asked about one model for one configuration does.
    """

    def __init__(self) -> None:
        self._seconds_left = TOTAL_TIME_LIMIT_S

    def match(self, pattern: str, form: str, name: str) -> "regex.Match[str] | None":
        """As `re.match`: from the start of the name."""
        return self._timed(pattern, form, name, whole=False)

    def fullmatch(self, pattern: str, form: str, name: str) -> "regex.Match[str] | None":
        """As `re.fullmatch`: the whole name."""
        return self._timed(pattern, form, name, whole=True)

    def _timed(self, pattern: str, form: str, name: str, *, whole: bool) -> "regex.Match[str] | None":
        compiled = compile_pattern(pattern, form)
        start = time.thread_time()
        found = compiled.match(name, whole=whole)
        self._seconds_left -= time.thread_time() - start
        if self._seconds_left < 0:
            raise ConfigError(
                f"the patterns of this configuration take more than {TOTAL_TIME_LIMIT_S} s to match module names "
                f"(at {name!r}): write fewer and simpler ones"
            )
        return found
