"""Do two models mean the same by a token id? Distributions can be compared only if they do."""

from transformers import PreTrainedTokenizerBase

from configs.schema import LabError


def same_vocabulary(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, access: str
) -> None:
    """LabError if the tokenizers differ in any id. How wide the models are does not matter: rows
    beyond the vocabulary are padding and are left out. To cut two vocabularies to one width would
    compare tokens that mean different things, and the loss would look plausible.
    """
    theirs, ours = ({i: t for t, i in each.get_vocab().items()} for each in (teacher, student))
    if theirs == ours:
        return
    differing = min(i for i in theirs.keys() | ours.keys() if theirs.get(i) != ours.get(i))
    raise LabError(
        f"access {access}: the teacher's {len(theirs)} tokens are not the student's {len(ours)}: "
        f"id {differing} is {theirs.get(differing)!r} there, {ours.get(differing)!r} here. What "
        "remains is access text, or objective sorted_distance, which compares no ids"
    )
