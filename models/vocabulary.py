"""Whether token ids mean the same in two models: only then can distributions be compared."""

from transformers import PreTrainedTokenizerBase

from configs.schema import LabError


def first_differing_id(
    theirs: PreTrainedTokenizerBase | None, ours: PreTrainedTokenizerBase | None
) -> int | None:
    """The first id that means different tokens in two tokenizers; None if there is none."""
    if theirs is ours:
        return None
    a, b = ({i: t for t, i in each.get_vocab().items()} for each in (theirs, ours))
    return min((i for i in a.keys() | b.keys() if a.get(i) != b.get(i)), default=None)


def require_same_vocabulary(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    what: str,
    alternatives: str = "access text, or objective uld, which compares no ids, both with sequences "
    "teacher",
) -> None:
    """LabError, beginning with `what`, if the tokenizers differ in any id. The widths of the models
    do not matter: logits beyond the vocabulary are padding and are cut off. Cutting different
    vocabularies to one width would compare unrelated tokens, with a plausible loss.
    """
    differing = first_differing_id(teacher, student)
    if differing is None:
        return
    there, here = (
        each.convert_ids_to_tokens(differing) if differing < len(each) else None
        for each in (teacher, student)
    )
    raise LabError(
        f"{what}: teacher and student have different vocabularies ({len(teacher)} and "
        f"{len(student)} tokens; id {differing} is {there!r} and {here!r}). Use {alternatives}"
    )
