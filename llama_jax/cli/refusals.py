"""Refusals: flags that are given where they would have no effect."""

from llama_jax.cli.flags import FLAGS
from llama_jax.cli.verbs import VERBS, Verb
from llama_jax.errors import InputError


def refuse_flags(given_with: str, reason: str, *names: str) -> None:
    """Refuse flags that would have no effect."""
    for name in names:
        if FLAGS[name].present:
            raise InputError(f"--{name} is given with {given_with}, {reason}; drop it")


def refuse_flags_of_other_verbs(verb: Verb) -> None:
    """Refuse flags that this verb does not take."""
    for name in dict.fromkeys(name for other in VERBS.values() for name in other.takes):
        flag = FLAGS[name]
        at_default = name in verb.takes_at_default and flag.value == flag.default
        if name not in verb.takes and not at_default:
            takers = [other.name for other in VERBS.values() if name in other.takes]
            others = "" if "" in takers else f"but belongs to {' and '.join(takers)}"
            refuse_flags(verb.name or "a prompt", others or verb.refuses_others, name)
