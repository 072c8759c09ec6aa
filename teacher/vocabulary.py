"""Do two models mean the same by a token id? Distributions can be compared only if they do."""

from transformers import PreTrainedTokenizerBase

from configs.schema import LabError


def differing_id(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> int | None:
    """The first id that two tokenizers do not mean the same by."""
    a, b = ({i: t for t, i in each.get_vocab().items()} for each in (theirs, ours))
    return min((i for i in a.keys() | b.keys() if a.get(i) != b.get(i)), default=None)


def same_vocabulary(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    what: str,
    remains: str = "access text, or objective sorted_distance, which compares no ids, both over "
    "sequences teacher",
) -> None:
    """LabError, beginning with `what`, if the tokenizers differ in any id. How wide the models are
    does not matter: rows beyond the vocabulary are padding and are left out. To cut two
    vocabularies to one width would compare tokens that mean different things, and the loss would
    look plausible.
    """
    differing = differing_id(teacher, student)
    if differing is None:
        return
    there, here = (
        each.convert_ids_to_tokens(differing) if differing < len(each) else None
        for each in (teacher, student)
    )
    raise LabError(
        f"{what}: the teacher's {len(teacher)} tokens are not the student's "
        f"{len(student)}: id {differing} is {there!r} there, {here!r} here. What remains: {remains}"
    )
