"""How the text of a request becomes tokens: by a task's prompt format."""

from configs.schema import LabError
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
        tokens = self.task.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokens or self.task.tokenizer.unk_token_id in tokens:
            raise ApiError(400, "invalid_prompt", "the prompt has no tokens here", "prompt")
        return [self.task.tokenizer.bos_token_id, *tokens]

    def render(self, tokens: list[int]) -> str:
        return self.task.render(tokens)

    def token_name(self, token: int) -> str:
        return self.names[token]
