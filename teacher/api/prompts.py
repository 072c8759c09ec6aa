"""How the text of a request becomes tokens: by a task's prompt format, or a tokenizer's."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from configs.schema import LabError
from models.vocabulary import token_names
from tasks.task import Task
from teacher.api.errors import ApiError


class TaskPrompts:
    """The teacher of a run: a chat is one question of its task."""

    def __init__(self, task: Task) -> None:
        self.task, self.end, self.vocabulary = task, task.end, task.vocabulary
        self.longest_row, self.longest_answer = task.longest_row, task.longest_answer
        self.names = [task.token_name(token) for token in range(task.vocabulary)]

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """ApiError for more than one message, or one that the task cannot read."""
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise ApiError(
                400, "unsupported_messages", "this model answers one message of the user",
                "messages",
            )  # fmt: skip
        try:
            return self.task.prompt(messages[0]["content"])
        except LabError as error:
            raise ApiError(400, "invalid_prompt", str(error), "messages") from None

    def raw(self, text: str) -> list[int]:
        """The start mark and the tokens of a text. ApiError for one that has none."""
        tokenizer = self.task.tokenizer
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokens or tokenizer.unk_token_id in tokens:
            raise ApiError(400, "invalid_prompt", "the prompt has no tokens here", "prompt")
        return [tokenizer.bos_token_id, *tokens]

    def render(self, tokens: list[int]) -> str:
        return self.task.render(tokens)

    def token_name(self, token: int) -> str:
        return self.names[token]


class TokenizerPrompts:
    """A pretrained model: a chat is written by its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest_row: int) -> None:
        self.tokenizer, self.end, self.vocabulary = (
            tokenizer, tokenizer.eos_token_id, len(tokenizer),
        )  # fmt: skip
        self.longest_row = self.longest_answer = longest_row
        self.names = token_names(tokenizer)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """ApiError without a template, or for messages that it does not know."""
        if not self.tokenizer.chat_template:
            raise ApiError(
                400, "unsupported_messages", "this model has no chat template; continue a text "
                "with /v1/completions", "messages",
            )  # fmt: skip
        try:
            found = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ApiError(400, "invalid_prompt", str(error), "messages") from None
        return found

    def raw(self, text: str) -> list[int]:
        """The tokens of a text, with a start mark where the tokenizer adds one. ApiError for a text
        that has none."""
        tokens = self.tokenizer(text)["input_ids"]
        if not tokens:
            raise ApiError(400, "invalid_prompt", "the prompt has no tokens here", "prompt")
        return tokens

    def render(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def token_name(self, token: int) -> str:
        return self.names[token]
