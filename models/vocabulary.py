"""What token ids mean: only where it is the same in two models can they be compared."""

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from configs.schema import LabError

BYTE_OF = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # of byte-level BPE
BYTES = "bytes:"  # what the name of a part of a letter begins with


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


def token_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What OpenAI's API calls each token: its text, or the bytes of a part of a letter, as in
    `bytes:\\xc3`."""
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    added = tokenizer.get_added_vocab()
    symbols = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [symbol if symbol in added else token_name(symbol, byte_level) for symbol in symbols]


def token_name(symbol: str, byte_level: bool) -> str:
    """Of a vocabulary's entry: of byte-level BPE, or of SentencePiece, which writes a space as
    U+2581 and a single byte as <0xC3>."""
    if byte_level:
        text = bytes(BYTE_OF[letter] for letter in symbol)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return BYTES + "".join(f"\\x{byte:02x}" for byte in text)
    if len(symbol) == 6 and symbol.startswith("<0x") and symbol.endswith(">"):
        return f"{BYTES}\\x{symbol[3:5].lower()}"
    return symbol.replace("\u2581", " ")


def bytes_of(name: str) -> bytes:
    """The text of a token with this name."""
    if name.startswith(BYTES + "\\x"):
        return bytes.fromhex(name.removeprefix(BYTES).replace("\\x", ""))
    return name.encode()
